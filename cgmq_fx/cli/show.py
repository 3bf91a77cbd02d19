"""`cgmq-fx show`."""

from __future__ import annotations

from pathlib import Path

import click

from cgmq_fx.cli import options
from cgmq_fx.cli.common import reported
from cgmq_fx.cli.loading import load_result
from cgmq_fx.plain import json_text


@click.command("show", short_help="Show a saved result.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@options.libraries
@options.as_json
@click.option(
    "--plots",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write plots into this folder (needs matplotlib).",
)
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the report as one page.",
)
@reported
def command(
    file: Path,
    libraries: tuple[str, ...],
    as_json: bool,
    plots: Path | None,
    html: Path | None,
) -> None:
    """Show a saved result: FILE is a model.safetensors that was written by quantize.

    Its cost is counted again, and nothing in it is executed, so it need not be trusted. The exit
    status is 1 if it does not hold what it states, 2 if it cannot be read.

    \b
    Example:
        cgmq-fx show quantized/model.safetensors --html report.html
    """  # noqa: D301 - click wants the backspace
    result = load_result(file, libraries)
    click.echo(json_text(result.report()) if as_json else str(result))
    files = [] if html is None else [result.to_html(html)]
    files += [] if plots is None else result.plot(plots)
    for path in files:
        click.echo(f"wrote {path}", err=True)
