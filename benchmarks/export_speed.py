"""Exported files against float: how large they are, and how fast onnxruntime runs them.

    python -m benchmarks.export_speed --weights resnet20_cifar10.safetensors

The runs of all files are interleaved, so that other work on the machine slows all of them alike;
what is compared are medians. Weights only matter for values, not for times.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from benchmarks.lenet5 import LeNet5
from benchmarks.resnet20 import ResNet20, load_resnet20
from cgmq_fx import Result, Scheme, prepare
from cgmq_fx.exporters.program import quiet

BATCHES = (1, 64)
WARM_UP = 3
_MIXED = "bops <= 2%"


def quantized(
    model: nn.Module, inputs: torch.Tensor, *widths: int, budget: str = "bops <= 100%"
) -> Result:
    """A model whose tensors have some of `widths`, calibrated on `inputs`."""
    return prepare(model, budget, inputs, scheme=Scheme(widths)).finalize()


def float_onnx(model: nn.Module, inputs: torch.Tensor, path: Path) -> Path:
    """The float model through the same exporter, with a dynamic batch."""
    with quiet():
        shapes = ({0: torch.export.Dim.AUTO},)
        program = torch.onnx.export(
            model, (inputs,), dynamo=True, dynamic_shapes=shapes, opset_version=21, verbose=False
        )
    assert program is not None
    program.save(path)
    return path


def session(path: Path, threads: int) -> Any:
    """A session on the CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def milliseconds(
    files: dict[str, Path], inputs: np.ndarray[Any, Any], threads: int, seconds: float
) -> dict[str, float]:
    """The median time of one run of every file, interleaved."""
    runners = {name: session(path, threads) for name, path in files.items()}
    times: dict[str, list[float]] = {name: [] for name in files}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < WARM_UP + 15 or time.perf_counter() < end:
        for name, runner in runners.items():
            values = {runner.get_inputs()[0].name: inputs}
            start = time.perf_counter()
            runner.run(None, values)
            if rounds >= WARM_UP:
                times[name].append(1000 * (time.perf_counter() - start))
        rounds += 1
    return {name: statistics.median(own) for name, own in times.items()}


def speed(folder: Path, weights: Path | None, threads: int, seconds: float) -> None:
    """ResNet-20 at 8 and 4 bits, as the preset has it, and mixed under a budget, against float.

    Products of 8 bits by 8 can exceed 16 bits, so the preset has weights of 7 bits at most.
    """
    torch.manual_seed(0)
    model = load_resnet20(weights) if weights else ResNet20().eval()
    inputs = torch.randn(16, 3, 32, 32)
    files = {"float": float_onnx(model, inputs, folder / "float.onnx")}
    results = {f"w{bits}a{bits}": quantized(model, inputs, bits) for bits in (8, 4)}
    for name, budget in (("preset w7a8", "bops <= 100%"), ("preset mixed", _MIXED)):
        results[name] = prepare(model, budget, inputs, target="onnxruntime").finalize()
    for name, result in results.items():
        exported = result.export(folder / f"{name}.onnx")
        click.echo(f"{name}: {exported.agreement}")
        files[name] = exported.path
    signed = results["w8a8"].export(folder / "signed.onnx", "onnx-signed", verify=False)
    files["w8a8 signed"] = signed.path  # exact only where processors add products in 32 bits
    for batch in BATCHES:
        images = np.random.default_rng(0).normal(size=(batch, 3, 32, 32)).astype(np.float32)
        found = milliseconds(files, images, threads, seconds)
        for name, own in found.items():
            ratio = found["float"] / own
            click.echo(f"resnet20 {name:12} batch {batch:2}: {own:7.3f} ms, {ratio:.2f}x float")


def sizes(folder: Path) -> None:
    """LeNet-5 at 8, 4 and 2 bits in every format that needs nothing but onnx and torch."""
    torch.manual_seed(0)
    model, inputs = LeNet5(), torch.rand(16, 1, 28, 28)
    plain = float_onnx(model, inputs, folder / "lenet5.onnx")
    click.echo(f"lenet5 float: onnx {plain.stat().st_size / 1000:.1f} kB")
    for bits in (8, 4, 2):
        result = quantized(model, inputs, bits)
        row = []
        for name, suffix in (
            ("onnx", "onnx"),
            ("onnx-compact", "onnx"),
            ("safetensors", "safetensors"),
            ("pt2", "pt2"),
        ):
            exported = result.export(folder / f"{name}.{suffix}", name)
            row.append(f"{name} {exported.certificate.size / 1000:.1f} kB")
        click.echo(f"lenet5 {bits} bits: {', '.join(row)}")


@click.command()
@click.option("--weights", type=click.Path(path_type=Path), help="Weights of ResNet-20.")
@click.option("--threads", default=1, show_default=True)
@click.option("--seconds", default=20.0, show_default=True, help="Time per batch size.")
def main(weights: Path | None, threads: int, seconds: float) -> None:
    """Measure and print."""
    click.echo(f"onnxruntime {ort.__version__}, {threads} thread(s)")
    with tempfile.TemporaryDirectory() as name:
        sizes(Path(name))
        speed(Path(name), weights, threads, seconds)


if __name__ == "__main__":
    main()
