"""Activation memory: the peak of what is alive at once, and the arena that a planner needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from cgmq_fx.cost_models.bits import GraphBits, NodeBits
from cgmq_fx.cost_models.facts import GraphFacts, NodeFacts, TensorFacts
from cgmq_fx.cost_models.model import CostModel, register_cost_model

Sizes = npt.NDArray[np.int64]


def tensor_bytes(bits: GraphBits) -> Sizes:
    """Bytes of every tensor, each rounded up to whole bytes."""
    return -(-bits.tensors // 8)


def live_bytes(tensors: Sequence[TensorFacts], sizes: Sizes) -> Sizes:
    """Bytes alive during every step.

    Args:
        tensors: The tensors with their lifetimes.
        sizes: Bytes of each.

    Returns:
        Shape (steps,).
    """
    steps = 1 + max((t.last for t in tensors), default=0)
    change = np.zeros(steps + 1, dtype=np.int64)
    np.add.at(change, [t.first for t in tensors], sizes)
    np.subtract.at(change, [t.last + 1 for t in tensors], sizes)
    return np.cumsum(change)[:-1]


def alive_at_peak(graph: GraphFacts, bits: GraphBits) -> dict[str, float]:
    """Bytes of every tensor that is alive at the worst step, by name."""
    sizes = tensor_bytes(bits)
    step = int(live_bytes(graph.tensors, sizes).argmax()) if graph.tensors else 0
    pairs = zip(graph.tensors, sizes, strict=True)
    return {t.name: float(size) for t, size in pairs if t.first <= step <= t.last}


@final
@register_cost_model
class ActivationMemory(CostModel):
    """Bytes of the tensors that are alive at the worst step of the execution order.

    Network inputs count until their last use, outputs to the end; views and what runs in place are
    not counted twice. Each tensor has the bits of its own quantizer and is rounded up to bytes.
    """

    name = "activations"
    unit = "byte"
    additive = False

    def node_cost(self, node: NodeFacts, bits: NodeBits) -> float:
        """Not a sum over nodes: 0."""
        return 0.0

    def graph_cost(self, graph: GraphFacts, bits: GraphBits) -> float:
        """The peak."""
        if not graph.tensors:
            return 0.0
        return float(live_bytes(graph.tensors, tensor_bytes(bits)).max())

    def parts(self, graph: GraphFacts, bits: GraphBits) -> dict[str, float]:
        """The tensors that are alive at the worst step."""
        return alive_at_peak(graph, bits)


@dataclass(frozen=True, slots=True)
class Allocation:
    """Where a plan puts one tensor.

    Attributes:
        name: The tensor.
        offset: First byte.
        size: Bytes.
        first: First step that needs it.
        last: Last step that needs it.
    """

    name: str
    offset: int
    size: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class ArenaPlan:
    """An arena in which no two tensors that are alive at once overlap.

    Attributes:
        size: Bytes.
        allocations: One per tensor.
    """

    size: int
    allocations: tuple[Allocation, ...]


_ORDERS: tuple[Callable[[TensorFacts], tuple[int, ...]], ...] = (
    lambda t: (-t.elements, t.first),
    lambda t: (t.first, -t.elements),
    lambda t: (-(t.last - t.first), -t.elements),
    lambda t: (-(t.last - t.first + 1) * t.elements, t.first),
    lambda t: (-t.last, -t.elements),
)
"""Orders of placement that do not depend on bits; see `plan_arena`."""


def plan_arena(tensors: Sequence[TensorFacts], sizes: Sizes) -> ArenaPlan:
    """Place every tensor in one arena.

    In a fixed order, each tensor goes on top of those placed before it that are alive at the same
    time; the best of several orders is taken. No gap below is ever filled: that would pack tighter
    now and then, but a tensor that grows could then shrink the arena, and a bound on it could not
    be guaranteed from the smallest bit-widths.

    Args:
        tensors: The tensors with their lifetimes.
        sizes: Bytes of each.

    Returns:
        The plan; its size is at least the peak of what is alive.
    """
    plans = (_stack(tensors, sizes, order) for order in _ORDERS)
    return min(plans, key=lambda plan: plan.size)


def _stack(
    tensors: Sequence[TensorFacts], sizes: Sizes, order: Callable[[TensorFacts], tuple[int, ...]]
) -> ArenaPlan:
    steps = 1 + max((t.last for t in tensors), default=0)
    top = np.zeros(steps, dtype=np.int64)
    placed: dict[int, Allocation] = {}
    for index in sorted(range(len(tensors)), key=lambda i: order(tensors[i])):
        tensor, size = tensors[index], int(sizes[index])
        span = slice(tensor.first, tensor.last + 1)
        offset = int(top[span].max())
        top[span] = offset + size
        placed[index] = Allocation(tensor.name, offset, size, tensor.first, tensor.last)
    return ArenaPlan(int(top.max()), tuple(placed[i] for i in range(len(tensors))))


@final
@register_cost_model
class Arena(CostModel):
    """Bytes of the arena that an actual offset planner needs, see `plan_arena`.

    Never below `activations`, the peak of what is alive.
    """

    name = "arena"
    unit = "byte"
    additive = False

    def node_cost(self, node: NodeFacts, bits: NodeBits) -> float:
        """Not a sum over nodes: 0."""
        return 0.0

    def graph_cost(self, graph: GraphFacts, bits: GraphBits) -> float:
        """The size of the best plan."""
        return float(self.plan(graph, bits).size)

    def parts(self, graph: GraphFacts, bits: GraphBits) -> dict[str, float]:
        """The tensors that are alive at the worst step."""
        return alive_at_peak(graph, bits)

    def plan(self, graph: GraphFacts, bits: GraphBits) -> ArenaPlan:
        """The plan itself: name, offset, size and lifetime of every tensor."""
        return plan_arena(graph.tensors, tensor_bytes(bits))
