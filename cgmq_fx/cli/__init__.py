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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="cgmq-fx")
def main() -> None:
    """Quantize PyTorch models under hard bounds on what they cost."""


for _module in (quantize, explain, cost, show, sweep, targets, export, verify, completion):
    main.add_command(_module.command)
