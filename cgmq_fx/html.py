"""A result as one page that needs nothing else: no network, no files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cgmq_fx.cost_models.errors import OptionError
from cgmq_fx.drawing import draw
from cgmq_fx.palette import STOPS, color_of
from cgmq_fx.report import as_dict, factors, mean_bits, other_quantizers
from cgmq_fx.requirements import own_version
from cgmq_fx.result import Result

if TYPE_CHECKING:
    from cgmq_fx.exporters.certificate import Certificate


@dataclass(frozen=True, slots=True)
class _Row:
    """A layer in the table."""

    layer: str
    op: str
    output: str
    weight_bits: float
    weight_range: tuple[float, float] | None
    activation_bits: float | None
    activation_range: tuple[float, float] | None
    macs: int
    shares: tuple[float, ...]


def save_html(result: Result, path: Path, certificates: Sequence[Certificate] = ()) -> Path:
    """Write the page; see `Result.to_html`."""
    try:
        path.write_text(page(result, certificates), encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{path} cannot be written: {error}") from error
    return path


def page(result: Result, certificates: Sequence[Certificate] = ()) -> str:
    """The whole page."""
    template = _environment().get_template("report.html.jinja")
    return template.render(
        **_context(result),
        drawing=draw(result),
        plots=_plots(result),
        stops=STOPS,
        certificates=certificates,
    )


def fragment(result: Result) -> str:
    """The constraints and the table of layers, for a notebook."""
    return _environment().get_template("fragment.html.jinja").render(**_context(result))


def _context(result: Result) -> dict[str, Any]:
    report = as_dict(result)
    ranges = {q["name"]: tuple(q["range"]) for q in report["quantizers"]}
    others = [q for q in report["quantizers"] if q["name"] in set(other_quantizers(result))]
    return {
        "report": report,
        "states": result.cost.states,
        "rows": _rows(result, ranges),
        "others": others,
        "color": color_of,
        "versions": {"cgmq_fx": own_version(), "PyTorch": torch.__version__},
        "parameters": sum(p.numel() for p in result.model.parameters()),
    }


def _rows(result: Result, ranges: dict[str, tuple[float, float]]) -> list[_Row]:
    sums = [i for i, state in enumerate(result.cost.states) if state.constraint.model.additive]
    costs = [result.cost.per_node[i] for i in sums]
    totals = [sum(own) or 1.0 for own in costs]
    rows = []
    for index, (node, found) in enumerate(zip(result.cost.nodes, factors(result), strict=True)):
        if found is None:
            continue
        weight, activation = found
        rows.append(
            _Row(
                node.title,
                node.op_text,
                node.output_text,
                mean_bits(result, weight),
                ranges.get(weight.quantizer or ""),
                None if activation is None else mean_bits(result, activation),
                None if activation is None else ranges.get(activation.quantizer or ""),
                node.macs,
                tuple(own[index] / total for own, total in zip(costs, totals, strict=True)),
            )
        )
    return rows


def _plots(result: Result) -> list[Markup] | None:
    """Plots as SVG in the colours of the page; None without matplotlib."""
    from cgmq_fx.plots import svg_plots

    try:
        drawn = svg_plots(result)
    except OptionError:
        return None
    return [Markup(svg) for svg in drawn.values()]  # matplotlib escapes what it writes


@lru_cache(maxsize=1)
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("cgmq_fx", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
