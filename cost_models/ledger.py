"""The running account of a budget: what every constraint costs under the current bits.

After a gate moves, only the nodes that read its quantizer are computed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import accumulate
from math import fsum, isfinite

import numpy as np
import numpy.typing as npt

from cgmq_fx.cost_models.asking import cost_of_graph, cost_of_node
from cgmq_fx.cost_models.bits import (
    Assignment,
    BitArray,
    GraphBits,
    NodeBits,
    graph_bits,
    node_bits,
    reference_bits,
    tensor_bits,
)
from cgmq_fx.cost_models.constraint import Budget, Constraint, ConstraintState
from cgmq_fx.cost_models.errors import BudgetError
from cgmq_fx.cost_models.facts import GraphFacts
from cgmq_fx.cost_models.lookup import Costs, Lookup

_LISTED = 20
"""How many layers a message lists."""


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
        self._flat, self._starts, self._bits = _flattened(graph, assignment)
        self._inside = [inside_scope(graph, c) for c in budget]
        state = graph_bits(graph, self._bits)
        self._nodes, self._tensors = _objects(state.nodes), state.tensors
        numbers = range(len(graph.nodes))
        self._costs = [self._per_node(i, numbers, state.nodes) for i in self._range]
        self._totals = tuple(self._total(i, self._costs[i], state) for i in self._range)
        self._parts: list[list[float] | None] = [None] * len(budget)
        self.references = self._references()
        self.limits = tuple(c.bound.limit(r) for c, r in zip(budget, self.references, strict=True))

    @property
    def assignment(self) -> Assignment:
        """The current bits, which change with the ledger; not to be written to."""
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
        changes = {name: bits}
        changed = self._changed(changes)
        return self._totals_after(changed, self._moves(changed), self._tensors_after(changes))

    def change(self, name: str, bits: BitArray) -> tuple[float, ...]:
        """By how much the totals would change if quantizer `name` had `bits`.

        The same as `trial` less the totals, but for a sum over nodes without adding up all of them.
        """
        changed = self._changed({name: bits})
        found, state = [], None
        for c, constraint in enumerate(self.budget):
            if constraint.model.additive:
                before = fsum(self._costs[c][i] for i in changed)
                found.append(fsum(self._per_node(c, changed, changed)) - before)
                continue
            if state is None:
                state = self._state(changed, self._tensors_after({name: bits}))
            found.append(cost_of_graph(constraint.model, self.graph, state) - self._totals[c])
        return tuple(found)

    def move(self, name: str, bits: BitArray) -> None:
        """Give quantizer `name` new bits (one entry per gate)."""
        self.update({name: bits})

    def update(self, changes: Assignment) -> None:
        """Give several quantizers new bits (one entry per gate)."""
        changed = self._changed(changes)
        moves = self._moves(changed)
        self._tensors = self._tensors_after(changes)
        self._totals = self._totals_after(changed, moves, self._tensors)
        for c, costs in enumerate(moves):
            self._parts[c] = self._parts_after(c, costs)
            for index, cost in costs.items():
                self._costs[c][index] = cost
        for name, bits in changes.items():
            self._bits[name][:] = bits
        for index, node in changed.items():
            self._nodes[index] = node

    def assign(self, bits: BitArray) -> None:
        """Give every gate its bits: the same as `update`, fast where most quantizers change.

        Args:
            bits: One entry per gate, in the order of the graph's quantizers; each is one of the
                bit-widths that the quantizer may take.
        """
        moved = np.logical_or.reduceat(bits != self._flat, self._starts)
        self._flat[:] = bits
        table, others = self._lookup, moved & ~self._lookup.complete
        names = list(self.graph.quantizers) if others.any() else []
        changes = {names[i]: self._bits[names[i]] for i in np.flatnonzero(others)}
        single, rows = bits[self._starts], np.array(self._costs)
        rows[:, table.nodes], self._nodes[table.nodes] = table.at(single)
        for index, node in self._changed(changes).items():
            self._nodes[index] = node
            rows[:, index] = self._costs_of(index, node)
        self._tensors = self._tensors_after(changes).copy()
        self._tensors[table.tensors] = table.tensor_bits(single)
        self._costs = rows.tolist()
        self._parts = [None] * len(self._parts)
        state = None if self.additive else self._state({}, self._tensors)
        self._totals = tuple(self._total(i, self._costs[i], state) for i in self._range)

    def alone(self, bits: BitArray) -> Costs:
        """By how much the totals would change if one quantizer alone moved, for each of them.

        Args:
            bits: Shape (quantizers,): where each would move to, in the order of the graph.

        Returns:
            Shape (constraints, quantizers); not a number where a cost is no sum over nodes, and for
            quantizers with several gates or that meet such: for these, see `change`.
        """
        table = self._lookup
        found = table.changes(self._flat[self._starts], bits)
        found[:, ~table.complete] = np.nan
        found[[not c.model.additive for c in self.budget]] = np.nan
        return found

    @cached_property
    def _lookup(self) -> Lookup:
        return Lookup(self.graph, self._costs_of, len(self.budget))

    def _costs_of(self, index: int, node: NodeBits) -> list[float]:
        return [self._per_node(c, [index], {index: node})[0] for c in self._range]

    @property
    def additive(self) -> bool:
        """Whether every cost is a sum over nodes."""
        return all(c.model.additive for c in self.budget)

    @property
    def _range(self) -> range:
        return range(len(self.budget))

    def _changed(self, changes: Assignment) -> dict[int, NodeBits]:
        """The bits of the nodes that read some quantizers, if they had the bits of `changes`."""
        before = {name: self._bits[name] for name in changes}
        self._bits.update(changes)
        try:
            indices = dict.fromkeys(i for name in changes for i in self.graph.readers[name])
            return {i: node_bits(self.graph.nodes[i], self._bits) for i in indices}
        finally:
            self._bits.update(before)

    def _tensors_after(self, changes: Assignment) -> BitArray:
        holders = [i for name in changes for i in self.graph.holders[name]]
        if not holders:
            return self._tensors
        tensors = self._tensors.copy()
        for index in holders:
            tensors[index] = tensor_bits(self.graph.tensors[index], changes)
        return tensors

    def _moves(self, changed: dict[int, NodeBits]) -> list[dict[int, float]]:
        """For every constraint, what nodes cost with other bits."""
        return [
            dict(zip(changed, self._per_node(c, changed, changed), strict=True))
            for c in self._range
        ]

    def _totals_after(
        self, changed: dict[int, NodeBits], moves: list[dict[int, float]], tensors: BitArray
    ) -> tuple[float, ...]:
        """The totals with some nodes changed: as exact as if all were added up anew."""
        totals, state = [], None
        for c, constraint in enumerate(self.budget):
            if constraint.model.additive:
                totals.append(fsum(self._summands(c, moves[c])))
                continue
            if state is None:
                state = self._state(changed, tensors)
            totals.append(cost_of_graph(constraint.model, self.graph, state))
        return tuple(totals)

    def _summands(self, c: int, moves: dict[int, float]) -> list[float]:
        """Numbers that add up to the total with some nodes changed, few where that is possible."""
        costs, parts = self._costs[c], self._parts[c]
        if parts is None:
            parts = self._parts[c] = _parts(costs)
        if not parts:
            return [moves.get(i, cost) for i, cost in enumerate(costs)]
        return [*parts, *moves.values(), *(-costs[i] for i in moves)]

    def _parts_after(self, c: int, moves: dict[int, float]) -> list[float] | None:
        additive = self.budget.constraints[c].model.additive
        return _parts(self._summands(c, moves)) or None if additive else None

    def _state(self, changed: dict[int, NodeBits], tensors: BitArray) -> GraphBits:
        nodes = self._nodes.tolist()
        for index, node in changed.items():
            nodes[index] = node
        return GraphBits(nodes, tensors)

    def _per_node(
        self, c: int, indices: Iterable[int], nodes: Sequence[NodeBits] | dict[int, NodeBits]
    ) -> list[float]:
        model, inside = self.budget.constraints[c].model, self._inside[c]
        facts = self.graph.nodes
        return [cost_of_node(model, facts[i], nodes[i]) if inside[i] else 0.0 for i in indices]

    def _total(self, c: int, costs: Sequence[float], state: GraphBits | None) -> float:
        model = self.budget.constraints[c].model
        if model.additive or state is None:
            return fsum(costs)
        return cost_of_graph(model, self.graph, state)

    def _uniform(self, bits: int) -> GraphBits:
        """The state with every quantizer at `bits`, see `reference_bits`."""
        found: GraphBits | None = self.graph.memo.get(("uniform", bits))
        if found is None:
            found = reference_bits(self.graph, bits)
            self.graph.memo["uniform", bits] = found
        return found

    def _references(self) -> tuple[float, ...]:
        """The cost of every constraint at its bound's base, where the bound does not know it."""
        bounds, indices = [c.bound for c in self.budget], range(len(self.graph.nodes))
        unknown = {b.base for b in bounds if b.reference is None}
        bases = {base: self._uniform(base) for base in unknown}
        found = []
        for c, bound in enumerate(bounds):
            if bound.reference is None:
                base = bases[bound.base]
                found.append(self._total(c, self._per_node(c, indices, base.nodes), base))
            else:
                found.append(bound.reference)
        return tuple(found)


def _parts(numbers: Sequence[float]) -> list[float]:
    """Few numbers with exactly the same sum (Shewchuk, 1997); none where that is not finite or 0.

    `fsum` rounds once, at the end, so what it leaves out can be asked for again.
    """
    found: list[float] = []
    rest = fsum(numbers)
    while rest and isfinite(rest):
        found.append(rest)
        rest = fsum([*numbers, *(-part for part in found)])
    return found


def _objects(nodes: Sequence[NodeBits]) -> npt.NDArray[np.object_]:
    """An array of objects, of which several can be replaced at once."""
    array = np.empty(len(nodes), dtype=object)
    array[:] = nodes
    return array


def _flattened(
    graph: GraphFacts, assignment: Assignment
) -> tuple[BitArray, BitArray, dict[str, BitArray]]:
    """The bits of all quantizers in one array, where each one's start, and views of it by name."""
    sizes = [assignment[name].size for name in graph.quantizers]
    starts = np.array([0, *accumulate(sizes)], dtype=np.int64)
    flat = np.zeros(starts[-1], dtype=np.int64)
    views = {}
    for name, start, size in zip(graph.quantizers, starts.tolist(), sizes, strict=False):
        views[name] = flat[start : start + size]
        views[name][:] = assignment[name]
    return flat, starts[:-1], views


def inside_scope(graph: GraphFacts, constraint: Constraint) -> tuple[bool, ...]:
    """For every node, whether a constraint counts it.

    Raises:
        BudgetError: If the constraint's scope matches no node, or its cost cannot be scoped.
    """
    scope = constraint.scope
    if scope is None:
        return (True,) * len(graph.nodes)
    if not constraint.model.additive:
        raise BudgetError(
            f"{constraint.model.name!r} is no sum over nodes, so it cannot be bounded for "
            f"{scope!r} alone; bound it for the whole model"
        )
    inside = tuple(
        any(fnmatchcase(name, scope) for name in (node.module, node.name)) for node in graph.nodes
    )
    if not any(inside):
        raise BudgetError(f"no layer matches {scope!r}; {_layers(graph, scope)}")
    return inside


def _layers(graph: GraphFacts, scope: str) -> str:
    """Which layers there are, in words: what may have been meant, then the first ones."""
    known = list(dict.fromkeys(node.title for node in graph.nodes))
    within = [f"{scope}.*"] if any(name.startswith(f"{scope}.") for name in known) else []
    close = within or get_close_matches(scope, known, 1)
    hint = f"did you mean {close[0]!r}? There" if close else "there"
    more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return f"{hint} are {', '.join(known[:_LISTED])}{more}"
