"""`cgmq-fx verify`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from cgmq_fx.cli import options
from cgmq_fx.cli.common import INFEASIBLE, reported
from cgmq_fx.plain import json_text


@click.command("verify", short_help="Check what an exported file costs.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--budget", help="The bounds to check; by default those that the file states.")
@click.option("--target", help="The chip for latency and energy: a name or a JSON file.")
@options.loudness
@partial(reported, unreadable=INFEASIBLE)
def command(file: Path, budget: str | None, target: str | None, quiet: bool, as_json: bool) -> None:
    """Check what an exported FILE costs, from the file alone.

    Bits are read from its tensors and clamps, multiply-accumulates from its shapes. It needs
    neither the model's source nor the training code, and nothing in the file is executed. Where the
    file's certificate lies beside it, it must be the file that was certified.

    \b
    Exit status: 0 every bound holds; 1 one does not, or the file cannot be
    verified; 2 a mistake in the command.

    \b
    Example:
        cgmq-fx verify lenet5.onnx --budget "bops <= 0.4%, weights <= 200 KiB"
    """  # noqa: D301 - click wants the backspace
    from cgmq_fx.exporters.certificate import verify

    found = verify(file, budget, target=target)
    if as_json:
        click.echo(json_text(found.to_json()))
    elif not quiet:
        click.echo(str(found))
    if not found.satisfied:
        raise SystemExit(INFEASIBLE)
