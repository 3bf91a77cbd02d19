"""Which ops a runtime really executes: small nets, one for each op, through a preset's exporter.

    python -m benchmarks.export_ops try xnnpack --op gelu --op pad --rows rows.jsonl
    python -m benchmarks.export_ops lists --rows rows.jsonl

This is where the lists in `cgmq_fx/runtime_ops.py` come from: an op belongs into one if a net that
it occurs in is written, runs, agrees with the graph, and can be counted from the file; a net of
such ops that fails nevertheless needs a rule. Run it in an environment that has the packages of the
format; what is in the file already is not tried again.
"""

import json
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.op_nets import OPS, Net, together
from cgmq_fx import PRESETS, Preset, Result, prepare
from cgmq_fx.cost_models.errors import CgmqError
from cgmq_fx.exporters.agreement import TOLERATED_SHARE
from cgmq_fx.exporters.hls import hls_project
from cgmq_fx.graphs import float_graph
from cgmq_fx.passes.inputs import ExampleInputs
from cgmq_fx.presets import float_op

_SUFFIXES = {"onnx": "onnx", "qonnx": "onnx", "executorch": "pte", "litert": "tflite"}


def _circuit(path: Path, result: Result, inputs: Tensor, folder: Path) -> str:
    """What the C++ of hls4ml computes, compiled."""
    project = hls_project(path, folder / "project", io_type="io_parallel")
    project.compile()
    with torch.no_grad():
        expected = result.model(inputs)
    same = (project.predict(inputs) == expected).float().mean()
    return f"{'ok' if same == 1 else 'FAILS'} {float(same):.2%} of the circuit's outputs exact"


def tried(net: Net, preset: Preset, folder: Path, ops: int = 1) -> str:
    """What happens with an op: how well the file agrees, or what goes wrong.

    Args:
        net: A net around it.
        preset: Where it is to run; its list of ops is not asked.
        folder: Where files go.
        ops: How many there are in branches of their own; none of them may be wrong.
    """
    torch.manual_seed(0)
    try:
        prepared = prepare(
            net.build().eval(),
            "bops <= 100%",
            net.inputs(),
            target=replace(preset, ops=(), rules=()),
        )
        result = prepared.finalize()
        for form in preset.formats:
            exported = result.export(folder / f"net.{_SUFFIXES[form]}", form)
        if preset.name == "fpga":
            return _circuit(exported.path, result, net.inputs(), folder)
        unknown, agreement = exported.certificate.unknown, exported.agreement
        assert agreement is not None
        if (1 - agreement.within) * ops > 1 - TOLERATED_SHARE:
            return f"FAILS {agreement}"
        return f"ok {exported.agreement}{f'; unknown: {unknown}' if unknown else ''}"
    except Exception as error:  # noqa: BLE001 - whatever a converter raises is the answer
        return f"FAILS {type(error).__name__}: {' '.join(str(error).split())[:160]}"


def aten_ops(net: Net) -> list[str]:
    """The ops of a net, by the names that presets know them by."""
    try:
        module = float_graph(net.build().eval(), ExampleInputs((net.inputs(),))).module
    except CgmqError:
        return []
    return sorted({name for name in map(float_op, module.graph.nodes) if name})


def read_rows(path: Path | None) -> list[dict[str, Any]]:
    """What was tried already."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path else []


@click.group()
def main() -> None:
    """Try ops, and list them."""


@main.command("try")
@click.argument("preset", type=click.Choice([n for n in PRESETS if n != "none"]))
@click.option("--op", "names", multiple=True, type=click.Choice(list(OPS)))
@click.option(
    "--branches", default=1, show_default=True, help="Ops that share a net, until it fails."
)
@click.option("--rows", type=click.Path(path_type=Path), help="File that results are added to.")
def try_ops(preset: str, names: tuple[str, ...], branches: int, rows: Path | None) -> None:
    """Try ops, all by default."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if rows is not None:
        rows.touch()
    known = {row["tried"] for row in read_rows(rows) if row["preset"] == preset}
    chosen = [name for name in names or OPS if name not in known]
    alone = [[name] for name in chosen if branches == 1 or OPS[name].function is None]
    shared = [name for name in chosen if [name] not in alone]
    waiting = [*batched(shared, branches), *alone]
    while waiting:
        group = list(waiting.pop(0))
        net = OPS[group[0]] if len(group) == 1 else together(group)
        with tempfile.TemporaryDirectory() as folder:
            found = tried(net, PRESETS[preset], Path(folder), len(group))
        click.echo(f"{', '.join(group):30} {found}")
        if len(group) > 1 and not found.startswith("ok"):
            half = len(group) // 2
            waiting = [group[:half], group[half:], *waiting]
            continue
        for name in group if rows is not None else ():
            entry = {"preset": preset, "tried": name, "ops": aten_ops(OPS[name]), "found": found}
            with rows.open("a") as file:  # type: ignore[union-attr]
                file.write(json.dumps(entry) + "\n")


@main.command()
@click.option("--rows", type=click.Path(path_type=Path, exists=True), required=True)
def lists(rows: Path) -> None:
    """Print the ops of every preset that a net went well with, and what needs a rule besides."""
    for preset in PRESETS:
        own = [row for row in read_rows(rows) if row["preset"] == preset]
        well = [row for row in own if row["found"].startswith("ok")]
        executed = {op for row in well for op in row["ops"]}
        click.echo(f"{preset}: {' '.join(sorted(executed))}")
        for row in own:
            if row not in well:
                foreign = sorted({*row["ops"]} - executed)
                click.echo(f"  {row['tried']}: {', '.join(foreign) or 'NEEDS A RULE'}")


def batched(names: Sequence[str], count: int) -> list[Sequence[str]]:
    """Groups of at most `count`."""
    return [names[i : i + count] for i in range(0, len(names), count)]


if __name__ == "__main__":
    main()
