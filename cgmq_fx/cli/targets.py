"""`cgmq-fx targets`."""

from __future__ import annotations

import click

from cgmq_fx.cli.common import reported


@click.command("targets")
@reported
def command() -> None:
    """List the presets and chips that come with the library: what --target takes.

    A preset says what a runtime can execute; a chip says what its operations cost, with the source
    of every figure.

    \b
    Example:
        cgmq-fx targets
    """  # noqa: D301 - click wants the backspace
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from cgmq_fx.cost_models.target import load_target, target_names
    from cgmq_fx.presets import PRESETS

    runtimes = Table("preset", "exports to", "what")
    for preset in PRESETS.values():
        runtimes.add_row(preset.name, ", ".join(preset.formats), escape(preset.description))
    table = Table("chip", "runs (weights x activations)", "knows", "what and source")
    for name in target_names():
        target = load_target(name)
        rows = [row for rows in target.tables.values() for row in rows]
        pairs = dict.fromkeys(f"{row.weight}x{row.activation}" for row in rows)
        known = [
            word
            for word, there in (
                ("latency", target.clock and any(row.cycles for row in rows)),
                ("energy", any(row.picojoules for row in rows)),
            )
            if there
        ]
        text = f"{target.description} {target.source}"
        table.add_row(name, ", ".join(pairs), ", ".join(known), escape(text))
    console = Console()
    console.print(runtimes)
    console.print(table)
