"""`cgmq-fx quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cgmq_fx.cli import options
from cgmq_fx.cli.common import reported
from cgmq_fx.cli.loading import load_model
from cgmq_fx.cli.output import folder_for_results, write_result
from cgmq_fx.plain import json_text

if TYPE_CHECKING:
    from cgmq_fx.result import Result


@click.command("quantize", short_help="Quantize a model under a budget.")
@options.model
@click.option("--budget", required=True, help=options.BUDGET_HELP)
@options.run
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("quantized"),
    show_default=True,
    help="Folder for the model and the reports; files in it are replaced.",
)
@click.option(
    "--checkpoint",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder that keeps the run; the same command continues there after a crash.",
)
@options.loudness
@reported
def command(
    model: str,
    budget: str,
    state: Path | None,
    out: Path,
    checkpoint: Path | None,
    quiet: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Quantize a trained model so that it costs at most what the budget says.

    MODEL is package.module:factory, a function or class that is called without arguments and gives
    the trained model (or with --state the untrained one), or a .pt2 file. A loader is a function
    without arguments that gives re-iterable batches: tensors, (inputs, target), or dicts; or a pair
    of these, for training and validation.

    \b
    Writes to the folder given by --out:
        model.safetensors    the quantized model; cgmq_fx.load reads it
        report.json          every layer, constraint and epoch, for programs
        report.html          the same for people, in one page

    \b
    Exit status: 0 done, and within the budget; 1 the budget cannot be met;
    2 a mistake in the command, the model or the data; 3 training failed;
    130 stopped by Ctrl-C. After 3 and 130, what had been reached is written.

    \b
    Example:
        cgmq-fx quantize mynet:make --data mynet:batches \\
            --loss cross_entropy --budget "bops <= 1%, weights <= 64 KiB"
    """  # noqa: D301 - click wants the backspace
    from cgmq_fx.cli.writable import Writable
    from cgmq_fx.cost_models.errors import CgmqError
    from cgmq_fx.driver import quantize

    arguments = options.arguments_of(**chosen)
    with folder_for_results(out):
        try:
            result = quantize(
                load_model(model, state),
                budget,
                progress=not quiet,
                checkpoint=checkpoint,
                callbacks=[Writable()],
                **arguments,
            )
        except CgmqError as error:
            if error.result is not None:
                _rescue(error.result, out)
            raise
        files = write_result(result, out)
    if as_json:
        click.echo(json_text(result.report()))
    elif not quiet:
        click.echo(str(result))
        click.echo(f"wrote {', '.join(map(str, files))}", err=True)


def _rescue(result: Result, out: Path) -> None:
    """Write what had been reached when training failed; that this failed too is only said."""
    from cgmq_fx.cost_models.errors import CgmqError

    try:
        text = f"wrote {', '.join(map(str, write_result(result, out)))}"
    except CgmqError as error:
        text = str(error)
    click.echo(f"what had been reached is within the budget: {text}", err=True)
