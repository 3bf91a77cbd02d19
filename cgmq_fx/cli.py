"""The command line, `cgmq-fx`.

Exit status: 0 when all is well, 1 when a budget cannot be met, 2 when a command was used wrongly.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

INFEASIBLE = 1
MISUSED = 2
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool")


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turn an error of the library into one short paragraph and an exit status."""

    @wraps(command)
    def run(**options: Any) -> None:
        from cgmq_fx.cost_models.errors import CgmqError, InfeasibleBudgetError

        try:
            command(**options)
        except CgmqError as error:
            click.echo(f"error: {error}", err=True)
            infeasible = isinstance(error, InfeasibleBudgetError)
            raise SystemExit(INFEASIBLE if infeasible else MISUSED) from None

    return run


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="cgmq-fx")
def main() -> None:
    """Quantize PyTorch models under hard bounds on what they cost."""


@main.command()
@_reported
def targets() -> None:
    """List the chips that come with the library, and where their figures are from.

    \b
    Example:
        cgmq-fx targets
    """  # noqa: D301 - click wants the backspace
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from cgmq_fx.cost_models.target import load_target, target_names

    table = Table("target", "runs (weights x activations)", "knows", "what and source")
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
    Console().print(table)


@main.command()
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
@_reported
def explain(
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
    from cgmq_fx.explain import explain as explanation_of
    from cgmq_fx.passes.scheme import Scheme
    from cgmq_fx.prepare import scheme_for

    chip = None if target is None else load_target(target)
    widths = scheme_for(None, chip).bit_widths if bit_widths is None else _numbers(bit_widths, ",")
    scheme = Scheme(widths, weights, activations, input_bits=input_bits)  # type: ignore[arg-type]
    inputs = tuple(_tensor(shape) for shape in shapes) or None
    found = explanation_of(load_model(model), budget, inputs, scheme=scheme, target=chip)
    click.echo(str(found))
    if not found.feasible:
        raise SystemExit(INFEASIBLE)


def load_model(name: str) -> nn.Module | ExportedProgram:
    """A model from `package.module:factory` or a `.pt2` file.

    Raises:
        OptionError: If there is no such file, module or factory, or it gives no model.
    """
    import torch

    from cgmq_fx.cost_models.errors import OptionError

    if name.endswith(".pt2"):
        if not Path(name).is_file():
            raise OptionError(f"there is no file {name}")
        try:
            return torch.export.load(name)
        except Exception as error:
            raise OptionError(f"cannot read {name} as a model of torch.export: {error}") from error
    module, colon, factory = name.partition(":")
    if not colon:
        raise OptionError(f"{name!r} is neither package.module:factory nor a .pt2 file")
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 - sys.path holds strings
    try:
        made = getattr(importlib.import_module(module), factory)()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise OptionError(f"cannot make a model of {name!r}: {reason}") from error
    finally:
        sys.path.pop(0)
    if not isinstance(made, torch.nn.Module):
        raise OptionError(f"{name} gives a {type(made).__name__}, not a torch.nn.Module")
    return made


def _tensor(text: str) -> Tensor:
    """An input of a shape such as 1x3x32x32, or 1x16:int64: random numbers, or zeros."""
    import torch

    from cgmq_fx.cost_models.errors import OptionError

    sizes, _, name = text.lower().partition(":")
    shape, name = _numbers(sizes, "x"), name or "float32"
    if name not in _DTYPES or min(shape) < 1:
        raise OptionError(
            f"{text!r} is no input; write sizes as 1x3x32x32, and a dtype where it is not float32, "
            "as 1x16:int64"
        )
    dtype: torch.dtype = getattr(torch, name)
    return torch.rand(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape).to(dtype)


def _numbers(text: str, separator: str) -> tuple[int, ...]:
    from cgmq_fx.cost_models.errors import OptionError

    try:
        return tuple(int(part) for part in text.split(separator))
    except ValueError as error:
        raise OptionError(f"{text!r} must be whole numbers with {separator!r} between") from error
