"""Hand-built graph facts, and facts of small modules, for tests of cost models."""

from collections.abc import Mapping
from math import prod

import numpy as np
from torch import Tensor, nn
from torch.fx import GraphModule

from cgmq_fx.cost_models import (
    Assignment,
    BitArray,
    Bound,
    Budget,
    Constraint,
    CostModel,
    GraphFacts,
    Ledger,
    NodeFacts,
    Operand,
    QuantizerFacts,
    Role,
    Stored,
)
from cgmq_fx.graphs import float_graph
from cgmq_fx.passes.annotate import annotate
from cgmq_fx.passes.bias import QuantizeBiases
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.infra import run_passes
from cgmq_fx.passes.insert import InsertQuantizers
from cgmq_fx.passes.scheme import Scheme
from cgmq_fx.passes.shapes import PropagateShapes

WIDTHS = (2, 4, 8, 16, 32)

Meets = tuple[int, ...]


def bits(*values: int) -> BitArray:
    return np.array(values)


def quantizer(name: str, gates: int = 1, widths: tuple[int, ...] = WIDTHS) -> QuantizerFacts:
    return QuantizerFacts(name, Role.WEIGHT, gates, widths, elements=gates)


def linear(
    name: str,
    weight: str | None,
    activation: str | None,
    *,
    shape: tuple[int, int] = (3, 4),
    meets: tuple[Meets, Meets] = ((), ()),
    tied: bool = False,
) -> NodeFacts:
    """A linear layer with a bias whose weight has `shape` (out, in).

    `meets` are the shapes in which the gates of weight and activation meet; a `tied` weight is
    stored by another node.
    """
    operands = (
        Operand(Role.WEIGHT, prod(shape), weight, meets[0]),
        Operand(Role.ACTIVATION, shape[1], activation, meets[1]),
    )
    own = () if tied else (Stored(f"{name}.weight", prod(shape), weight),)
    stored = (*own, Stored(f"{name}.bias", shape[0]))
    return NodeFacts(name, "aten.linear.default", prod(shape), operands, stored=stored)


def graph(
    *nodes: NodeFacts, gates: Mapping[str, int] | None = None, widths: tuple[int, ...] = WIDTHS
) -> GraphFacts:
    """A graph of `nodes`; `gates` tells how many gates a quantizer has where it is not one."""
    names = dict.fromkeys(name for node in nodes for name in node.quantizers)
    sizes = dict.fromkeys(names, 1) | dict(gates or {})
    return GraphFacts(nodes, {name: quantizer(name, sizes[name], widths) for name in names})


def two_layers(widths: tuple[int, ...] = WIDTHS) -> GraphFacts:
    """12 MACs with a gate per output channel, then 6 MACs with a gate per input channel."""
    nodes = (
        linear("fc1", "w1", "x", shape=(3, 4), meets=((3, 1, 1), (1, 1, 1))),
        linear("fc2", "w2", "h", shape=(2, 3), meets=((1, 1, 1), (1, 3, 1))),
    )
    sizes = {"w1": 3, "x": 1, "w2": 1, "h": 3}
    return GraphFacts(nodes, {n: quantizer(n, gates, widths) for n, gates in sizes.items()})


def quantized(module: nn.Module, inputs: Tensor, scheme: Scheme) -> tuple[GraphModule, GraphFacts]:
    """A module with quantizers, as `prepare` inserts them, and its facts."""
    captured = float_graph(module, ExampleInputs((inputs,)))
    inserted = [InsertQuantizers(scheme), QuantizeBiases(), PropagateShapes(captured.inputs)]
    result = run_passes(captured.module, inserted)
    return result, annotate(result, captured.inputs.batch or 1)


def cost(model: CostModel, facts: GraphFacts, assignment: Assignment) -> float:
    """The cost of a graph, from scratch."""
    return Ledger(facts, Budget((Constraint(model, Bound(1.0)),)), assignment).totals[0]
