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
@click.option("--target", help="The chip for latency and energy: a name or a JSON file.")
@click.option("--bit-widths", help="The bit-widths that may be used, as 2,4,8.")
@click.option("--weights", type=click.Choice(["tensor", "channel", "element"]), default="tensor")
@click.option("--activations", type=click.Choice(["tensor", "channel"]), default="tensor")
@click.option("--input-bits", type=int, help="Fix the network's input at so many bits.")
@reported
def command(
    model: str,
    budget: str,
    shapes: tuple[str, ...],
    target: str | None,
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
    from cgmq_fx.cost_models.target import load_target
    from cgmq_fx.explanation import explain
    from cgmq_fx.passes.scheme import Scheme
    from cgmq_fx.prepared import scheme_for

    chip = None if target is None else load_target(target)
    widths = scheme_for(None, chip).bit_widths if bit_widths is None else numbers(bit_widths, ",")
    scheme = Scheme(widths, weights, activations, input_bits=input_bits)  # type: ignore[arg-type]
    inputs = tuple(tensor(shape) for shape in shapes) or None
    found = explain(load_model(model), budget, inputs, scheme=scheme, target=chip)
    click.echo(str(found))
    if not found.feasible:
        raise SystemExit(INFEASIBLE)
