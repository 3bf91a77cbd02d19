"""Checked before any training: that cost models keep their contract and bounds can be met."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from decimal import ROUND_CEILING, Context, Decimal
from itertools import compress
from math import inf, isfinite, nextafter
from typing import Any

import numpy as np

from cgmq_fx.cost_models.asking import cost_of_graph, parts_of_graph
from cgmq_fx.cost_models.bits import Assignment, BitArray, GraphBits, graph_bits
from cgmq_fx.cost_models.constraint import Budget, ConstraintState
from cgmq_fx.cost_models.errors import CostModelError, InfeasibleBudgetError
from cgmq_fx.cost_models.facts import CONVENTION, GraphFacts
from cgmq_fx.cost_models.ledger import Ledger, highest_bits, inside_scope, lowest_bits
from cgmq_fx.cost_models.model import CostModel

_DOMINANT = 3
_SHARE_PLACES, _SHARE_DIGITS, _DIGITS = 6, 4, 6
"""A least share is given to a ten-thousandth of a per cent, or four digits if that is finer; a
least amount as a whole number, or in six digits."""

_WIDE = Context(prec=400)
_SHARE = 100
"""Up to here a bound without a unit may have been meant as per cent."""


def check_cost_models(graph: GraphFacts, budget: Budget) -> None:
    """Check that every cost model of `budget` is finite, not negative and monotone on `graph`.

    Every quantizer is raised level by level, once with all others at their lowest bits and once
    with all others at their highest.

    Raises:
        CostModelError: With the two assignments that prove the violation; or if a model has a
            `graph_cost` that nothing calls.
    """
    for model in (constraint.model for constraint in budget):
        if model.additive and type(model).graph_cost is not CostModel.graph_cost:
            raise CostModelError(
                f"the cost model {model.name!r} defines `graph_cost`, which only counts with "
                "`additive = False` in the class; else the cost is the sum of `node_cost`"
            )
    for others in (lowest_bits(graph), highest_bits(graph)):
        ledger = Ledger(graph, budget, others)
        for constraint, reference in zip(budget, ledger.references, strict=True):
            base = constraint.bound.base
            _check_value(constraint.model, reference, f"with everything at {base} bits")
        _check_values(ledger, ledger.totals, "with every gate at the same end of its bit-widths")
        for name in graph.quantizers:
            _check_quantizer(ledger, name)
        _check_repeatable(ledger, Ledger(graph, budget, others))


def check_feasible(graph: GraphFacts, budget: Budget) -> None:
    """Check that the smallest bit-widths satisfy `budget`.

    Costs are monotone, so if the smallest do not satisfy it, nothing does.

    Raises:
        InfeasibleBudgetError: Naming each constraint that cannot hold, the least reachable cost
            and the layers that dominate it.
    """
    ledger = Ledger(graph, budget, lowest_bits(graph))
    if ledger.satisfied:
        return
    lines = [_infeasible(ledger, index) for index in ledger.violated]
    raise InfeasibleBudgetError(
        "the budget cannot be met, whatever the training does: "
        + "; ".join(lines)
        + f". {_advice(ledger)}; `explain` shows what every bound leaves. (Counting: {CONVENTION})"
    )


def relevance(graph: GraphFacts, budget: Budget) -> dict[str, tuple[bool, ...]]:
    """For every quantizer, whether each constraint's cost depends on its bits.

    A quantizer is relevant when lowering it from its highest to its lowest bits changes the cost
    with all others at their highest or at their lowest bits. That would miss two tensors that set a
    peak together but neither of them alone: for a cost that is no sum over nodes, everything that
    it reads is relevant.
    """
    ends = (lowest_bits(graph), highest_bits(graph))
    relevant = {name: np.zeros(len(budget), dtype=bool) for name in graph.quantizers}
    for others in ends:
        ledger = Ledger(graph, budget, others)
        for name in graph.quantizers:
            low, high = (np.array(ledger.trial(name, end[name])) for end in ends)
            relevant[name] |= high != low
    for index, constraint in enumerate(budget):
        if not constraint.model.additive:
            bits = _Watched(graph_bits(graph, ends[1]))
            cost_of_graph(constraint.model, graph, bits)
            for name, flags in relevant.items():
                flags[index] |= bits.reads(graph, name)
    return {name: tuple(bool(r) for r in flags) for name, flags in relevant.items()}


class _Watched(GraphBits):
    """The bits of a graph, and which of them a cost model has read."""

    __slots__ = ("_read",)
    _read: set[str]

    def __init__(self, bits: GraphBits) -> None:
        object.__setattr__(self, "_read", set())
        super().__init__(bits.nodes, bits.tensors)

    def __getattribute__(self, name: str) -> Any:
        if name in ("nodes", "tensors"):
            self._read.add(name)
        return super().__getattribute__(name)

    def reads(self, graph: GraphFacts, quantizer: str) -> bool:
        """Whether anything has been read that the bits of a quantizer change."""
        return ("tensors" in self._read and bool(graph.holders[quantizer])) or (
            "nodes" in self._read and bool(graph.readers[quantizer])
        )


def _check_quantizer(ledger: Ledger, name: str) -> None:
    before, before_bits = None, None
    for bits in _levels(ledger.graph, name):
        totals = ledger.trial(name, bits)
        _check_values(ledger, totals, f"with {name} at {bits[0]} bits")
        for i, constraint in enumerate(ledger.budget):
            if before is not None and before_bits is not None and totals[i] < before[i]:
                raise CostModelError(
                    f"the cost model {constraint.model.name!r} falls from {before[i]:g} to "
                    f"{totals[i]:g} {constraint.model.unit} when {name} goes from "
                    f"{before_bits[0]} to {bits[0]} bits and all others stay "
                    f"({_others(ledger.assignment, name)}); "
                    "a cost must never be lower for more bits"
                )
        before, before_bits = totals, bits


def _check_repeatable(first: Ledger, second: Ledger) -> None:
    """The same bits cost the same again, after other bits were evaluated in between."""
    rows = zip(first.budget, first.totals, second.totals, strict=True)
    for constraint, before, after in rows:
        if before != after:
            raise CostModelError(
                f"the cost model {constraint.model.name!r} gives {before!r} and then {after!r} for "
                "the same bits; a cost must not depend on hidden state"
            )


def _levels(graph: GraphFacts, name: str) -> Iterator[BitArray]:
    facts = graph.quantizers[name]
    return (np.full(facts.gates, bits) for bits in facts.bit_widths)


def _others(assignment: Assignment, name: str) -> str:
    shown = [f"{n}: {b.flat[0]} bits" for n, b in assignment.items() if n != name]
    return ", ".join(shown[:_DOMINANT]) + (", ..." if len(shown) > _DOMINANT else "")


def _check_values(ledger: Ledger, totals: tuple[float, ...], where: str) -> None:
    for constraint, total in zip(ledger.budget, totals, strict=True):
        _check_value(constraint.model, total, where)


def _check_value(model: CostModel, total: float, where: str) -> None:
    if not isfinite(total) or total < 0:
        raise CostModelError(
            f"the cost model {model.name!r} gives {total} {where}; "
            "a cost must be finite and not negative"
        )


def dominating(ledger: Ledger, index: int) -> str:
    """What a constraint's cost is mostly made of, as text: "conv1 (75%), fc (12%)"."""
    parts = _parts(ledger, index)
    total = sum(parts.values()) or 1.0
    return ", ".join(f"{name} ({parts[name] / total:.0%})" for name in _largest(parts))


def _parts(ledger: Ledger, index: int) -> dict[str, float]:
    """What a constraint's cost is made of, by name."""
    constraint, bits = ledger.budget.constraints[index], graph_bits(ledger.graph, ledger.assignment)
    inside = inside_scope(ledger.graph, constraint)
    graph = replace(ledger.graph, nodes=tuple(compress(ledger.graph.nodes, inside)))
    bits = GraphBits(list(compress(bits.nodes, inside)), bits.tensors)
    return parts_of_graph(constraint.model, graph, bits)


def _largest(parts: Mapping[str, float]) -> list[str]:
    return sorted(parts, key=lambda name: -parts[name])[:_DOMINANT]


def _without_gates(graph: GraphFacts, parts: Mapping[str, float]) -> list[str]:
    """Parts of a cost that no gate can lower: layers and tensors without a quantizer."""
    gates: dict[str, bool] = {}
    for node in graph.nodes:
        name = node.title
        gates[name] = gates.get(name, False) or any(node.quantizers)
    gates |= {t.name: t.quantizer is not None for t in graph.tensors if t.name not in gates}
    return [name for name, cost in parts.items() if cost > 0 and not gates.get(name, True)]


def _staying(ledger: Ledger, index: int) -> str:
    """Which of the parts that dominate a cost have no gate, as text."""
    parts = _parts(ledger, index)
    fixed = set(_without_gates(ledger.graph, parts)).intersection(_largest(parts))
    named = [name for name in _largest(parts) if name in fixed]
    if not named:
        return ""
    verbs = ("has", "stays as it is") if len(named) == 1 else ("have", "stay as they are")
    return f"; {', '.join(named)} {verbs[0]} no quantizer and {verbs[1]}"


def _advice(ledger: Ledger) -> str:
    """What can be done about the bounds that do not hold."""
    for index in ledger.violated:
        parts = _parts(ledger, index)
        if sum(parts[name] for name in _without_gates(ledger.graph, parts)) > ledger.limits[index]:
            return "What has no quantizer breaks the bound alone: raise it, or make that smaller"
    return "Allow smaller bit-widths (the scheme's bit_widths; 0 prunes) or raise the bound"


def _infeasible(ledger: Ledger, index: int) -> str:
    state = ledger.states()[index]
    constraint, hint = state.constraint, ""
    if not constraint.bound.relative and state.limit <= _SHARE <= state.value:
        share = f"{constraint.name} <= {state.limit:g}%"
        if state.limit < 1.0:
            share += f'" or "{constraint.name} <= {100 * state.limit:g}%'
        hint = f' (a share is written with a percent sign, as in "{share}")'
    return (
        f"{constraint} is asked for{hint}, but with every gate at its smallest bit-width it "
        f"is still {least(state)}, most of it in {dominating(ledger, index)}"
        f"{_staying(ledger, index)}"
    )


def least(state: ConstraintState) -> str:
    """The cost as a bound that it satisfies, rounded up to a readable number of digits."""
    bound = state.constraint.bound
    cost = state.relative if bound.relative else state.value
    exact, places = Decimal(repr(cost)), _SHARE_PLACES if bound.relative else 0
    digits = _SHARE_DIGITS if bound.relative else _DIGITS
    finest = min(-places, exact.adjusted() + 1 - digits)
    value = float(exact.quantize(Decimal(1).scaleb(finest), ROUND_CEILING, _WIDE))
    rounded = replace(bound, value=value)
    if rounded.limit(state.reference) < state.value:  # the share itself was rounded down
        rounded = replace(bound, value=nextafter(cost, inf))
    return str(replace(state.constraint, bound=rounded)).partition(" <= ")[2]
