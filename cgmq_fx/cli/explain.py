"""`cgmq-fx explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cgmq_fx.cli import options
from cgmq_fx.cli.common import INFEASIBLE, reported
from cgmq_fx.cli.loading import load_model
from cgmq_fx.plain import json_text


@click.command("explain", short_help="Say what a budget asks, before training.")
@options.model
@click.option("--budget", required=True, help=options.BUDGET_HELP)
@options.inputs
@options.state
@options.scheme
@options.loudness
@reported
def command(
    model: str,
    budget: str,
    shapes: tuple[str, ...],
    state: Path | None,
    targets: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Say what a budget asks of a model, before any training.

    MODEL is package.module:factory, a function or class that is called without arguments, or a .pt2
    file. The exit status is 1 if no bit-widths satisfy the budget.

    \b
    Example:
        cgmq-fx explain torchvision.models:resnet18 \\
            --input 1x3x224x224 --budget "bops <= 2%"
    """  # noqa: D301 - click wants the backspace
    from cgmq_fx.explanation import explain

    scheme = options.scheme_of(**chosen)
    inputs = options.inputs_of(shapes)
    found = explain(load_model(model, state), budget, inputs, scheme=scheme, target=targets)
    if as_json:
        click.echo(json_text(found.as_dict()))
    elif not quiet:
        click.echo(str(found))
    if not found.feasible:
        raise SystemExit(INFEASIBLE)
