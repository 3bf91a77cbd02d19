"""Verification: the cost of a finished graph, counted from the graph alone.

Nothing here reads what the controller believes. Bits are read from the quantizers that stand in the
graph, shapes come from running it on fake tensors, and an operand without a quantizer is float.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import GraphModule

from cgmq_fx.cost_models import (
    CONVENTION,
    Arena,
    ArenaPlan,
    Assignment,
    Budget,
    ConstraintState,
    GraphFacts,
    Ledger,
    NodeFacts,
    graph_bits,
    node_bits,
)
from cgmq_fx.cost_models.errors import BoundError
from cgmq_fx.cost_models.tables import TableModel
from cgmq_fx.passes.annotate import annotate
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.freeze import read_bits
from cgmq_fx.passes.shapes import CompareBatches, PropagateShapes


@dataclass(frozen=True)
class CostReport:
    """What a graph costs.

    Attributes:
        states: Every constraint: bound, value, satisfied.
        facts: The facts that the costs were computed from.
        assignment: The bits of every quantizer.
        per_node: For every constraint, the cost of each of `facts.nodes`.
        convention: How things were counted.
    """

    states: tuple[ConstraintState, ...]
    facts: GraphFacts
    assignment: Assignment
    per_node: tuple[tuple[float, ...], ...]
    convention: str = CONVENTION

    @property
    def satisfied(self) -> bool:
        """Whether every constraint holds."""
        return all(state.satisfied for state in self.states)

    @property
    def nodes(self) -> tuple[NodeFacts, ...]:
        """The facts of every node that costs something."""
        return self.facts.nodes

    def arena(self) -> ArenaPlan:
        """Where an offset planner puts every activation: name, offset, size, lifetime."""
        return Arena().plan(self.facts, graph_bits(self.facts, self.assignment))

    def rounded_up(self) -> tuple[str, ...]:
        """What a target cannot run and is billed as something wider, one line per layer."""
        lines = []
        for state in self.states:
            model = state.constraint.model
            if isinstance(model, TableModel):
                lines += [line for n in self.nodes for line in _rounded_up(model, n, self)]
        return tuple(dict.fromkeys(lines))

    @property
    def references(self) -> dict[str, float]:
        """What relative bounds refer to, by `Constraint.base`."""
        return {s.constraint.base: s.reference for s in self.states if s.constraint.bound.relative}

    def __getitem__(self, name: str) -> ConstraintState:
        """The first constraint on a cost: "bops" is the whole model's, "bops[head]" a part's.

        Raises:
            KeyError: If the budget does not bound that cost.
        """
        for state in self.states:
            if state.constraint.name == name:
                return state
        bounded = ", ".join(state.constraint.name for state in self.states)
        raise KeyError(f"{name}; the budget bounds {bounded}")

    def __contains__(self, name: object) -> bool:
        return any(state.constraint.name == name for state in self.states)

    def __iter__(self) -> Iterator[ConstraintState]:
        return iter(self.states)

    def __str__(self) -> str:
        return ", ".join(map(str, self.states))


def _rounded_up(model: TableModel, node: NodeFacts, report: CostReport) -> list[str]:
    lines = []
    for _, weight, activation in node_bits(node, report.assignment).pairs:
        row = model.runs_as(node, weight, activation)
        if row is not None and (row.weight, row.activation) != (weight, activation):
            layer = f"{node.title} ({weight}x{activation} bits)"
            lines.append(f"{model.target.name} runs {layer} as {row.weight}x{row.activation}")
    return lines


def count(
    module: GraphModule, inputs: ExampleInputs, budget: Budget, trusted: bool = True
) -> CostReport:
    """Count what a graph costs, from nothing but the graph.

    Args:
        module: A graph with quantizers, frozen or not.
        inputs: Example inputs to take shapes from.
        budget: The constraints to measure.
        trusted: Whether the graph is this library's work, and not what a file says.

    Returns:
        The cost of every constraint and of every node.
    """
    PropagateShapes(inputs, trusted).run(module)
    CompareBatches(inputs.twice, trusted).run(module)
    facts = annotate(module, inputs.batch or 1)
    ledger = Ledger(facts, budget, read_bits(module))
    per_node = tuple(ledger.node_costs(i) for i in range(len(budget)))
    return CostReport(ledger.states(), facts, dict(ledger.assignment), per_node)


def verify(
    module: GraphModule, inputs: ExampleInputs, budget: Budget, trusted: bool = True
) -> CostReport:
    """Count, and insist that every constraint holds; arguments as of `count`.

    Raises:
        BoundError: Naming every constraint that does not hold.
    """
    report = count(module, inputs, budget, trusted)
    if not report.satisfied:
        broken = ", ".join(str(state) for state in report.states if not state.satisfied)
        raise BoundError(f"the finished graph does not satisfy its budget: {broken}")
    return report
