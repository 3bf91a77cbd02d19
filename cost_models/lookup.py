"""Costs of many nodes at once, for nodes whose quantizers have one gate each.

What such a node costs depends on the bits of one or two quantizers, so there are few cases. Each is
computed by the cost models when it first occurs and looked up from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from cgmq_fx.cost_models.bits import BitArray, NodeBits, node_bits
from cgmq_fx.cost_models.facts import GraphFacts

Places: TypeAlias = npt.NDArray[np.intp]
Costs: TypeAlias = npt.NDArray[np.float64]
Flags: TypeAlias = npt.NDArray[np.bool_]


class Lookup:
    """A table per node over the bits of its quantizers, filled as they occur.

    Args:
        graph: The facts of the graph.
        evaluate: The cost of node number `i` with some bits, one number per constraint.
        constraints: How many that are.

    Attributes:
        nodes: The nodes that are looked up, by number.
        complete: Shape (quantizers,): whether all nodes that a quantizer decides are looked up.
        tensors: The tensors on the grid of a quantizer with one gate, by number.
    """

    def __init__(
        self,
        graph: GraphFacts,
        evaluate: Callable[[int, NodeBits], Sequence[float]],
        constraints: int,
    ) -> None:
        self._graph, self._evaluate = graph, evaluate
        self._names = list(graph.quantizers)
        quantizers = graph.quantizers.values()
        single = {q.name: i for i, q in enumerate(quantizers) if q.gates == 1}
        decided = {
            number: [single[name] for name in names]
            for number, node in enumerate(graph.nodes)
            if 0 < len(names := dict.fromkeys(node.quantizers)) <= 2
            and names.keys() <= single.keys()
        }
        self.nodes: Places = np.array(list(decided), dtype=np.intp)
        nobody = len(self._names)
        pairs = np.array([(*own, nobody)[:2] for own in decided.values()], dtype=np.intp)
        self._pairs: Places = pairs.reshape(-1, 2).T
        self.complete: Flags = np.array(
            [n in single and all(i in decided for i in graph.readers[n]) for n in self._names]
        )
        self._widths = np.unique([b for q in quantizers for b in q.bit_widths])
        self._place = np.zeros(int(self._widths[-1]) + 1, dtype=np.intp)
        self._place[self._widths] = np.arange(self._widths.size)
        held = [
            (number, tensor.elements, single[tensor.quantizer])
            for number, tensor in enumerate(graph.tensors)
            if tensor.quantizer in single
        ]
        columns = np.array(held, dtype=np.int64).reshape(-1, 3).T
        self.tensors: Places = columns[0]
        self._elements, self._holder = columns[1:]
        shape = (self.nodes.size, self._widths.size, self._widths.size)
        self._costs: Costs = np.zeros((*shape, constraints))
        self._bits = np.full(shape, None, dtype=object)
        self._known: Flags = np.zeros(shape, dtype=np.bool_)
        slots, rows = np.nonzero(self._pairs < nobody)
        self._readings = rows, slots, self._pairs[slots, rows]

    def at(self, bits: BitArray) -> tuple[Costs, npt.NDArray[np.object_]]:
        """Costs, shape (constraints, nodes), and the `NodeBits` of the nodes.

        Args:
            bits: Shape (quantizers,): bits of those with one gate; other entries are ignored.
        """
        first, second = self._places(bits)[self._pairs]
        where = self._filled(np.arange(self.nodes.size), first, second)
        return self._costs[where].T, self._bits[where]

    def tensor_bits(self, bits: BitArray) -> BitArray:
        """Total bits of `tensors`; `bits` as for `at`."""
        total: BitArray = self._elements * bits[self._holder]
        return total

    def changes(self, bits: BitArray, moved: BitArray) -> Costs:
        """By how much costs change if one quantizer moves alone, for each of them.

        Args:
            bits: Shape (quantizers,), as for `at`.
            moved: Likewise, the bits after the move.

        Returns:
            Shape (constraints, quantizers), summed over the nodes that are looked up.
        """
        rows, slots, owner = self._readings
        before, after = self._places(bits), self._places(moved)
        first, second = before[self._pairs[:, rows]]
        here = self._filled(rows, first, second)
        target = after[owner]
        there = self._filled(
            rows, np.where(slots == 0, target, first), np.where(slots == 1, target, second)
        )
        change = (self._costs[there] - self._costs[here]).T
        sums = [np.bincount(owner, row, len(self._names)) for row in change]
        return np.array(sums, dtype=np.float64)  # of nothing, they would be whole numbers

    def _places(self, bits: BitArray) -> Places:
        """Where bits stand in the tables; at the end, a place for no quantizer."""
        return np.append(self._place[bits], 0)

    def _filled(self, rows: Places, first: Places, second: Places) -> tuple[Places, Places, Places]:
        """An index into the tables whose entries are known."""
        for k in np.flatnonzero(~self._known[rows, first, second]):
            place = (int(rows[k]), int(first[k]), int(second[k]))
            number = int(self.nodes[place[0]])
            given = {
                self._names[q]: self._widths[[p]]
                for q, p in zip(self._pairs[:, place[0]], place[1:], strict=True)
                if q < len(self._names)
            }
            self._bits[place] = node_bits(self._graph.nodes[number], given)
            self._costs[place] = self._evaluate(number, self._bits[place])
            self._known[place] = True
        return rows, first, second
