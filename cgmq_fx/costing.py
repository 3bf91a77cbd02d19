"""`cost`: what a model costs as it is, and what it would cost at uniform bit-widths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.export import ExportedProgram

from cgmq_fx.cost_models import (
    CONVENTION,
    FLOAT_BITS,
    Bound,
    Budget,
    Constraint,
    GraphFacts,
    Ledger,
    NodeFacts,
    Target,
    cost_model,
    uniform_bits,
)
from cgmq_fx.cost_models.errors import BudgetError, OptionError, UnsupportedModelError
from cgmq_fx.data import example_inputs_of
from cgmq_fx.graphs import facts_of, float_graph, quantized_graph
from cgmq_fx.passes.scheme import Scheme
from cgmq_fx.presets import TargetLike, deployment
from cgmq_fx.terminal import columns, escape, fitting, text_of, titled

if TYPE_CHECKING:
    from rich.table import Table

DEFAULT_COSTS = "bops, macs, weights, activations"
UNIFORM = (FLOAT_BITS, 8, 4, 2)
_WHOLE = 1000
_NAME = re.compile(r"\s*(\w+)\s*(?:\[([^\[\]]+)\])?\s*")


@dataclass(frozen=True, slots=True)
class CostRow:
    """One cost of a model.

    Attributes:
        name: The cost, with its scope in brackets if it has one.
        unit: Its unit.
        totals: Its total by uniform bit-width; 32 is the float model.
        nodes: For every one of `Costs.nodes`, its cost in float; sums to the total only for
            costs that are sums over nodes.
        additive: Whether it is such a sum.
    """

    name: str
    unit: str
    totals: dict[int, float]
    nodes: tuple[float, ...]
    additive: bool


@dataclass(frozen=True, slots=True)
class Costs:
    """What a model costs, without any training; print it for tables.

    Attributes:
        rows: One entry per cost that was asked for.
        facts: What the costs were computed from.
    """

    rows: tuple[CostRow, ...]
    facts: GraphFacts

    @property
    def nodes(self) -> tuple[NodeFacts, ...]:
        """Every node that multiplies or stores something."""
        return self.facts.nodes

    def __getitem__(self, name: str) -> CostRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name}; counted were {', '.join(row.name for row in self.rows)}")

    def __repr__(self) -> str:
        found = [
            f"{row.name} {_amount(row.totals[max(row.totals)])} {row.unit}" for row in self.rows
        ]
        return f"<Costs of {len(self.nodes)} layers, in float: {', '.join(found)}>"

    def as_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            "costs": [
                {
                    "name": row.name,
                    "unit": row.unit,
                    "totals": {str(bits): total for bits, total in row.totals.items()},
                }
                for row in self.rows
            ],
            "layers": [
                {
                    "name": node.name,
                    "module": node.module,
                    "op": node.op,
                    "output_shape": list(node.output_shape),
                    "macs": node.macs,
                    "costs": {row.name: row.nodes[i] for row in self.rows},
                }
                for i, node in enumerate(self.nodes)
            ],
            "unknown_ops": list(self.facts.unknown),
            "opaque": list(self.facts.opaque),
            "assumptions": list(self.facts.assumptions),
            "convention": CONVENTION,
        }

    def __str__(self) -> str:
        layers = fitting(self._layers, ("output", "op"))
        tables = [layers, self._totals()]
        return text_of([*tables, *self.facts.remarks, f"({CONVENTION})"], columns())

    def _layers(self, details: Sequence[str]) -> Table:
        table = titled("Layers, in float")
        table.add_column("layer", overflow="fold", min_width=12)
        for detail in details:
            table.add_column(detail, no_wrap=True)
        sums = [row for row in self.rows if row.additive]
        for row in sums:
            table.add_column(escape(f"{row.name} [{row.unit}]"), justify="right", no_wrap=True)
        for i, node in enumerate(self.nodes):
            shown = {
                "op": node.op_text,
                "output": node.output_text,
            }
            costs = [_amount(row.nodes[i]) for row in sums]
            texts = [shown[detail] for detail in details]
            table.add_row(escape(node.title), *map(escape, texts), *costs)
        return table

    def _totals(self) -> Table:
        table = titled("Totals, every quantizer at the same bits")
        table.add_column("cost")
        for bits in self.rows[0].totals:
            header = "float" if bits == FLOAT_BITS else f"{bits} bits"
            table.add_column(header, justify="right", no_wrap=True)
        for row in self.rows:
            totals = [_amount(total) for total in row.totals.values()]
            table.add_row(escape(f"{row.name} [{row.unit}]"), *totals)
        return table


def cost(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    costs: str | Iterable[str] = DEFAULT_COSTS,
    *,
    scheme: Scheme | None = None,
    target: TargetLike | None = None,
) -> Costs:
    """Count what a model costs, without training: in float, and at uniform bit-widths.

    Args:
        model: The model; it is not modified.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments; may be left
            out for models that know their own.
        costs: Names of cost models, with commas between them or as several strings; a scope in
            brackets counts only the layers that match, as `"bops[encoder.*]"`.
        scheme: Which layers have quantizers, for the uniform bit-widths.
        target: Where the model is to run: a preset, a chip, or both.

    Returns:
        The costs.

    Raises:
        CgmqError: If the model cannot be captured, or a cost is not known or asked for twice.
    """
    where = deployment(target)
    budget = _measured(_names(costs, example_inputs), where.chip)
    inputs = example_inputs_of(model, example_inputs, None, supervised=False)
    captured = float_graph(model, inputs)
    try:
        _, facts = quantized_graph(captured, where.scheme(scheme))
    except UnsupportedModelError:  # nothing multiplies; what it stores still costs
        facts = facts_of(captured.module, captured.inputs)
    ledgers = {bits: Ledger(facts, budget, uniform_bits(facts, bits)) for bits in UNIFORM}
    rows = tuple(
        CostRow(
            c.name,
            c.model.unit,
            {bits: ledger.totals[i] for bits, ledger in ledgers.items()},
            ledgers[FLOAT_BITS].node_costs(i),
            c.model.additive,
        )
        for i, c in enumerate(budget)
    )
    return Costs(rows, facts)


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= _WHOLE or value == 0 else f"{value:,.4g}"


def _names(costs: Any, inputs: Any) -> list[str]:
    """The names of costs, one by one."""
    if isinstance(inputs, str):
        raise OptionError(
            f"the inputs come before the costs: cost(model, inputs, {inputs!r}), or "
            f"costs={inputs!r} for a model that knows its inputs"
        )
    if isinstance(costs, str):
        return costs.split(",")
    names = list(costs) if isinstance(costs, Iterable) else [costs]
    if not names or not all(isinstance(name, str) for name in names):
        raise OptionError(
            f"costs are names, such as 'bops, macs' or ['bops', 'macs'], not {costs!r}"
        )
    return names


def _measured(names: Iterable[str], chip: Target | None) -> Budget:
    """Constraints that are only measured."""
    found: dict[str, Constraint] = {}
    for text in names:
        match = _NAME.fullmatch(text)
        if match is None:
            raise BudgetError(
                f"cannot read {text.strip()!r} as a cost; write a name such as 'bops'"
            )
        model, scope = cost_model(match[1], chip), match[2]
        constraint = Constraint(model, Bound(1.0, relative=True), scope)
        if constraint.name in found:
            raise OptionError(f"the cost {constraint.name!r} is asked for twice; name it once")
        found[constraint.name] = constraint
    return Budget(tuple(found.values()))
