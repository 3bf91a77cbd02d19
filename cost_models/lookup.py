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
        cases = self._widths.size**2
        self._first: Places = np.arange(self.nodes.size) * cases  # where the cases of a node start
        self._costs: Costs = np.zeros((self.nodes.size * cases, constraints))
        self._bits = np.full(self.nodes.size * cases, None, dtype=object)
        self._known: Flags = np.zeros(self.nodes.size * cases, dtype=np.bool_)
        slots, rows = np.nonzero(self._pairs < nobody)
        steps = np.where(slots == 0, self._widths.size, 1)
        self._readings = rows, self._pairs[slots, rows], steps

    def at(self, bits: BitArray) -> tuple[Costs, npt.NDArray[np.object_]]:
        """Costs, shape (constraints, nodes), and the `NodeBits` of the nodes.

        Args:
            bits: Shape (quantizers,): bits of those with one gate; other entries are ignored.
        """
        where = self._filled(self._cases(self._places(bits)))
        return self._costs.take(where, axis=0).T, self._bits.take(where)

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
        rows, owner, steps = self._readings
        before, after = self._places(bits), self._places(moved)
        here = self._filled(self._cases(before)).take(rows)
        there = self._filled(here + (after - before).take(owner) * steps)
        change = (self._costs.take(there, axis=0) - self._costs.take(here, axis=0)).T
        sums = [np.bincount(owner, row, len(self._names)) for row in change]
        return np.array(sums, dtype=np.float64)  # of nothing, they would be whole numbers

    def _places(self, bits: BitArray) -> Places:
        """Where bits stand in the tables; at the end, a place for no quantizer."""
        return np.append(self._place.take(bits), 0)

    def _cases(self, places: Places) -> Places:
        """Which case every node is in, as a row of the tables."""
        first, second = places.take(self._pairs)
        found: Places = self._first + first * self._widths.size + second
        return found

    def _filled(self, cases: Places) -> Places:
        """The same cases, all of them known."""
        for case in cases[~self._known.take(cases)].tolist():
            row, place = divmod(case, self._widths.size**2)
            given = {
                self._names[q]: self._widths[[p]]
                for q, p in zip(self._pairs[:, row], divmod(place, self._widths.size), strict=True)
                if q < len(self._names)
            }
            number = int(self.nodes[row])
            self._bits[case] = node_bits(self._graph.nodes[number], given)
            self._costs[case] = self._evaluate(number, self._bits[case])
            self._known[case] = True
        return cases
