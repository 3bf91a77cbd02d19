"""Activation memory: the peak of what is alive at once, and the arena that a planner needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np
import numpy.typing as npt

from cgmq_fx.cost_models.bits import GraphBits, NodeBits
from cgmq_fx.cost_models.facts import FLOAT_BITS, GraphFacts, NodeFacts, Steps, TensorFacts
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
    first = np.array([t.first for t in tensors], dtype=np.int64)
    return _live(first, np.array([t.last + 1 for t in tensors], dtype=np.int64), sizes)


def _live(first: Steps, end: Steps, sizes: Sizes) -> Sizes:
    change = np.zeros(1 + int(end.max(initial=1)), dtype=np.int64)
    np.add.at(change, first, sizes)
    np.subtract.at(change, end, sizes)
    return change.cumsum()[:-1]


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
        return float(_live(*graph.lifetimes, tensor_bytes(bits)).max())

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
    lambda t: (t.first - t.last, -t.elements),
    lambda t: ((t.first - t.last - 1) * t.elements, t.first),
    lambda t: (-t.last, -t.elements),
)
_TYPICAL_BITS = 8

Layout: TypeAlias = tuple[tuple[int, tuple[int, ...]], ...]
"""Tensors from bottom to top, each with those that it lies on."""


def layouts(tensors: Sequence[TensorFacts]) -> tuple[Layout, ...]:
    """Ways to pack tensors, found for 8 bits wherever a quantizer is or has been.

    What stays at 32 bits loses its quantizer in the end, and the layouts must not change with it.
    Each comes from a first fit into the lowest gap (Pisarchyk and Lee, Efficient Memory Management
    for Deep Neural Net Inference, 2020), in one of several orders. What is kept of it is which
    tensor lies on which, so it can be packed again for any bits.
    """
    sizes = [t.elements * (_TYPICAL_BITS if t.bits == FLOAT_BITS else t.bits) for t in tensors]
    first, last = (np.array([getattr(t, end) for t in tensors]) for end in ("first", "last"))
    rivals = [np.flatnonzero((t.first <= last) & (first <= t.last)).tolist() for t in tensors]
    orders = (sorted(range(len(sizes)), key=lambda i: key(tensors[i])) for key in _ORDERS)
    packed = dict.fromkeys(_first_fit(order, sizes, rivals) for order in orders)
    return tuple(dict.fromkeys(_layout(tensors, bottom_up) for bottom_up in packed))


def _first_fit(
    order: Sequence[int], sizes: Sequence[int], rivals: Sequence[Sequence[int]]
) -> tuple[int, ...]:
    """Place tensors in the lowest gap that is free while they live; indices from bottom to top."""
    offsets: dict[int, int] = {}
    for index in order:
        offset = 0
        for low, high in sorted(
            (offsets[j], offsets[j] + sizes[j]) for j in rivals[index] if j in offsets
        ):
            if offset + sizes[index] <= low:
                break
            offset = max(offset, high)
        offsets[index] = offset
    return tuple(sorted(offsets, key=lambda i: (offsets[i], i)))


def _layout(tensors: Sequence[TensorFacts], bottom_up: Sequence[int]) -> Layout:
    topmost: list[int | None] = [None] * (1 + max((t.last for t in tensors), default=0))
    rows = []
    for index in bottom_up:
        span = slice(tensors[index].first, tensors[index].last + 1)
        below = dict.fromkeys(j for j in topmost[span] if j is not None)
        rows.append((index, tuple(below)))
        topmost[span] = [index] * len(topmost[span])
    return tuple(rows)


def _ends(layout: Layout, sizes: Sequence[int]) -> list[int]:
    """Where every tensor ends when each lies right on top of those below it."""
    ends = [0] * len(sizes)
    for index, below in layout:
        ends[index] = sizes[index] + max([ends[j] for j in below], default=0)
    return ends


def _best(
    choices: Sequence[Layout], tensors: Sequence[TensorFacts], sizes: Sizes
) -> tuple[int, list[int]]:
    """The smallest arena of several layouts, and where every tensor ends in it."""
    peak = int(live_bytes(tensors, sizes).max()) if tensors else 0
    best: tuple[int, list[int]] | None = None
    for layout in choices:
        ends = _ends(layout, sizes.tolist())
        if best is None or max(ends, default=0) < best[0]:
            best = max(ends, default=0), ends
        if best[0] == peak:
            break
    return best or (0, [])


def plan_arena(
    tensors: Sequence[TensorFacts], sizes: Sizes, choices: Sequence[Layout] | None = None
) -> ArenaPlan:
    """Place every tensor in one arena: the best of the layouts, packed for `sizes`.

    Which tensor lies on which does not depend on the sizes. A planner that decides anew for every
    size packs tighter now and then, but a tensor that grows could then shrink the arena, and a
    bound on it could not be guaranteed from the smallest bit-widths.

    Args:
        tensors: The tensors with their lifetimes.
        sizes: Bytes of each.
        choices: What `layouts` gave for these tensors, if that is at hand.

    Returns:
        The plan; its size is at least the peak of what is alive.
    """
    size, ends = _best(layouts(tensors) if choices is None else choices, tensors, sizes)
    rows = zip(tensors, sizes.tolist(), ends, strict=True)
    return ArenaPlan(size, tuple(Allocation(t.name, e - n, n, t.first, t.last) for t, n, e in rows))


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

    def __init__(self) -> None:
        self._tensors: Sequence[TensorFacts] = ()
        self._choices: Sequence[Layout] = ()

    def graph_cost(self, graph: GraphFacts, bits: GraphBits) -> float:
        """The size of the best plan."""
        return float(_best(self._layouts(graph), graph.tensors, tensor_bytes(bits))[0])

    def parts(self, graph: GraphFacts, bits: GraphBits) -> dict[str, float]:
        """The tensors that are alive at the worst step."""
        return alive_at_peak(graph, bits)

    def plan(self, graph: GraphFacts, bits: GraphBits) -> ArenaPlan:
        """The plan itself: name, offset, size and lifetime of every tensor."""
        return plan_arena(graph.tensors, tensor_bytes(bits), self._layouts(graph))

    def _layouts(self, graph: GraphFacts) -> Sequence[Layout]:
        """The layouts of a graph, found once: only sizes change while gates move."""
        if self._tensors is not graph.tensors:
            self._tensors, self._choices = graph.tensors, layouts(graph.tensors)
        return self._choices
