"""`cgmq-fx targets`."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import click

from cgmq_fx.cli import options
from cgmq_fx.cli.common import reported
from cgmq_fx.plain import json_text

if TYPE_CHECKING:
    from cgmq_fx.cost_models import Target
    from cgmq_fx.cost_models.target import Row
    from cgmq_fx.presets import Preset


@click.command("targets", short_help="List the presets and chips that come with the library.")
@options.as_json
@reported
def command(as_json: bool) -> None:
    """List the presets and chips that come with the library: what --target takes.

    A preset says what a runtime can execute; a chip says what its operations cost, with the source
    of every figure.

    \b
    Example:
        cgmq-fx targets
    """  # noqa: D301 - click wants the backspace
    from cgmq_fx.cost_models.target import load_target, target_names
    from cgmq_fx.presets import PRESETS

    chips = [load_target(name) for name in target_names()]
    if as_json:
        click.echo(json_text([*map(_preset_row, PRESETS.values()), *map(_chip_row, chips)]))
    else:
        click.echo("\n\n".join([*map(_preset, PRESETS.values()), *map(_chip, chips)]))


def _preset_row(preset: Preset) -> dict[str, Any]:
    return {
        "name": preset.name,
        "kind": "preset",
        "description": preset.description,
        "formats": list(preset.formats),
    }


def _chip_row(target: Target) -> dict[str, Any]:
    return {
        "name": target.name,
        "kind": "chip",
        "description": target.description,
        "source": target.source,
        "runs": _pairs(target),
        "knows": _known(target),
    }


def _preset(preset: Preset) -> str:
    lines = [preset.description]
    if preset.formats:
        lines.append(f"exports to: {', '.join(preset.formats)}")
        lines.append(f"images: channels {'last' if preset.channels_last else 'first'}")
    return _entry(f"{preset.name} (preset)", lines)


def _chip(target: Target) -> str:
    """The name, what it runs and knows, and its description with the source."""
    lines = [
        f"runs (weight x activation bits): {', '.join(_pairs(target))}",
        f"knows: {', '.join(_known(target))}",
        target.description,
        f"source: {target.source}",
    ]
    return _entry(f"{target.name} (chip)", lines)


def _pairs(target: Target) -> list[str]:
    """Weight x activation bits that it runs, each once."""
    return list(dict.fromkeys(f"{row.weight}x{row.activation}" for row in _rows(target)))


def _known(target: Target) -> list[str]:
    """The costs that its figures are enough for."""
    latency = target.clock and any(row.cycles for row in _rows(target))
    energy = any(row.picojoules for row in _rows(target))
    return [word for word, there in (("latency", latency), ("energy", energy)) if there]


def _rows(target: Target) -> list[Row]:
    return [row for rows in target.tables.values() for row in rows]


def _entry(title: str, lines: list[str]) -> str:
    from cgmq_fx.terminal import columns

    wrap = textwrap.TextWrapper(columns(), initial_indent="  ", subsequent_indent="  ")
    return "\n".join([title, *(wrap.fill(line) for line in lines if line)])
