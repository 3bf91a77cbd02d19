"""The cost of models without training."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import cgmq_fx
from cgmq_fx.cli import main


def net() -> nn.Module:
    """MACs: 4 * 9 * 36 = 1296 and 144 * 10 = 1440."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


X = torch.rand(2, 1, 8, 8)
WEIGHTS = 4 * 9 + 1440
BIASES = 4 * (4 + 10)


def test_costs_in_float_and_at_uniform_bits() -> None:
    costs = cgmq_fx.cost(net(), X)
    assert [row.name for row in costs.rows] == ["bops", "macs", "weights", "activations"]
    macs = 1296 + 1440
    assert costs["macs"].totals == dict.fromkeys((32, 8, 4, 2), macs)
    assert costs["bops"].totals == {b: macs * b * b for b in (32, 8, 4, 2)}
    assert costs["weights"].totals == {b: WEIGHTS * b / 8 + BIASES for b in (32, 8, 4, 2)}
    assert costs["activations"].totals[32] > costs["activations"].totals[8]
    assert repr(costs).startswith(
        "<Costs of 2 layers, in float: bops 2,801,664 bop, macs 2,736 mac"
    )
    assert len(repr(costs)) < 200


def test_the_layers_add_up() -> None:
    costs = cgmq_fx.cost(net(), X)
    for row in costs.rows:
        if row.additive:
            assert sum(row.nodes) == pytest.approx(row.totals[32])
    assert [n.module for n in costs.nodes] == ["0", "3"]


@pytest.mark.parametrize("costs", ["macs[3], bops", ["macs[3]", "bops"], " macs[Linear*] ,bops"])
def test_names_and_scopes(costs: str | list[str]) -> None:
    if "Linear" in str(costs):
        with pytest.raises(cgmq_fx.BudgetError, match="no layer matches"):
            cgmq_fx.cost(net(), X, costs)
    else:
        assert cgmq_fx.cost(net(), X, costs)["macs[3]"].totals[32] == 1440


def test_a_chip_prices_latency() -> None:
    costs = cgmq_fx.cost(net(), X, "latency, energy, macs", target="mpic")
    assert 0 < costs["latency"].totals[8] < costs["latency"].totals[32]


def test_a_model_that_multiplies_nothing_still_stores() -> None:
    costs = cgmq_fx.cost(nn.Embedding(10, 4), torch.zeros(2, 3, dtype=torch.long))
    assert costs["macs"].totals[32] == 0
    assert costs["weights"].totals[32] == 160


def test_a_share_of_nothing_is_explained_as_none() -> None:
    """A table multiplies nothing: half of its MACs are 0, as all of them are."""
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    given = torch.zeros(2, 3, dtype=torch.long)
    explained = cgmq_fx.explain(net, "bops <= 50%, macs[0] <= 50%", given)
    (line,) = (line for line in str(explained).splitlines() if "macs[0] <= 50%" in line)
    assert line.count(" 0.000% ") >= 2
    assert "always" in line


@pytest.mark.parametrize(
    ("costs", "message"),
    [("", "cannot read ''"), ("bops <= 1%", "cannot read"), ("wires", "no cost model named")],
)
def test_costs_that_cannot_be_read(costs: str, message: str) -> None:
    with pytest.raises(cgmq_fx.CgmqError, match=message):
        cgmq_fx.cost(net(), X, costs)


SWAPPED = r"inputs come before the costs: cost\(model, inputs, 'bops'\), or costs='bops'"
MISTAKEN: list[tuple[tuple[Any, ...], str]] = [
    (("bops", X), SWAPPED),
    (("bops",), SWAPPED),
    ((X, []), r"costs are names, such as 'bops, macs' .* not \[\]"),
    ((X, ["bops", 3]), r"costs are names, .* not \['bops', 3\]"),
    ((X, 3), "costs are names"),
    ((X, "bops, macs,bops "), "the cost 'bops' is asked for twice"),
    ((X, "bops[0], bops[0]"), r"the cost 'bops\[0\]' is asked for twice"),
]


@pytest.mark.parametrize(("given", "message"), MISTAKEN)
def test_mistaken_arguments(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(cgmq_fx.OptionError, match=message):
        cgmq_fx.cost(net(), *given)


def test_the_command_prints_tables_and_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run = CliRunner().invoke(main, ["cost", "tests.test_costing:net", "--input", "1x1x8x8"])
    assert run.exit_code == 0
    assert max(map(len, run.output.splitlines())) <= 80
    assert "Totals, every quantizer at the same bits" in run.output
    assert "2,736" in run.output
    arguments = ["cost", "tests.test_costing:net", "--input", "1x1x8x8", "--json"]
    found = json.loads(CliRunner().invoke(main, [*arguments, "--costs", "macs"]).output)
    assert found["costs"] == [
        {"name": "macs", "unit": "mac", "totals": dict.fromkeys(("32", "8", "4", "2"), 2736.0)}
    ]
    assert [layer["macs"] for layer in found["layers"]] == [1296, 1440]
