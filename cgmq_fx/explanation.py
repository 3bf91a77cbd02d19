"""`explain`: what a budget asks of a model, before any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.export import ExportedProgram

from cgmq_fx.cost_models import (
    CONVENTION,
    BudgetLike,
    Constraint,
    Ledger,
    check_cost_models,
    highest_bits,
    lowest_bits,
    parse_budget,
    uniform_bits,
)
from cgmq_fx.cost_models.preflight import dominating
from cgmq_fx.data import example_inputs_of
from cgmq_fx.graphs import float_graph, quantized_graph
from cgmq_fx.passes.scheme import Scheme
from cgmq_fx.presets import TargetLike, deployment
from cgmq_fx.terminal import columns, escape, fitting, text_of, titled

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH = 120
_EXACT = 1e4
UNIFORM = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class ConstraintRange:
    """What one constraint can cost.

    Attributes:
        constraint: The constraint.
        limit: Its bound, in the unit of its cost model.
        floor: The cost with every gate at its smallest bit-width.
        ceiling: The cost with every gate at its largest.
        uniform: The cost with every gate at 2, 4 and 8 bits, by bits.
        dominated_by: What the floor is mostly made of.
    """

    constraint: Constraint
    limit: float
    floor: float
    ceiling: float
    uniform: dict[int, float]
    dominated_by: str

    @property
    def feasible(self) -> bool:
        """Whether some bit-widths satisfy this constraint."""
        return self.floor <= self.limit

    @property
    def free(self) -> bool:
        """Whether all bit-widths satisfy it: it asks for nothing."""
        return self.ceiling <= self.limit


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a budget asks of a model.

    Attributes:
        ranges: One entry per constraint.
        remarks: What is not counted, not quantized, or assumed.
    """

    ranges: tuple[ConstraintRange, ...]
    remarks: tuple[str, ...]

    @property
    def feasible(self) -> bool:
        """Whether some bit-widths satisfy all constraints at once.

        Costs never fall for more bits, so the smallest bit-widths are the cheapest for every
        constraint at the same time: constraints that can be met one by one can be met together.
        """
        return all(entry.feasible for entry in self.ranges)

    def as_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; costs in the units of their cost models."""
        return {
            "feasible": self.feasible,
            "constraints": [
                {
                    "constraint": str(entry.constraint),
                    "unit": entry.constraint.model.unit,
                    "limit": entry.limit,
                    "floor": entry.floor,
                    "ceiling": entry.ceiling,
                    "uniform": {str(bits): value for bits, value in entry.uniform.items()},
                    "feasible": entry.feasible,
                    "dominated_by": entry.dominated_by,
                }
                for entry in self.ranges
            ],
            "remarks": list(self.remarks),
            "convention": CONVENTION,
        }

    def __str__(self) -> str:
        width = columns(_WIDTH)
        table = fitting(self._table, [f"{bits} bits" for bits in UNIFORM])
        return text_of([table, *self._footer()], width)

    def _table(self, details: Sequence[str]) -> Table:
        table = titled("What the budget asks for")
        table.add_column("constraint", overflow="fold", min_width=16)
        for column in ("floor", *details, "ceiling"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("feasible")
        for entry in self.ranges:
            uniform = {f"{bits} bits": value for bits, value in entry.uniform.items()}
            values = [entry.floor, *(uniform[detail] for detail in details), entry.ceiling]
            verdict = "no" if not entry.feasible else "always" if entry.free else "yes"
            amounts = [_amount(entry, value) for value in values]
            table.add_row(escape(str(entry.constraint)), *amounts, verdict)
        return table

    def _footer(self) -> list[str]:
        if self.feasible:
            verdict = "feasible: the smallest bit-widths satisfy every constraint at once"
        else:
            broken = ", ".join(e.constraint.name for e in self.ranges if not e.feasible)
            verdict = f"infeasible: {broken} cannot be met with the allowed bit-widths"
        floors = [f"floor of {e.constraint.name}: {e.dominated_by}" for e in self.ranges]
        return [verdict, *floors, *self.remarks, f"({CONVENTION})"]


def explain(
    model: nn.Module | ExportedProgram,
    budget: BudgetLike,
    example_inputs: Any = None,
    *,
    scheme: Scheme | None = None,
    target: TargetLike | None = None,
) -> Explanation:
    """Say what a budget asks of a model, without training; print it for a table.

    Args:
        model: The model; it is not modified.
        budget: The bounds.
        example_inputs: As for `prepare`.
        scheme: Bit-widths and granularity.
        target: As for `prepare`: a preset, a chip, or both.

    Returns:
        For every constraint its floor, ceiling, uniform values and what dominates it.

    Raises:
        CgmqError: As for `prepare`, but an infeasible budget is explained, not raised.
    """
    where = deployment(target)
    chosen = where.scheme(scheme)
    parsed = parse_budget(budget, where.chip)
    inputs = example_inputs_of(model, example_inputs, None, supervised=False)
    captured = float_graph(model, inputs)
    where.preset.check_ops(captured)
    _, facts = quantized_graph(captured, chosen)
    check_cost_models(facts, parsed)
    floor = Ledger(facts, parsed, lowest_bits(facts))
    ceiling = Ledger(facts, parsed, highest_bits(facts))
    uniform = {bits: Ledger(facts, parsed, uniform_bits(facts, bits)) for bits in UNIFORM}
    ranges = tuple(
        ConstraintRange(
            constraint,
            floor.limits[i],
            floor.totals[i],
            ceiling.totals[i],
            {bits: ledger.totals[i] for bits, ledger in uniform.items()},
            dominating(floor, i),
        )
        for i, constraint in enumerate(parsed)
    )
    return Explanation(ranges, facts.remarks)


def _amount(entry: ConstraintRange, value: float) -> str:
    if entry.constraint.bound.relative:
        share = value / entry.limit * entry.constraint.bound.value if entry.limit else 0.0
        return f"{share:.3%}"
    return f"{value:,.0f}" if value >= _EXACT else f"{value:,.5g}"
