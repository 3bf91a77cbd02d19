"""Bit-widths as a cost model sees them: distributions over what meets what.

With one gate per tensor a compute node multiplies W-bit weights with A-bit activations. With finer
granularity it multiplies a mixture, and a cost is the mean over the elements that meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias, overload

import numpy as np
import numpy.typing as npt

from cgmq_fx.cost_models.facts import (
    FLOAT_BITS,
    GraphFacts,
    NodeFacts,
    Operand,
    Pruning,
    Stored,
    TensorFacts,
)

BitArray: TypeAlias = npt.NDArray[np.int64]
Assignment: TypeAlias = Mapping[str, BitArray]
"""The bits of every quantizer: name -> flat array with one entry per gate."""

_RADIX = 64
_FEW = 128
"""Up to so many gates, Python's sum is faster than numpy's."""

_FLOAT: BitArray = np.array([FLOAT_BITS])
_ALL: BitArray = np.array([1])


@dataclass(frozen=True, slots=True)
class NodeBits:
    """The bits of one node.

    Attributes:
        pairs: (count, first bits, second bits) of the operands' elements that meet, weight first;
            empty for a node without operands. Counts are relative to their sum.
        stored_bits: Total bits of what the node stores.
    """

    pairs: tuple[tuple[int, int, int], ...]
    stored_bits: int

    def mean(self, function: Callable[[int, int], float]) -> float:
        """The mean of `function(weight bits, activation bits)` over the products of the node."""
        if len(self.pairs) == 1:
            return function(self.pairs[0][1], self.pairs[0][2])
        total = sum(count for count, _, _ in self.pairs)
        return sum(count * function(w, a) for count, w, a in self.pairs) / total if total else 0.0

    @property
    def weight(self) -> float:
        """Mean bits of the first operand (the weight, where there is one)."""
        return self.mean(lambda w, _: w)

    @property
    def activation(self) -> float:
        """Mean bits of the second operand (the activation)."""
        return self.mean(lambda _, a: a)


@dataclass(frozen=True, slots=True)
class GraphBits(Sequence[NodeBits]):
    """The bits of a whole graph; as a sequence, those of its nodes.

    Attributes:
        nodes: The bits of every node, in the order of the graph's facts.
        tensors: Total bits of every tensor of the graph's facts, in their order.
    """

    nodes: Sequence[NodeBits]
    tensors: BitArray

    @overload
    def __getitem__(self, index: int) -> NodeBits: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[NodeBits]: ...
    def __getitem__(self, index: int | slice) -> NodeBits | Sequence[NodeBits]:
        return self.nodes[index]

    def __len__(self) -> int:
        return len(self.nodes)


def graph_bits(graph: GraphFacts, assignment: Assignment) -> GraphBits:
    """The bits of every node and tensor of `graph` under `assignment`."""
    nodes = [node_bits(node, assignment) for node in graph.nodes]
    tensors = [tensor_bits(tensor, assignment) for tensor in graph.tensors]
    return GraphBits(nodes, np.array(tensors, dtype=np.int64))


def reference_bits(graph: GraphFacts, bits: int) -> GraphBits:
    """The bits of `graph` with every quantizer at `bits`, and without copies in another form."""
    assignment = dict.fromkeys(graph.quantizers, np.array([bits]))
    single = [
        replace(node, stored=tuple(s for s in node.stored if not s.copy))
        if any(s.copy for s in node.stored)
        else node
        for node in graph.nodes
    ]
    tensors = [0 if t.copy else tensor_bits(t, assignment) for t in graph.tensors]
    return GraphBits([node_bits(n, assignment) for n in single], np.array(tensors, dtype=np.int64))


def tensor_bits(tensor: TensorFacts, assignment: Assignment) -> int:
    """Total bits of a tensor, rounded up where gates do not divide its elements."""
    if tensor.quantizer is None:
        return tensor.elements * tensor.bits
    gates = assignment[tensor.quantizer]
    if gates.size == 1:
        return tensor.elements * gates.item()
    if tensor.shares is None:
        return tensor.elements * int(gates.max())
    if tensor.shares:
        shares = np.array(tensor.shares)
        return -(-tensor.elements * int(gates @ shares) // int(shares.sum()))
    return -(-tensor.elements * _sum(gates) // gates.size)


def node_bits(node: NodeFacts, assignment: Assignment) -> NodeBits:
    """The bits of `node` under `assignment`."""
    stored = 0
    for tensor in node.stored:
        stored += _stored(tensor, node, assignment)
    if not node.operands:
        return NodeBits((), stored)
    return NodeBits(_pairs(*_factors(node.operands, assignment)), stored)


def _factors(operands: Sequence[Operand], assignment: Assignment) -> list[BitArray]:
    """The gates of both operands, shaped to meet each other; 0 where channels are pruned."""
    gates = [_gates(operand, assignment) for operand in operands]
    for index, operand in enumerate(operands):
        if operand.pruning is not None:
            kept = _kept_where_they_meet(operand, assignment)
            if _is_pruned_whole(operand.pruning, assignment):
                gates = [_least(own, kept) for own in gates]
            gates[index] = gates[index] * kept
    return gates


def _gates(operand: Operand, assignment: Assignment) -> BitArray:
    gates = _FLOAT if operand.quantizer is None else assignment[operand.quantizer]
    if gates.size == 1:
        return gates
    if operand.order:
        gates = gates[np.frombuffer(operand.order, dtype=np.int32)]
    elif not operand.meets:
        return np.array([gates.max()])
    return gates.reshape(operand.meets)


def _kept_where_they_meet(operand: Operand, assignment: Assignment) -> BitArray:
    kept = _kept_channels(operand, assignment)
    return kept if kept.size == 1 else kept.reshape(operand.meets)


def _is_pruned_whole(pruning: Pruning, assignment: Assignment) -> bool:
    return not assignment[pruning.quantizer].any()


def _least(gates: BitArray, kept: BitArray) -> BitArray:
    """The fewest bits over the channels of `kept`, for each of them.

    A layer that is pruned as a whole keeps a channel, which carries nothing: it counts with the
    fewest bits that any channel has, so that one that opens never makes its readers cheaper.
    """
    shared = range(-min(gates.ndim, kept.ndim), 0)
    axes = tuple(axis for axis in shared if gates.shape[axis] == kept.shape[axis] > 1)
    return np.broadcast_to(gates.min(axis=axes, keepdims=True), gates.shape) if axes else gates


def _kept_channels(pruned: Operand | Stored, assignment: Assignment) -> BitArray:
    """1 for every channel of an operand, or of what is stored, that is not pruned, 0 for others.

    One number for all where there is one gate, or no pruning. A layer that is pruned as a whole
    keeps its first channel: no graph has a layer without any.
    """
    pruning = pruned.pruning
    if pruning is None:
        return _ALL
    gates = assignment[pruning.quantizer]
    if gates.all():
        return _ALL
    gates = np.broadcast_to(gates.reshape(pruning.gates if gates.size > 1 else 1), pruning.gates)
    kept: BitArray = np.minimum(gates.max(axis=(0, 2)), 1)
    if not kept.any():
        kept[0] = 1
    return kept


def idle_gates(
    node: NodeFacts, assignment: Assignment
) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    """The gates that meet nothing but pruned channels, as quantizers with a flag per gate."""
    for operand in node.operands:
        if operand.pruning is None:
            continue
        kept = _kept_where_they_meet(operand, assignment)
        if _is_pruned_whole(operand.pruning, assignment):
            kept = np.zeros_like(kept)
        for own in node.operands:
            gates = _gates(own, assignment)
            if own.quantizer is not None and gates.size > 1 and _share_channels(gates, kept):
                yield own.quantizer, np.broadcast_to(kept == 0, gates.shape).reshape(-1)


def _share_channels(gates: BitArray, kept: BitArray) -> bool:
    """Whether there is a gate for each channel."""
    return np.broadcast_shapes(gates.shape, kept.shape) == gates.shape


def _stored(stored: Stored, node: NodeFacts, assignment: Assignment) -> int:
    """Bits of a stored tensor: every gate stands for an equal number of elements."""
    if stored.quantizer is None and stored.pruning is None:
        return stored.elements * stored.bits
    if stored.quantizer is None:
        gates = _kept_channels(stored, assignment) * stored.bits
    else:
        gates = assignment[stored.quantizer]
        for operand in node.operands:
            if operand.pruning is not None:
                gates = _without_pruned(gates, stored, operand, node, assignment)
                break
    if gates.size == 1:
        return stored.elements * gates.item()
    return stored.elements // gates.size * _sum(gates.ravel())


def _without_pruned(
    gates: BitArray, stored: Stored, pruned: Operand, node: NodeFacts, assignment: Assignment
) -> BitArray:
    """The gates of what is stored, 0 where they meet channels of an operand that are pruned."""
    own = next((o for o in node.operands if o.quantizer == stored.quantizer), None)
    if own is None or pruned.pruning is None:
        return gates
    kept = _kept_where_they_meet(pruned, assignment)
    gates = _gates(own, assignment)
    if _is_pruned_whole(pruned.pruning, assignment):
        gates = _least(gates, kept)
    return gates * kept


def _sum(gates: BitArray) -> int:
    return sum(gates.tolist()) if gates.size <= _FEW else int(gates.sum())


def _pairs(first: BitArray, second: BitArray) -> tuple[tuple[int, int, int], ...]:
    if first.size == 1 and second.size == 1:
        return _single(first.item(), second.item())
    if second.size == 1:
        other = second.item()
        numbers = np.bincount(first.ravel()).tolist()
        return tuple((count, bits, other) for bits, count in enumerate(numbers) if count)
    sizes = zip(first.shape[::-1], second.shape[::-1], strict=False)
    if all(1 in pair for pair in sizes):
        return _all_pairs(first, second)
    counts = np.bincount((first * _RADIX + second).ravel())
    codes = np.flatnonzero(counts)
    found = zip(counts[codes].tolist(), codes.tolist(), strict=True)
    return tuple((count, code // _RADIX, code % _RADIX) for count, code in found)


def _all_pairs(first: BitArray, second: BitArray) -> tuple[tuple[int, int, int], ...]:
    """Every gate of one meets every gate of the other: counted without laying out the pairs."""
    rows, columns = (np.bincount(gates.ravel()).tolist() for gates in (first, second))
    return tuple(
        (n * m, bits, other)
        for bits, n in enumerate(rows)
        for other, m in enumerate(columns)
        if n and m
    )


@lru_cache(maxsize=1024)
def _single(first: int, second: int) -> tuple[tuple[int, int, int], ...]:
    return ((1, first, second),)
