"""`cgmq-fx export`."""

from __future__ import annotations

from pathlib import Path

import click

from cgmq_fx.cli import options
from cgmq_fx.cli.common import reported
from cgmq_fx.cli.loading import load_data, load_result
from cgmq_fx.plain import json_text


@click.command("export", short_help="Write a file that a runtime executes.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--format", "form", help="The format, where the suffix of OUT does not say it.")
@click.option("--data", help="Batches to compare on: package.module:loader, or mnist.")
@click.option("--no-run", is_flag=True, help="Do not run the file in its runtime and compare.")
@options.libraries
@options.loudness
@reported
def command(
    file: Path,
    out: Path,
    form: str | None,
    data: str | None,
    no_run: bool,
    libraries: tuple[str, ...],
    quiet: bool,
    as_json: bool,
) -> None:
    """Write OUT, which a runtime executes, from FILE, a model.safetensors of quantize.

    OUT is run in its runtime and compared with the quantized model, and its cost is counted from
    the file alone. If it does not agree, or costs too much, there is an error and no file. The
    certificate lies beside it; cgmq-fx verify checks both elsewhere.

    \b
    Examples:
        cgmq-fx export quantized/model.safetensors net.onnx
        cgmq-fx export quantized/model.safetensors net.onnx --format qonnx
    """  # noqa: D301 - click wants the backspace
    from cgmq_fx.exporters import export

    samples = load_data(data).train
    written = export(load_result(file, libraries), out, form, verify=not no_run, samples=samples)
    if as_json:
        click.echo(json_text(written.certificate.to_json()))
    elif not quiet:
        click.echo(str(written))
