"""Every format, every kind of net: size, agreement with the graph, and time in the runtime.

    python -m benchmarks.deploy_table run --rows rows.jsonl --files folder
    python -m benchmarks.deploy_table time --rows rows.jsonl --files folder
    python -m benchmarks.deploy_table show --rows rows.jsonl

Runtimes pin packages that exclude each other, so `run` writes the rows of the formats that are
installed and leaves the others as they are: run it in every environment with the same file, then
`show` prints the table. Ranges of activations are cut to 0.7 of what was calibrated, so that values
are clipped. `time` takes seconds, for a quiet moment. Times are medians for one sample on one
thread; what is compared takes turns with the float model in PyTorch, whose time in the same run is
the unit.
"""

import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from cgmq_fx import WeightMemory
from cgmq_fx.cost_models import Budget
from cgmq_fx.cost_models.errors import CgmqError
from cgmq_fx.exporters import Exporter, exporters
from cgmq_fx.exporters.litert_file import channels_last
from cgmq_fx.exporters.onnx_compact import without_fusion
from cgmq_fx.passes.inputs import ExampleInputs
from cgmq_fx.recount import count
from tests.deploy_nets import deployed, float_net, inputs_of

CASES = [
    ("lenet5", "integer"),
    ("lenet5", "integer channel"),
    ("lenet5", "w2"),
    ("mlp", "integer"),
    ("resnet20", "integer channel"),
    ("separable", "integer channel"),
    ("transformer", "integer"),
]
FPGA = [("lenet5", "fpga"), ("mlp", "fpga"), ("resnet20", "fpga"), ("separable", "fpga")]
WEIGHTS = Budget((WeightMemory() <= "100%",))
ROUNDS, WARM_UP = 60, 10
Runner = Callable[[], object]


def _onnx(path: Path, inputs: ExampleInputs, configure: Callable[[Any], None]) -> Runner:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    configure(options)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {p.name: t.numpy() for p, t in zip(session.get_inputs(), inputs.tensors, strict=True)}
    return lambda: session.run(None, feed)


def _executorch(path: Path, inputs: ExampleInputs) -> Runner:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    assert method is not None
    return lambda: method.execute(inputs.tensors)


def _litert(path: Path, inputs: ExampleInputs) -> Runner:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    entries = interpreter.get_input_details()
    for entry, tensor in zip(entries, channels_last(inputs).tensors, strict=True):
        interpreter.set_tensor(entry["index"], tensor.numpy().astype(entry["dtype"]))
    invoke: Runner = interpreter.invoke
    return invoke


def _module(module: Any, inputs: ExampleInputs) -> Runner:
    def run() -> object:
        with torch.no_grad():
            return module(*inputs.args, **inputs.kwargs)

    return run


def runner(name: str, path: Path, inputs: ExampleInputs) -> Runner | None:
    """What runs a file once; None where its runtime is not made for speed."""
    match name:
        case "onnx":
            return _onnx(path, inputs, lambda options: None)
        case "onnx-compact":
            return _onnx(path, inputs, without_fusion)
        case "executorch":
            return _executorch(path, inputs)
        case "litert":
            return _litert(path, inputs)
        case "pt2":
            return _module(torch.export.load(path).module(), inputs)
    return None


def milliseconds(runners: dict[str, Runner]) -> dict[str, float]:
    """The median time of one run of each; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(WARM_UP + ROUNDS):
        for name, run in runners.items():
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(own[WARM_UP:]) for name, own in times.items()}


def file_of(folder: Path, entry: dict[str, Any]) -> Path:
    """Where the file of a row is."""
    words = (entry["net"], *entry["scheme"].split(), entry["format"])
    return folder / f"{'-'.join(words)}{exporters()[entry['format']].suffix}"


def row(exporter: Exporter, name: str, scheme: str, folder: Path) -> dict[str, Any]:
    """Export a net, and measure."""
    result = deployed(name, scheme)
    start = {"format": exporter.name, "net": name, "scheme": scheme}
    try:
        exported = result.export(
            file_of(folder, start), exporter.name, samples=[inputs_of(name, 32).args[0]]
        )
    except CgmqError as error:
        return start | {"error": " ".join(str(error).split())[:200]}
    agreement = exported.agreement
    assert agreement is not None
    counted = count(result.model, result.inputs, WEIGHTS).states[0].value
    found = start | vars(agreement)
    found |= {"bytes": exported.certificate.size, "weights": counted}
    return found | {"counted_from_file": exported.certificate.from_file}


def timed(entry: dict[str, Any], path: Path) -> dict[str, Any]:
    """A row with the time of its file, and that of the float model."""
    inputs = inputs_of(entry["net"], 1)
    run = runner(entry["format"], path, inputs)
    if run is None:
        return {}
    times = milliseconds({"float": _module(float_net(entry["net"]), inputs), "file": run})
    return entry | {"ms": times["file"], "float_ms": times["float"]}


def _key(entry: dict[str, Any]) -> tuple[str, str, str]:
    return entry["net"], entry["scheme"], entry["format"]


def read_rows(path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The newest row of every net and format."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {_key(entry): entry for entry in map(json.loads, lines)}


def _cell(entry: dict[str, Any]) -> str:
    if "error" in entry:
        return f"refused: {entry['error'][:60]}"
    parts = [
        f"{entry['bytes']:,}",
        f"{entry['bytes'] / entry['weights']:.2f}",
        f"{entry['exact']:.2%}",
        f"{entry['largest']:.2g}",
        f"{entry['argmax']:.2%}",
        f"{entry['ms']:.3f} ({entry['float_ms'] / entry['ms']:.2f}x)" if "ms" in entry else "",
    ]
    return " | ".join(parts)


@click.group()
def main() -> None:
    """Measure and show."""


_ROWS = click.option("--rows", type=click.Path(path_type=Path), required=True)
_FILES = click.option("--files", type=click.Path(path_type=Path, exists=True), required=True)


def installed() -> list[Exporter]:
    """The formats whose packages are there."""
    found = []
    for name, exporter in exporters().items():
        try:
            exporter.check_installed()
        except CgmqError as error:
            click.echo(f"{name}: left out: {error}")
        else:
            found.append(exporter)
    return found


@main.command()
@_ROWS
@_FILES
@click.option("--format", "formats", multiple=True)
@click.option("--net", "nets", multiple=True)
def run(rows: Path, files: Path, formats: tuple[str, ...], nets: tuple[str, ...]) -> None:
    """Export in the formats that are installed, and compare; what was done is not done again."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    done = read_rows(rows)
    for exporter in installed():
        for net, scheme in FPGA if exporter.name == "qonnx" else CASES:
            wanted = (not formats or exporter.name in formats) and (not nets or net in nets)
            if not wanted or (net, scheme, exporter.name) in done:
                continue
            found = row(exporter, net, scheme, files)
            with rows.open("a") as file:
                file.write(json.dumps(found) + "\n")
            click.echo(f"{exporter.name:12} {net:12} {scheme:16} {_cell(found)}")


@main.command("time")
@_ROWS
@_FILES
def measure(rows: Path, files: Path) -> None:
    """Measure the files of the formats that are installed."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = {exporter.name for exporter in installed()}
    for entry in read_rows(rows).values():
        path = file_of(files, entry)
        found = timed(entry, path) if entry["format"] in names and path.exists() else {}
        if found:
            with rows.open("a") as file:
                file.write(json.dumps(found) + "\n")
            click.echo(
                f"{found['format']:12} {found['net']:12} {found['scheme']:16} {_cell(found)}"
            )


@main.command()
@click.option("--rows", type=click.Path(path_type=Path, exists=True), required=True)
def show(rows: Path) -> None:
    """Print a table in Markdown."""
    click.echo(
        "| net | scheme | format | bytes | x counted weights | exact | largest | arg-max | ms |"
    )
    click.echo("|---|---|---|---|---|---|---|---|---|")
    for (net, scheme, name), entry in sorted(read_rows(rows).items()):
        click.echo(f"| {net} | {scheme} | {name} | {_cell(entry)} |")


if __name__ == "__main__":
    main()
