"""Options that several commands have, and what they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from cgmq_fx.cli.common import numbers
from cgmq_fx.cli.loading import load_data, load_loss, tensor

if TYPE_CHECKING:
    from torch import Tensor

    from cgmq_fx.passes.scheme import Scheme

_F = TypeVar("_F", bound=Callable[..., None])

BUDGET_HELP = 'What it may cost, as "bops <= 1%, weights <= 64 KiB".'


def _targets(context: click.Context, option: click.Parameter, word: str) -> list[CompletionItem]:
    from cgmq_fx.cost_models.target import target_names
    from cgmq_fx.presets import PRESETS

    return [
        *(CompletionItem(name) for name in (*PRESETS, *target_names()) if name.startswith(word)),
        CompletionItem(word, type="file"),
    ]


def _together(*decorators: Callable[[Any], Any]) -> Callable[[_F], _F]:
    def decorate(command: _F) -> _F:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


model = click.argument("model", metavar="MODEL")

state = click.option(
    "--state",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Trained weights to load into MODEL: a state dict, .safetensors or torch.save's.",
)

scheme = _together(
    click.option(
        "--target",
        "targets",
        multiple=True,
        help="Where it is to run: a preset, or a chip by name or JSON file (cgmq-fx targets); "
        "both if repeated.",
        shell_complete=_targets,
    ),
    click.option("--bit-widths", help="The bit-widths that may be used, as 2,4,8."),
    click.option("--weight-widths", help="Those of weights, where they differ, as 2,4,7."),
    click.option(
        "--weights",
        type=click.Choice(["tensor", "channel", "element"]),
        default="tensor",
        show_default=True,
        help="What each weight gate stands for.",
    ),
    click.option(
        "--activations",
        type=click.Choice(["tensor", "channel"]),
        default="tensor",
        show_default=True,
        help="What each activation gate stands for.",
    ),
    click.option("--input-bits", type=int, help="Fix the network's input at so many bits."),
    click.option("--skip", multiple=True, help="Layers that stay in float, by path or type."),
    click.option("--only", multiple=True, help="The only layers to quantize, by path or type."),
    click.option(
        "--layer",
        "layers",
        multiple=True,
        help="Bit-widths of some layers, as 'encoder.*=4,8'; repeatable.",
    ),
)

_training = _together(
    click.option(
        "--data",
        help="Batches: package.module:loader, or mnist. Without it, random inputs.",
    ),
    click.option("--val-data", help="Batches to measure on, package.module:loader."),
    click.option(
        "--loss",
        default="teacher",
        show_default=True,
        help="teacher (the float model; needs no labels), a loss of torch.nn.functional such as "
        "cross_entropy, or package.module:function.",
    ),
    click.option("--epochs", type=click.IntRange(min=0), default=10, show_default=True),
    click.option("--seed", type=int, default=0, show_default=True),
)

inputs = click.option(
    "--input",
    "shapes",
    multiple=True,
    help="Shape of an input, as 1x3x32x32 or 1x16:int64; repeatable.",
)

run = _together(_training, inputs, state, scheme)
"""What all commands that train have."""

libraries = click.option(
    "--library",
    "libraries",
    multiple=True,
    help="A package whose ops the model calls, such as torchvision: it is imported and trusted.",
)

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

loudness = _together(
    click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors."), as_json
)


def arguments_of(
    data: str | None,
    val_data: str | None,
    loss: str,
    epochs: int,
    seed: int,
    shapes: tuple[str, ...],
    targets: tuple[str, ...],
    **chosen: Any,
) -> dict[str, Any]:
    """What the options of `run` are to `quantize` and `sweep`, but for the model.

    Raises:
        OptionError: If they make no sense, or name what is not there.
    """
    chosen_scheme = scheme_of(**chosen)
    batches = load_data(data, val_data)
    return {
        "train_data": batches.train,
        "loss": load_loss(loss),
        "val_data": batches.validation,
        "epochs": epochs,
        "example_inputs": inputs_of(shapes),
        "scheme": chosen_scheme,
        "target": targets,
        "seed": seed,
    }


def inputs_of(shapes: tuple[str, ...]) -> tuple[Tensor, ...] | None:
    """Example inputs of these shapes; None without any.

    Raises:
        OptionError: If one is no shape.
    """
    return tuple(map(tensor, shapes)) or None


def scheme_of(
    bit_widths: str | None,
    weights: str,
    activations: str,
    input_bits: int | None,
    skip: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    layers: tuple[str, ...] = (),
    weight_widths: str | None = None,
) -> Scheme:
    """Read the options of `scheme`, but for the targets.

    Raises:
        OptionError: If they make no sense.
    """
    from cgmq_fx.passes.grid import DEFAULT_BIT_WIDTHS
    from cgmq_fx.passes.scheme import Scheme

    widths = DEFAULT_BIT_WIDTHS if bit_widths is None else numbers(bit_widths, ",")
    own = None if weight_widths is None else numbers(weight_widths, ",")
    grains: dict[str, Any] = {"weights": weights, "activations": activations, "weight_widths": own}
    pairs = [layer.rpartition("=") for layer in layers]
    rows = [(pattern, numbers(text, ",")) for pattern, _, text in pairs]
    return Scheme(widths, input_bits=input_bits, skip=skip, only=only, layers=rows, **grains)
