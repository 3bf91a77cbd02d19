"""A table of latencies for the machine at hand, from kernels measured in onnxruntime.

    python -m benchmarks.measure_target --out my-machine.json

Runs convolutions, depthwise convolutions and matrix products of several shapes, with 8-bit integers
and in float32, and fits cycles per multiply-accumulate and bytes per cycle to their times. Writes a
target that `target=` takes, and shows how well it predicts whole models that were not used for it.
The clock is nominal: 1 GHz, so a cycle is a nanosecond.
"""

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from cgmq_fx.cost_models import (
    Budget,
    GraphFacts,
    Latency,
    Ledger,
    NodeFacts,
    Role,
    Target,
    load_target,
    node_bits,
    uniform_bits,
)
from cgmq_fx.cost_models.target import Row, target_to_json
from cgmq_fx.graphs import float_graph, quantized_graph
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.scheme import Scheme

CLOCK = 1e9
DEPTH = 3
WIDTHS = (8, 32)
PATTERNS = ("depthwise.*", "*conv*", "*")
"""The kinds of nodes that have figures of their own; the first that matches counts."""

Floats = npt.NDArray[np.float64]
Seconds = Callable[[nn.Sequential, tuple[int, ...], int], float]
"""Net, shape of its input with the batch, bits -> seconds."""


@dataclass(frozen=True)
class Net:
    """A chain of layers.

    Attributes:
        name: What the table calls it.
        layers: The layers.
        shape: Shape of the input without the batch.
        rows: Inputs at once: the rows of a matrix product, 1 for everything else.
    """

    name: str
    layers: nn.Sequential
    shape: tuple[int, ...]
    rows: int = 1


def convolutions(channels: int, side: int, kernel: int, groups: int = 1) -> Net:
    """Several equal convolutions in a row, so that conversions at both ends weigh little."""
    layers: list[nn.Module] = []
    for _ in range(DEPTH):
        conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=groups)
        layers += [conv, nn.ReLU()]
    name = f"{'conv' if groups == 1 else 'depthwise'}{kernel}x{kernel} {channels} @ {side}x{side}"
    return Net(name, nn.Sequential(*layers), (channels, side, side))


def products(features: int, rows: int) -> Net:
    """Several equal linear layers in a row."""
    layers = [nn.Linear(features, features) for _ in range(DEPTH)]
    return Net(f"linear {features} @ {rows}", nn.Sequential(*layers), (features,), rows)


def kernels() -> list[Net]:
    """What the table is fitted to."""
    dense = [
        convolutions(c, s, k) for c, s in ((16, 32), (32, 16), (64, 14), (128, 7)) for k in (1, 3)
    ]
    wide = [convolutions(32, 16, 5), convolutions(64, 28, 3)]
    depthwise = [convolutions(c, s, 3, c) for c, s in ((32, 32), (64, 16), (128, 14), (256, 7))]
    linear = [products(f, r) for f in (128, 256, 512, 1024) for r in (1, 16, 64)]
    return [*dense, *wide, *depthwise, *linear]


def _separable(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    depthwise = nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs)
    return [depthwise, nn.ReLU(), nn.Conv2d(inputs, outputs, 1), nn.ReLU()]


def whole_models() -> list[Net]:
    """What the table is tried on."""
    lenet = nn.Sequential(
        nn.Conv2d(1, 32, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )
    stages = ((32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2))
    mobile = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, padding=1),
        nn.ReLU(),
        *(layer for stage in stages for layer in _separable(*stage)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, 100),
    )
    sizes = (784, 1024, 512, 256, 10)
    perceptron = nn.Sequential(
        *(m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU()))
    )
    return [
        Net("LeNet-5", lenet, (1, 28, 28)),
        Net("MobileNet-like", mobile, (3, 96, 96)),
        Net("MLP", perceptron, (784,)),
    ]


def facts_of(net: Net) -> GraphFacts:
    """What the library knows of a net."""
    captured = float_graph(net.layers, ExampleInputs((torch.zeros(2, *net.shape),)))
    return quantized_graph(captured, Scheme())[1]


def _pattern(node: NodeFacts) -> int:
    kind = node.op if node.groups == 1 else f"depthwise.{node.op}"
    return next(i for i, pattern in enumerate(PATTERNS) if fnmatchcase(kind, pattern))


def load(net: Net, bits: int) -> Floats:
    """What the cost of a net consists of: MACs by kind and bits, then the bytes that move.

    Shape (kinds * widths + 1,).
    """
    facts = facts_of(net)
    counts = np.zeros((len(PATTERNS), len(WIDTHS)))
    moved = 0.0
    for node in facts.nodes:
        counts[_pattern(node), WIDTHS.index(bits)] += node.macs * net.rows
        moved += node_bits(node, uniform_bits(facts, bits)).stored_bits / 8
        inputs = sum(o.elements for o in node.operands if o.role is Role.ACTIVATION)
        moved += inputs * net.rows * bits / 8
    return np.append(counts.ravel(), moved)


def fit(loads: Floats, times: Floats) -> Floats:
    """Seconds per MAC of every kind, and per byte, by least squares of the relative errors.

    If something came out negative, moving bytes is taken to be free, which leaves a mean per kind.

    Args:
        loads: Shape (measurements, kinds * widths + 1), see `load`.
        times: Seconds, shape (measurements,).

    Returns:
        Shape (kinds * widths + 1,), positive; 0 for free bytes.
    """
    scaled = loads / times[:, None]
    ones = np.ones(len(times))
    figures = np.linalg.lstsq(scaled, ones, rcond=None)[0]
    if (figures <= 0).any():
        figures = np.append(np.linalg.lstsq(scaled[:, :-1], ones, rcond=None)[0], 0.0)
    return np.asarray(figures)


def as_target(name: str, figures: Floats, source: str) -> Target:
    """The figures as a target."""
    cycles = (figures[:-1] * CLOCK).reshape(len(PATTERNS), len(WIDTHS))
    tables = {
        pattern: tuple(Row(b, b, float(c), None) for b, c in zip(WIDTHS, row, strict=True))
        for pattern, row in zip(PATTERNS, cycles, strict=True)
    }
    speed = float(1 / (figures[-1] * CLOCK)) if figures[-1] else None
    return Target(name, "Measured kernel times, batch 1", source, tables, CLOCK, speed)


def measure(nets: Sequence[Net], seconds: Seconds, overhead: float) -> Floats:
    """Times of every net at 8 and at 32 bits, without the cost of a call."""
    jobs = [(net, bits) for net in nets for bits in WIDTHS]
    times = [
        max(seconds(net.layers, (net.rows, *net.shape), bits) - overhead, 1e-9)
        for net, bits in track(jobs, "measuring", transient=True)
    ]
    return np.array(times)


def predict(net: Net, target: Target) -> list[float]:
    """Seconds of one sample at 8 and at 32 bits, as a budget counts them."""
    facts = facts_of(net)
    budget = Budget((Latency(target) <= 1.0,))
    return [Ledger(facts, budget, uniform_bits(facts, bits)).totals[0] for bits in WIDTHS]


def table(nets: Sequence[Net], predicted: Floats, measured: Floats) -> Table:
    """Predicted and measured times, a row per net and precision."""
    shown = Table("model", "bits", "predicted", "measured", "predicted / measured")
    jobs = [(net.name, bits) for net in nets for bits in WIDTHS]
    for (name, bits), guess, true in zip(jobs, predicted * 1e3, measured * 1e3, strict=True):
        shown.add_row(name, str(bits), f"{guess:.3f} ms", f"{true:.3f} ms", f"{guess / true:.2f}")
    return shown


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--threads", type=int, default=1, help="threads of the runtime")
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each measurement")
    return parser.parse_args()


def main() -> None:
    """Measure, fit, write and try."""
    options = arguments()
    try:
        from benchmarks import onnx_nets
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"{error.name} is not installed; this benchmark needs pip install 'cgmq-fx[bench]'"
        ) from None

    def seconds(net: nn.Sequential, shape: tuple[int, ...], bits: int) -> float:
        model = onnx_nets.build(net, shape, integer=bits == WIDTHS[0])
        return onnx_nets.seconds(model, options.threads, options.seconds)

    console = Console()
    overhead = seconds(nn.Sequential(nn.Flatten()), (1, 1), WIDTHS[-1])
    nets = kernels()
    loads = np.array([load(net, bits) for net in nets for bits in WIDTHS])
    times = measure(nets, seconds, overhead)
    figures = fit(loads, times)
    runtime = f"{onnx_nets.version()}, {options.threads} thread(s), {platform.machine()}"
    source = f"Least squares over {len(times)} kernel times on this machine: {runtime}"
    made = as_target(options.out.stem, figures, source)
    options.out.write_text(json.dumps(target_to_json(made), indent=1))
    target = load_target(options.out)
    console.print(table(nets, loads @ figures, times), highlight=False)
    models = whole_models()
    predicted = np.array([guess for net in models for guess in predict(net, target)])
    console.print(table(models, predicted, measure(models, seconds, overhead)), highlight=False)
    console.print("pools, sums and conversions between layers are in no prediction")
    console.print(f"wrote {options.out}; a call costs {overhead * 1e6:.1f} us", highlight=False)


if __name__ == "__main__":
    main()
