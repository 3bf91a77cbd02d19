"""What a sweep found: its front, its table and its rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cgmq_fx
from cgmq_fx import (
    OptionError,
    Sweep,
    SweepPoint,
)
from tests.test_sweep import BUDGETS, model, run


def point(cost: float, accuracy: float, budget: str = "") -> SweepPoint:
    """A point with a made-up cost and accuracy."""
    result = cgmq_fx.prepare(model(), "bops <= 50%", torch.rand(2, 3)).finalize()
    state = replace(result.cost.states[0], value=cost)
    result.cost = replace(result.cost, states=(state,))
    result.metrics = {"accuracy": accuracy, "loss": 9.0}
    return SweepPoint(budget, result)


def test_the_front_is_what_nothing_beats() -> None:
    points = (point(9, 0.9), point(5, 0.95), point(3, 0.8), point(2, 0.8), point(1, 0.5))
    front = Sweep(points).front
    assert [(p.costs["bops"], p.quality) for p in front] == [(5, 0.95), (2, 0.8), (1, 0.5)]


def test_equal_points_are_both_on_the_front() -> None:
    assert len(Sweep((point(1, 0.5), point(1, 0.5))).front) == 2


def test_a_lower_loss_is_better() -> None:
    low, high = point(1, 0), point(2, 0)
    low.result.metrics, high.result.metrics = {"loss": 0.2}, {"loss": 0.4}
    assert Sweep((low, high)).front == (low,)
    low.result.metrics = {}
    assert low.measure[0] == "training loss"


def test_the_table_and_the_rows_show_every_point(tmp_path: Path) -> None:
    found = run(tmp_path, epochs=1)
    table = str(found)
    assert all(budget in table for budget in BUDGETS)
    rows = json.loads(json.dumps(found.rows()))
    assert [row["budget"] for row in rows] == [p.budget for p in found]
    assert any(row["on_front"] for row in rows)
    assert found.plot(tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OptionError, match="cannot be written"):
        found.plot(tmp_path / "front.nothing")


def test_what_was_not_measured_is_none() -> None:
    one = point(1, 0.5)
    one.result.metrics = {}
    (row,) = Sweep((one,)).rows()
    assert row["training loss"] is None
    one.result.metrics = {"metric": float("nan"), "loss": float("inf")}
    (row,) = json.loads(json.dumps(Sweep((one,)).rows(), allow_nan=False))
    assert row["metric"] is None
    assert one.result.report()["metrics"] == {"metric": None, "loss": None}


def test_rows_as_a_data_frame() -> None:
    pandas = pytest.importorskip("pandas")
    frame = Sweep((point(1, 0.5, "a"), point(2, 0.6, "b"))).to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["bops"]) == [1, 2]
