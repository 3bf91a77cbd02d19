"""Reports: a result as a table for people and as plain values for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cgmq_fx.cost_models import FLOAT_BITS, ConstraintState, NodeFacts, Operand, Role
from cgmq_fx.passes.insert import QUANTIZERS
from cgmq_fx.passes.quantizer import Quantizer
from cgmq_fx.result import Result
from cgmq_fx.terminal import columns, escape, fitting, text_of, titled

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("layer", "op", "output", "W bits", "W range", "A bits", "A range", "MACs")
_DETAILS = ("MACs", "op", "output", "A range", "W range")
"""Columns that a narrow terminal does without, the last first."""


def as_dict(result: Result) -> dict[str, Any]:
    """The result as plain values that JSON can hold."""
    report = result.cost
    return {
        "budget": str(result.budget),
        "satisfied": report.satisfied,
        "constraints": [_state(state) for state in report.states],
        "metrics": result.metrics,
        "warnings": list(result.warnings),
        "nodes": [
            {
                "name": node.name,
                "op": node.op,
                "module": node.module,
                "output_shape": list(node.output_shape),
                "macs": node.macs,
                "weight_bits": _bits_of(result, weight),
                "activation_bits": _bits_of(result, activation),
                "costs": {
                    str(state.constraint): costs[index]
                    for state, costs in zip(report.states, report.per_node, strict=True)
                },
            }
            for index, (node, found) in enumerate(zip(report.nodes, factors(result), strict=True))
            for weight, activation in [found or (None, None)]
        ],
        "quantizers": [_quantizer(result, name) for name in report.facts.quantizers],
        "rounded_up": list(result.cost.rounded_up()),
        "unknown_ops": list(report.facts.unknown),
        "opaque": list(report.facts.opaque),
        "assumptions": list(report.facts.assumptions),
        "convention": report.convention,
        "epochs": [asdict(epoch) for epoch in result.history.epochs],
    }


def rows(result: Result) -> list[dict[str, Any]]:
    """A flat row per layer; costs in columns called as their constraints are."""
    nodes: list[dict[str, Any]] = as_dict(result)["nodes"]
    return [
        {
            **{key: value for key, value in node.items() if key not in ("costs", "output_shape")},
            "output_shape": "x".join(map(str, node["output_shape"])),
            **node["costs"],
        }
        for node in nodes
        if node["weight_bits"] is not None
    ]


def render(result: Result) -> str:
    """The result as text: the layers, the other quantizers, then the constraints.

    It is as wide as the terminal, from 80 columns on: where that is narrow, ranges and other
    details are left out. Numbers are never cut off.
    """
    width = columns()
    tables = [fitting(partial(_node_table, result), _DETAILS)]
    if others := other_quantizers(result):
        tables.append(_quantizer_table(result, others))
    return text_of([*tables, *_footer(result)], width)


def _node_table(result: Result, details: Sequence[str]) -> Table:
    """A row per layer, with its share of every cost that is a sum over nodes."""
    report = result.cost
    table = titled(f"Quantized under {result.budget}")
    shown = [c for c in _COLUMNS if c not in _DETAILS or c in details]
    for column in shown:
        if column == "layer":
            table.add_column(column, overflow="fold", min_width=12, max_width=32)
        elif column == "op":
            table.add_column(column, overflow="fold", max_width=20)
        else:
            table.add_column(column, justify="right", no_wrap=column != "output")
    sums = [i for i, state in enumerate(report.states) if state.constraint.model.additive]
    for index in sums:
        name = report.states[index].constraint.name
        table.add_column(escape(f"of {name}"), justify="right")
    totals = {index: sum(report.per_node[index]) or 1.0 for index in sums}
    for row, (node, found) in enumerate(zip(report.nodes, factors(result), strict=True)):
        if found is not None:
            shares = [f"{report.per_node[i][row] / totals[i]:.1%}" for i in sums]
            cells = dict(zip(_COLUMNS, _row(result, node, *found), strict=True))
            table.add_row(*(escape(cells[c]) for c in shown), *shares)
    return table


def factors(result: Result) -> list[tuple[Operand, Operand | None] | None]:
    """What every node of the report has bits of: its weight and its activation.

    Of a table that is only looked up, there is no activation. None for nodes that are no layers.
    """
    nodes = result.cost.nodes
    multiplied = {operand.quantizer for node in nodes for operand in node.operands}
    found: list[tuple[Operand, Operand | None] | None] = []
    for node in nodes:
        tables = [s for s in node.stored if s.quantizer and s.quantizer not in multiplied]
        if node.operands:
            weight, activation = node.operands
            found.append((weight, activation))
        elif tables:
            found.append((Operand(Role.WEIGHT, tables[0].elements, tables[0].quantizer), None))
        else:
            found.append(None)
    return found


def other_quantizers(result: Result) -> list[str]:
    """Quantizers that no layer reads: operands of residual adds, for example."""
    layers = [found for found in factors(result) if found is not None]
    read = {o.quantizer for pair in layers for o in pair if o is not None}
    return [name for name in result.cost.facts.quantizers if name not in read]


def _quantizer_table(result: Result, names: list[str]) -> Table:
    table = titled("For adds, joins, pools and outputs")
    for column in ("quantizer", "elements", "bits", "range"):
        table.add_column(column, justify="left" if column == "quantizer" else "right")
    for name in names:
        facts = result.cost.facts.quantizers[name]
        operand = Operand(facts.role, facts.elements, name)
        bits, limit = _bits_text(result, operand), _range_text(result, operand)
        table.add_row(escape(name), f"{facts.elements:,}", bits, limit)
    return table


def _footer(result: Result) -> list[str]:
    lines = [str(state) for state in result.cost.states]
    lines += [f"val {name} {value:.4g}" for name, value in result.metrics.items()]
    lines += [f"warning: {text}" for text in result.warnings]
    lines += result.cost.rounded_up()
    lines += result.cost.facts.remarks
    return [*lines, f"({result.cost.convention})"]


def _row(result: Result, node: NodeFacts, weight: Operand, activation: Operand | None) -> list[str]:
    return [
        node.title,
        node.op_text,
        node.output_text,
        _bits_text(result, weight),
        _range_text(result, weight),
        _bits_text(result, activation),
        _range_text(result, activation),
        f"{node.macs:,}",
    ]


def _bits_text(result: Result, operand: Operand | None) -> str:
    if operand is None:
        return "-"
    if operand.quantizer is None:
        return str(FLOAT_BITS)
    bits = result.cost.assignment[operand.quantizer]
    low, high = int(bits.min()), int(bits.max())
    return str(low) if low == high else f"{low}-{high} ({bits.mean():.2f})"


def _range_text(result: Result, operand: Operand | None) -> str:
    if operand is None or operand.quantizer is None:
        return "-"
    limits = quantizer_of(result, operand.quantizer).limit.detach()
    low, high = float(limits.min()), float(limits.max())
    return f"{high:.3g}" if low == high else f"{low:.2g}-{high:.2g}"


def mean_bits(result: Result, operand: Operand) -> float:
    """The bits of an operand, the mean over its gates."""
    name = operand.quantizer
    return float(FLOAT_BITS) if name is None else float(result.cost.assignment[name].mean())


def _bits_of(result: Result, operand: Operand | None) -> float | None:
    return None if operand is None else mean_bits(result, operand)


def _quantizer(result: Result, name: str) -> dict[str, Any]:
    quantizer, bits = quantizer_of(result, name), result.cost.assignment[name]
    widths, counts = np.unique(bits, return_counts=True)
    limits = quantizer.limit.detach()
    return {
        "name": name,
        "role": quantizer.spec.role.value,
        "signed": quantizer.signed,
        "gates": int(bits.size),
        "gates_by_bits": {str(w): int(c) for w, c in zip(widths, counts, strict=True)},
        "mean_bits": float(bits.mean()),
        "range": [float(limits.min()), float(limits.max())],
    }


def quantizer_of(result: Result, name: str) -> Quantizer:
    """A quantizer of the result's model by name.

    Raises:
        KeyError: If there is none.
    """
    quantizer = result.model.get_submodule(f"{QUANTIZERS}.{name}")
    if not isinstance(quantizer, Quantizer):
        raise KeyError(name)
    return quantizer


def _state(state: ConstraintState) -> dict[str, Any]:
    return {
        "constraint": str(state.constraint),
        "unit": state.constraint.model.unit,
        "value": state.value,
        "limit": state.limit,
        "base": state.constraint.bound.base,
        "reference": state.reference,
        "relative": state.relative,
        "satisfied": state.satisfied,
    }
