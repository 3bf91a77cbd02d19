"""What a run, or a point of a sweep, can start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import cgmq_fx
from cgmq_fx import (
    OptionError,
    Result,
    sweeping,
)
from cgmq_fx.cost_models import Budget
from tests.test_sweep import data, model


def test_a_start_of_another_model_is_refused() -> None:
    other = cgmq_fx.prepare(nn.Linear(3, 3), "bops <= 50%", torch.rand(2, 3)).finalize()
    with pytest.raises(OptionError, match="a result of another model"):
        cgmq_fx.quantize(model(), "bops <= 50%", data(), start=other, epochs=1, progress=False)


PRUNABLE: dict[str, Any] = {
    "scheme": cgmq_fx.Scheme(bit_widths=(0, 2, 4), weights="channel"),
    "progress": False,
    "epochs": 0,
}


def test_what_lost_channels_is_no_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: dict[str, str | None] = {}

    def spied(model: Any, budget: Budget, *args: Any, start: Any, **options: Any) -> Result:
        starts[str(budget)] = None if start is None else str(start.budget)
        return cgmq_fx.quantize(model, budget, *args, start=start, **options)

    monkeypatch.setattr(sweeping, "quantize", spied)
    budgets = ["bops <= 2%", "bops <= 0.5%", "bops <= 0.3%", "bops <= 0.2%"]
    for further in ([budgets[1]], budgets[:3], budgets):  # those that are there are read again
        found = cgmq_fx.sweep(model(), further, data(), folder=tmp_path, **PRUNABLE)
    widths = [len(point.result.model.get_parameter("0.weight")) for point in found]
    assert widths[0] == 4 > max(widths[1:])
    assert starts == dict.fromkeys(budgets[2:], budgets[0]) | dict.fromkeys(budgets[:2])


def test_a_start_that_lost_channels_is_refused() -> None:
    short = cgmq_fx.quantize(model(), "bops <= 0.5%", data(), **PRUNABLE)
    text = r"lost channels, which were pruned.* its 0\.weight has shape \(\d, 3\), not \(4, 3\)"
    with pytest.raises(OptionError, match=text):
        cgmq_fx.quantize(model(), "bops <= 0.3%", data(), start=short, **PRUNABLE)
    whole = cgmq_fx.quantize(model(), "bops <= 2%", data(), **PRUNABLE)
    again = cgmq_fx.quantize(model(), "bops <= 0.5%", data(), start=whole, **PRUNABLE)
    assert again.cost.satisfied


def test_a_start_gives_weights_and_bits() -> None:
    done = cgmq_fx.quantize(
        model(), "bops <= 2%", data(), loss=cross_entropy, epochs=1, progress=False
    )
    prepared = cgmq_fx.prepare(model(), "bops <= 3%", torch.rand(2, 3))
    prepared.start_from(done)
    prepared.calibrate(data())
    bits = prepared.controller.assignment
    assert all((bits[n] == b).all() for n, b in done.cost.assignment.items())
    state = prepared.model.state_dict()
    weights = {n: t for n, t in done.model.named_parameters() if not n.startswith("cgmq")}
    assert weights
    assert all(torch.equal(state[n], t) for n, t in weights.items())
