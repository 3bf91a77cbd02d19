"""The running account of a budget: what every constraint costs under the current bits.

After a gate moves, only the nodes that read its quantizer are computed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import fsum

import numpy as np

from cgmq_fx.cost_models.bits import Assignment, BitArray, NodeBits, node_bits
from cgmq_fx.cost_models.constraint import Budget, Constraint, ConstraintState
from cgmq_fx.cost_models.facts import FLOAT_BITS, GraphFacts


def uniform_bits(graph: GraphFacts, bits: int) -> dict[str, BitArray]:
    """The assignment that gives every gate of every quantizer the same bits."""
    return {name: np.full(q.gates, bits) for name, q in graph.quantizers.items()}


def lowest_bits(graph: GraphFacts) -> dict[str, BitArray]:
    """The assignment with every gate at the smallest bit-width that it may take."""
    return {name: np.full(q.gates, q.bit_widths[0]) for name, q in graph.quantizers.items()}


def highest_bits(graph: GraphFacts) -> dict[str, BitArray]:
    """The assignment with every gate at the largest bit-width that it may take."""
    return {name: np.full(q.gates, q.bit_widths[-1]) for name, q in graph.quantizers.items()}


class Ledger:
    """The cost of every constraint of a budget, kept up to date as bits change.

    Args:
        graph: The facts of the graph.
        budget: The constraints.
        assignment: The bits to start from, for every quantizer of the graph.
    """

    def __init__(self, graph: GraphFacts, budget: Budget, assignment: Assignment) -> None:
        self.graph = graph
        self.budget = budget
        self._bits = dict(assignment)
        self._nodes = [node_bits(node, self._bits) for node in graph.nodes]
        self._costs = [self._per_node(c, range(len(graph.nodes)), self._nodes) for c in budget]
        self._totals = tuple(self._total(c, self._costs[c], self._nodes) for c in self._range)
        full = uniform_bits(graph, FLOAT_BITS)
        nodes = [node_bits(node, full) for node in graph.nodes]
        self.references = tuple(c.model.graph_cost(graph, nodes) for c in budget)
        self.limits = tuple(c.bound.limit(r) for c, r in zip(budget, self.references, strict=True))

    @property
    def assignment(self) -> Assignment:
        """The current bits; not to be written to."""
        return self._bits

    @property
    def totals(self) -> tuple[float, ...]:
        """The cost of every constraint, in the order of the budget."""
        return self._totals

    @property
    def violated(self) -> tuple[int, ...]:
        """Indices of the constraints that do not hold."""
        return tuple(i for i in self._range if self._totals[i] > self.limits[i])

    @property
    def satisfied(self) -> bool:
        """Whether every constraint holds."""
        return self.fits(self._totals)

    def fits(self, totals: Sequence[float]) -> bool:
        """Whether `totals` satisfies every constraint."""
        return all(t <= limit for t, limit in zip(totals, self.limits, strict=True))

    def states(self) -> tuple[ConstraintState, ...]:
        """A measurement of every constraint."""
        rows = zip(self.budget, self._totals, self.limits, self.references, strict=True)
        return tuple(ConstraintState(c, v, lim, ref) for c, v, lim, ref in rows)

    def node_costs(self, index: int) -> tuple[float, ...]:
        """The cost of every node under constraint number `index`."""
        return tuple(self._costs[index])

    def trial(self, name: str, bits: BitArray) -> tuple[float, ...]:
        """What the totals would be if quantizer `name` had `bits`; nothing is changed."""
        changed = self._changed(name, bits)
        return tuple(self._trial_total(c, changed) for c in self._range)

    def move(self, name: str, bits: BitArray) -> None:
        """Give quantizer `name` new bits (one entry per gate)."""
        changed = self._changed(name, bits)
        self._bits[name] = bits
        for index, node in changed.items():
            self._nodes[index] = node
        for c, constraint in enumerate(self.budget):
            costs = self._per_node(constraint, changed, self._nodes)
            for index, cost in zip(changed, costs, strict=True):
                self._costs[c][index] = cost
        self._totals = tuple(self._total(c, self._costs[c], self._nodes) for c in self._range)

    @property
    def _range(self) -> range:
        return range(len(self.budget))

    def _changed(self, name: str, bits: BitArray) -> dict[int, NodeBits]:
        before, self._bits[name] = self._bits[name], bits
        try:
            return {i: node_bits(self.graph.nodes[i], self._bits) for i in self.graph.readers[name]}
        finally:
            self._bits[name] = before

    def _per_node(
        self, constraint: Constraint, indices: Iterable[int], nodes: Sequence[NodeBits]
    ) -> list[float]:
        return [constraint.model.node_cost(self.graph.nodes[i], nodes[i]) for i in indices]

    def _total(self, index: int, costs: Sequence[float], nodes: Sequence[NodeBits]) -> float:
        model = self.budget.constraints[index].model
        return fsum(costs) if model.additive else model.graph_cost(self.graph, nodes)

    def _trial_total(self, index: int, changed: dict[int, NodeBits]) -> float:
        model = self.budget.constraints[index].model
        if model.additive:
            costs = list(self._costs[index])
            for i, node in changed.items():
                costs[i] = model.node_cost(self.graph.nodes[i], node)
            return fsum(costs)
        nodes = list(self._nodes)
        for i, node in changed.items():
            nodes[i] = node
        return model.graph_cost(self.graph, nodes)
