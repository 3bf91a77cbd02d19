"""The command line, `cgmq-fx`: a module per command.

A command's module imports PyTorch, and what needs it, only when the command runs: `--help` and
completion must be quick.
"""

from __future__ import annotations

import click

from cgmq_fx.cli import (
    completion,
    cost,
    explain,
    export,
    quantize,
    show,
    sweep,
    targets,
    verify,
)
from cgmq_fx.cli.common import reported
from cgmq_fx.cli.loading import import_modules


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="cgmq-fx")
@click.option(
    "--import",
    "modules",
    multiple=True,
    metavar="MODULE",
    help="A module to import before the command, such as one that registers cost models.",
)
def main(modules: tuple[str, ...]) -> None:
    """Quantize PyTorch models under hard bounds on what they cost.

    \b
    Exit status of all commands: 0 done; 1 the budget is not, or cannot be, met;
    2 a mistake in the command, the model, the data or a file;
    3 training failed; 130 stopped by Ctrl-C.

    \b
    Examples:
        cgmq-fx quantize mynet:make --data mynet:batches --budget "bops <= 1%"
        cgmq-fx --import mycosts verify net.onnx --budget "traffic <= 20 kB"
    """  # noqa: D301 - click wants the backspace
    if modules:
        reported(import_modules)(modules)


for _module in (quantize, explain, cost, show, sweep, targets, export, verify, completion):
    main.add_command(_module.command)
