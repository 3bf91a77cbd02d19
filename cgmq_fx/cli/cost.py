"""`cgmq-fx cost`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cgmq_fx.cli import options
from cgmq_fx.cli.common import reported
from cgmq_fx.cli.loading import load_model
from cgmq_fx.plain import json_text


@click.command("cost", short_help="Count what a model costs, without training.")
@options.model
@click.option(
    "--costs",
    default="bops, macs, weights, activations",
    show_default=True,
    help="What to count; bops[encoder.*] counts some layers only.",
)
@options.inputs
@options.state
@options.scheme
@options.as_json
@reported
def command(
    model: str,
    costs: str,
    shapes: tuple[str, ...],
    state: Path | None,
    targets: tuple[str, ...],
    as_json: bool,
    **chosen: Any,
) -> None:
    """Count what a model costs: per layer in float, in total at uniform bit-widths.

    MODEL is package.module:factory, a function or class that is called without arguments, or a .pt2
    file.

    \b
    Example:
        cgmq-fx cost torchvision.models:resnet18 \\
            --input 1x3x224x224 --costs "macs, weights"
    """  # noqa: D301 - click wants the backspace
    from cgmq_fx.costing import cost

    scheme = options.scheme_of(**chosen)
    inputs = options.inputs_of(shapes)
    found = cost(load_model(model, state), inputs, costs, scheme=scheme, target=targets)
    click.echo(json_text(found.as_dict()) if as_json else str(found))
