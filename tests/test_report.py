from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cgmq_fx
from cgmq_fx import BOPs, Budget, Constraint, OptionError, Result, Scheme, WeightMemory, prepare
from cgmq_fx.cost_models import CONVENTION
from cgmq_fx.history import EpochRecord, History, StepRecord
from tests.nets import NETS, small_classifier

SCHEMES = {
    "tensor": Scheme(),
    "channel": Scheme(weights="channel"),
    "element": Scheme(weights="element", output_bits=8),
}


def finished(
    model: nn.Module, inputs: Any, budget: Budget | Constraint, scheme: Scheme | None = None
) -> Result:
    return prepare(model, budget, inputs, scheme=scheme).finalize()


def result_of(name: str, scheme: str = "tensor") -> Result:
    net = NETS[name]
    budget = (BOPs() <= "20%") & (WeightMemory() <= "90%")
    return finished(net.build(), net.inputs(2), budget, SCHEMES[scheme])


def row(table: str, first: str) -> list[str]:
    """The cells of the row that starts with a text."""
    line = next(line for line in table.splitlines() if re.match(rf"\W+{re.escape(first)} ", line))
    return [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]


def test_the_table_of_a_small_net() -> None:
    """All at 8 bits: 12 and 8 MACs, shares 60 % and 40 %; (12 + 8) * 64 of (12 + 8) * 1024."""
    inputs = torch.randn(2, 3)
    result = finished(small_classifier(), inputs, BOPs() <= "10%", Scheme(bit_widths=(8,)))
    table = str(result)
    first, second = row(table, "0"), row(table, "2")
    assert [first[i] for i in (1, 2, 3, 5, 7, 8)] == ["linear", "4", "8", "8", "12", "60.0%"]
    assert [second[i] for i in (1, 2, 3, 5, 7, 8)] == ["linear", "2", "8", "8", "8", "40.0%"]
    assert table.startswith("Quantized under bops <= 10%")
    assert "bops 6.2500% <= 10.0000%" in table
    assert CONVENTION in re.sub(r"\s+", " ", table)


def test_what_a_bound_is_a_share_of_is_said() -> None:
    """All at 4 bits: 20 MACs x 16 are a quarter of what they cost at 8 bits, 20 x 64."""
    bound = BOPs() <= "60% of 8 bits"
    result = finished(small_classifier(), torch.randn(2, 3), bound, Scheme(bit_widths=(4,)))
    assert "bops 25.0000% <= 60.0000% of 8 bits\n" in str(result)
    assert "32 x 32 bits, or at 8 x 8 where it says so" in re.sub(r"\s+", " ", str(result))
    (state,) = result.report()["constraints"]
    assert (state["base"], state["reference"], state["relative"]) == (8, 20 * 64, 0.25)


def first_table(text: str) -> list[str]:
    return text.partition("└")[0].splitlines()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["cnn", "residual", "masked"])
def test_the_table_has_every_compute_node(name: str, scheme: str) -> None:
    result = result_of(name, scheme)
    table = str(result)
    nodes = [(i, n) for i, n in enumerate(result.cost.nodes) if n.operands]
    assert len(nodes) == sum(line.startswith("│") for line in first_table(table))
    for index, node in nodes:
        cells = row(table, node.module or node.name)
        shares = [costs[index] / sum(costs) for costs in result.cost.per_node]
        assert cells[7:] == [f"{node.macs:,}", *(f"{share:.1%}" for share in shares)]
        for operand, (bits, limit) in zip(node.operands, (cells[3:5], cells[5:7]), strict=True):
            if operand.quantizer is None:
                assert (bits, limit) == ("32", "-")
            else:
                assert bits.startswith(str(result.cost.assignment[operand.quantizer].min()))
                assert re.fullmatch(r"[\d.e+-]+", limit)


def test_the_short_form_of_a_result_is_a_line() -> None:
    result = result_of("cnn")
    result.history.steps += [StepRecord(i, 2000, "tune", (0.5, 0.5), 0.1) for i in range(2000)]
    assert repr(result.history) == "<History of 2000 steps and 0 epochs>"
    assert re.fullmatch(
        r"<Result of \d+ layers: bops [\d.]+% <= 20.0+%, weights .*%>", repr(result)
    )
    result.cost = replace(result.cost, states=result.cost.states * 50)
    assert len(repr(result)) < 400


def test_mixed_bits_are_shown_as_their_range_and_mean() -> None:
    result = result_of("cnn")
    mixed = {**result.cost.assignment, "0_weight": np.array([2, 8, 8, 4])}
    result.cost = replace(result.cost, assignment=mixed)
    assert row(str(result), "0")[3] == "2-8 (5.50)"


def test_operands_of_sums_have_a_table_of_their_own() -> None:
    table = str(result_of("residual"))
    assert "For adds, joins, pools and outputs" in table
    assert row(table, "conv2d_2")[1] == "144"  # 4 channels of 6 x 6


class Unknown(nn.Module):
    """Multiplies in an op that the table does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(self.layer(x), x)


def test_what_was_not_counted_and_measurements_are_shown() -> None:
    result = finished(Unknown(), torch.randn(2, 3), BOPs() <= "20%")
    result.metrics = {"accuracy": 0.98765}
    text = str(result)
    assert "not counted (unknown ops): cdist (aten.cdist.default" in text
    assert "accuracy 0.9877" in text
    assert result.report()["unknown_ops"] == list(result.cost.facts.unknown)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["cnn", "residual", "attention", "tied", "keywords"])
def test_the_report_is_plain_and_adds_up(name: str, scheme: str) -> None:
    result = with_history(result_of(name, scheme))
    report = json.loads(json.dumps(result.report(), allow_nan=False))
    assert report["satisfied"]
    for state in report["constraints"]:
        costs = [node["costs"][state["constraint"]] for node in report["nodes"]]
        assert sum(costs) == pytest.approx(state["value"])
    for quantizer in report["quantizers"]:
        assert sum(quantizer["gates_by_bits"].values()) == quantizer["gates"]
        assert 0 < quantizer["range"][0] <= quantizer["range"][1]
    assert [n["name"] for n in report["nodes"]] == [n.name for n in result.cost.nodes]
    assert [epoch["epoch"] for epoch in report["epochs"]] == [1, 2]


def with_history(result: Result, metrics: dict[str, float] | None = None) -> Result:
    """The result with a history of eight steps in two epochs."""
    phases = ["search"] * 4 + ["tune"] * 4
    steps = [
        StepRecord(i, 8, "search" if p == "search" else "tune", (2.0 - i / 5, 1.5 - i / 10))
        for i, p in enumerate(phases)
    ]
    epochs = [EpochRecord(e, "tune", 1.0 / e, metrics or {}, (0.9, 0.8), True) for e in (1, 2)]
    result.history = History(steps, epochs)
    return result


@pytest.mark.parametrize("metrics", [{}, {"loss": 0.5}, {"loss": 0.5, "accuracy": 0.9}])
def test_plots_are_images(metrics: dict[str, float], tmp_path: Path) -> None:
    files = with_history(result_of("residual"), metrics).plot(tmp_path / "new" / "plots")
    names = ["bits.png", "profile.png", "ranges.png", "history.png"]
    assert [f.name for f in files] == names
    assert all(f.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for f in files)


@pytest.mark.parametrize("name", ["cnn", "tied"])
def test_without_a_history_there_is_none_over_time(name: str, tmp_path: Path) -> None:
    files = result_of(name).plot(tmp_path)
    assert [f.name for f in files] == ["bits.png", "profile.png", "ranges.png"]


def test_a_history_without_epochs_is_drawn(tmp_path: Path) -> None:
    result = with_history(result_of("cnn"))
    result.history.epochs.clear()
    assert (tmp_path / "history.png") in result.plot(tmp_path)


def test_without_matplotlib_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.startswith("cgmq_fx.plot_")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(cgmq_fx, name.rpartition(".")[2])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = result_of("tied")
    with pytest.raises(OptionError, match=r"pip install \"cgmq-fx\[plot\]\""):
        result.plot(tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_a_folder_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "plots").touch()
    with pytest.raises(OptionError, match=r"plots cannot be written to .*plots"):
        result_of("tied").plot(tmp_path / "plots")
