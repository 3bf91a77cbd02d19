"""`cgmq-fx sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cgmq_fx.cli import options
from cgmq_fx.cli.common import reported
from cgmq_fx.cli.loading import load_model
from cgmq_fx.cli.output import folder_for_results
from cgmq_fx.plain import json_text


@click.command("sweep", short_help="Quantize under many budgets: a Pareto front.")
@options.model
@click.option(
    "--budget", "budgets", required=True, multiple=True, help="One point; repeat it for each."
)
@options.run
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Points to train at once (more than one needs the package loky).",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("sweep"),
    show_default=True,
    help="Folder that keeps the points; the same command continues there.",
)
@options.loudness
@reported
def command(
    model: str,
    budgets: tuple[str, ...],
    state: Path | None,
    jobs: int | None,
    out: Path,
    quiet: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Quantize a model under many budgets, and show which points nothing beats.

    MODEL, data and losses are as for quantize. All budgets are checked before any training. A sweep
    that was stopped continues with the points that are missing.

    \b
    Exit status: 0 done; 1 a budget cannot be met; 2 a mistake in the command,
    the model or the data; 3 training failed; 130 stopped by Ctrl-C.

    \b
    Example:
        cgmq-fx sweep mynet:make --data mynet:batches --loss cross_entropy \\
            --budget "bops <= 2%" --budget "bops <= 1%" --budget "bops <= 0.5%"
    """  # noqa: D301 - click wants the backspace
    from cgmq_fx.sweeping import sweep

    arguments = options.arguments_of(**chosen)
    with folder_for_results(out):
        found = sweep(
            load_model(model, state),
            budgets,
            progress=not quiet,
            folder=out,
            jobs=jobs,
            **arguments,
        )
    if as_json:
        click.echo(json_text(found.rows()))
    elif not quiet:
        click.echo(str(found))
        click.echo(f"the points are in {out}", err=True)
