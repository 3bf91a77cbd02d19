"""`cgmq-fx explain`."""

from __future__ import annotations

import click

from cgmq_fx.cli.common import INFEASIBLE, numbers, reported
from cgmq_fx.cli.loading import load_model, tensor


@click.command("explain")
@click.argument("model")
@click.option(
    "--budget", required=True, help='What it may cost, as "bops <= 1%, weights <= 64 KiB".'
)
@click.option(
    "--input",
    "shapes",
    multiple=True,
    help="Shape of an input, as 1x3x32x32 or 1x16:int64; repeatable.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="Where it is to run: a preset, or a chip by name or JSON file; both if repeated.",
)
@click.option("--bit-widths", help="The bit-widths that may be used, as 2,4,8.")
@click.option("--weights", type=click.Choice(["tensor", "channel", "element"]), default="tensor")
@click.option("--activations", type=click.Choice(["tensor", "channel"]), default="tensor")
@click.option("--input-bits", type=int, help="Fix the network's input at so many bits.")
@reported
def command(
    model: str,
    budget: str,
    shapes: tuple[str, ...],
    targets: tuple[str, ...],
    bit_widths: str | None,
    weights: str,
    activations: str,
    input_bits: int | None,
) -> None:
    """Say what a budget asks of a model, before any training.

    MODEL is package.module:factory, a function or class that is called without arguments, or a .pt2
    file. The exit status is 1 if no bit-widths satisfy the budget.

    \b
    Example:
        cgmq-fx explain torchvision.models:resnet18 --input 1x3x224x224 --budget "bops <= 2%"
    """  # noqa: D301 - click wants the backspace
    from cgmq_fx.explanation import explain
    from cgmq_fx.passes.grid import DEFAULT_BIT_WIDTHS
    from cgmq_fx.passes.scheme import Scheme

    widths = DEFAULT_BIT_WIDTHS if bit_widths is None else numbers(bit_widths, ",")
    scheme = Scheme(widths, weights, activations, input_bits=input_bits)  # type: ignore[arg-type]
    inputs = tuple(tensor(shape) for shape in shapes) or None
    found = explain(load_model(model), budget, inputs, scheme=scheme, target=targets)
    click.echo(str(found))
    if not found.feasible:
        raise SystemExit(INFEASIBLE)
