"""Bounds on a part of a model, counted from a file that names its layers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cgmq_fx import ArtifactError, prepare
from cgmq_fx.cost_models import GraphFacts, NodeFacts, Stored
from cgmq_fx.exporters.certificate import SUFFIX, verify
from cgmq_fx.exporters.layer_names import layer_names, named
from cgmq_fx.result import Result
from tests.deploy_nets import SCHEMES, float_net, inputs_of

KEPT = NodeFacts("norm", "layer_norm", stored=(Stored("w", 6),), module="block.norm")
FACTS = GraphFacts(
    (
        NodeFacts("a", "linear", 12, stored=(Stored("a.w", 12),), module="block.a"),
        KEPT,
        NodeFacts("b", "linear", 20, stored=(Stored("b.w", 20),), module="head"),
    ),
    {},
)
NAMES = layer_names(FACTS)


def test_names_go_to_what_costs_the_same() -> None:
    plain = replace(FACTS, nodes=tuple(replace(n, name="", module="") for n in FACTS.nodes))
    assert named(plain, NAMES).nodes == FACTS.nodes


def test_what_only_keeps_something_may_stand_elsewhere() -> None:
    """A runtime moves a norm; layers that multiply keep their order."""
    first, norm, last = FACTS.nodes
    moved = replace(FACTS, nodes=(norm, first, last))
    assert {n.module for n in named(moved, NAMES).nodes} == {"block.a", "block.norm", "head"}


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (FACTS.nodes[:2], "others than their names say"),
        ((*FACTS.nodes, KEPT), "others than their names say"),
        ((replace(FACTS.nodes[0], macs=13), *FACTS.nodes[1:]), "a costs something else"),
        (tuple(reversed(FACTS.nodes)), "costs something else"),
    ],
)
def test_names_that_do_not_fit_are_refused(nodes: tuple[NodeFacts, ...], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        named(replace(FACTS, nodes=nodes), NAMES)


@pytest.fixture(scope="module")
def result() -> Result:
    """An MLP whose first layer has a bound of its own."""
    budget = "bops <= 4%, bops[0] <= 5%, weights[4] <= 100 B"
    model, inputs = float_net("mlp"), inputs_of("mlp", 4)
    return prepare(model, budget, inputs, scheme=SCHEMES["integer"]).finalize()


@pytest.mark.parametrize("kind", ["onnx", "pt2", "safetensors"])
def test_a_part_is_counted_from_the_file(kind: str, result: Result, tmp_path: Path) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxscript")
    path = result.export(tmp_path / f"net.{kind}", verify=False).path
    stated = json.loads(path.with_name(path.name + SUFFIX).read_text())
    assert stated["counted_from"] == "file"
    found = verify(path)
    assert [s.value for s in found.states] == [s.value for s in result.cost.states]
    assert verify(path, "bops[0] <= 1%").satisfied is False


def test_a_part_of_a_file_without_names_cannot_be_told(tmp_path: Path) -> None:
    model, inputs = float_net("mlp"), inputs_of("mlp", 4)
    whole = prepare(model, "bops <= 4%", inputs, scheme=SCHEMES["integer"]).finalize()
    path = whole.export(tmp_path / "net.pt2", verify=False).path
    with pytest.raises(ArtifactError, match="its own budget bounds no part of the model"):
        verify(path, "bops[0] <= 1%")
