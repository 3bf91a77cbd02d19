"""`cgmq-fx targets`."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import click

from cgmq_fx.cli.common import reported

if TYPE_CHECKING:
    from cgmq_fx.cost_models import Target
    from cgmq_fx.presets import Preset


@click.command("targets", short_help="List the presets and chips that come with the library.")
@reported
def command() -> None:
    """List the presets and chips that come with the library: what --target takes.

    A preset says what a runtime can execute; a chip says what its operations cost, with the source
    of every figure.

    \b
    Example:
        cgmq-fx targets
    """  # noqa: D301 - click wants the backspace
    from cgmq_fx.cost_models.target import load_target, target_names
    from cgmq_fx.presets import PRESETS

    entries = [_preset(preset) for preset in PRESETS.values()]
    entries += [_chip(load_target(name)) for name in target_names()]
    click.echo("\n\n".join(entries))


def _preset(preset: Preset) -> str:
    lines = [preset.description]
    if preset.formats:
        lines.append(f"exports to: {', '.join(preset.formats)}")
        lines.append(f"images: channels {'last' if preset.channels_last else 'first'}")
    return _entry(f"{preset.name} (preset)", lines)


def _chip(target: Target) -> str:
    """The name, what it runs and knows, and its description with the source."""
    rows = [row for rows in target.tables.values() for row in rows]
    pairs = dict.fromkeys(f"{row.weight}x{row.activation}" for row in rows)
    latency = target.clock and any(row.cycles for row in rows)
    energy = any(row.picojoules for row in rows)
    known = [word for word, there in (("latency", latency), ("energy", energy)) if there]
    lines = [
        f"runs (weight x activation bits): {', '.join(pairs)}",
        f"knows: {', '.join(known)}",
        target.description,
        f"source: {target.source}",
    ]
    return _entry(f"{target.name} (chip)", lines)


def _entry(title: str, lines: list[str]) -> str:
    from cgmq_fx.terminal import columns

    wrap = textwrap.TextWrapper(columns(), initial_indent="  ", subsequent_indent="  ")
    return "\n".join([title, *(wrap.fill(line) for line in lines if line)])
