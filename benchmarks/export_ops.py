"""Which ops a runtime really executes: small nets, one for each op, through a preset's exporter.

    python -m benchmarks.export_ops xnnpack --op gelu --op pad

What it prints is where the lists of ops in `cgmq_fx/presets.py` come from: an op belongs into a
list if its net is written, runs, agrees with the graph, and can be counted from the file. Run it in
an environment that has the packages of the format.
"""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cgmq_fx import PRESETS, Preset, Result, prepare
from cgmq_fx.cost_models.errors import CgmqError
from cgmq_fx.exporters.hls import hls_project

IMAGES, SERIES, ROWS = (4, 8, 8), (4, 16), (12,)
_SUFFIXES = {"onnx": "onnx", "qonnx": "onnx", "executorch": "pte", "litert": "tflite"}


class Between(nn.Module):
    """A function between two layers."""

    def __init__(self, function: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        layers = {3: nn.Conv2d, 2: nn.Conv1d}
        channels = shape[0]
        if len(shape) > 1:
            self.first: nn.Module = layers[len(shape)](channels, channels, 3, padding=1)
        else:
            self.first = nn.Linear(channels, channels)
        self.function = function
        found = function(self.first(torch.zeros(2, *shape)))
        self.last = nn.Linear(found[0].numel(), 5)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.function(self.first(x)).flatten(1)))


class Several(nn.Module):
    """Functions of one layer's result, each with a layer behind it."""

    def __init__(self, functions: Sequence[Callable[..., Tensor]]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Between(function, IMAGES) for function in functions)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(branch(x) for branch in self.branches)


class Table(nn.Module):
    """Rows of a table, then a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.last = nn.Embedding(9, 6), nn.Linear(24, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.rows(tokens).flatten(1)))


@dataclass(frozen=True)
class Net:
    """A small net around one op.

    Attributes:
        build: Makes it.
        inputs: Its input, two samples.
        function: Makes what stands between its layers, where that is all there is to it.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    function: Callable[[], Callable[..., Tensor]] | None = None


def _around(function: Callable[..., Tensor], shape: tuple[int, ...] = IMAGES) -> Net:
    images = (lambda: function) if shape == IMAGES else None
    return Net(lambda: Between(function, shape), lambda: torch.randn(2, *shape), images)


def _layer(build: Callable[[], nn.Module], shape: tuple[int, ...] = IMAGES) -> Net:
    """A layer with weights of its own in the middle."""
    images = build if shape == IMAGES else None
    return Net(lambda: Between(build(), shape), lambda: torch.randn(2, *shape), images)


def _matmul(x: Tensor) -> Tensor:
    return x @ x.transpose(-1, -2)


_UNARY = (
    *(
        "relu",
        "relu6",
        "hardtanh",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "hardswish",
    ),
    *(
        "hardsigmoid",
        "sigmoid",
        "tanh",
        "softplus",
        "abs",
        "neg",
        "exp",
        "square",
        "sin",
        "cos",
        "floor",
    ),
    *("round", "sign"),
)

OPS: dict[str, Net] = {
    "linear": _around(lambda x: x, ROWS),
    "linear on rows": _layer(lambda: nn.Linear(16, 6), SERIES),
    "conv1d": _around(lambda x: x, SERIES),
    "conv2d": _around(lambda x: x),
    "conv2d strided": _layer(lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1)),
    "conv2d grouped": _layer(lambda: nn.Conv2d(4, 6, 3, groups=2)),
    "conv2d depthwise": _layer(lambda: nn.Conv2d(4, 4, 3, groups=4)),
    "conv2d dilated": _layer(lambda: nn.Conv2d(4, 6, 3, dilation=2)),
    "conv3d": _layer(lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 3, 2))),
    "conv_transpose1d": _layer(lambda: nn.ConvTranspose1d(4, 3, 2, stride=2), SERIES),
    "conv_transpose2d": _layer(lambda: nn.ConvTranspose2d(4, 3, 2, stride=2)),
    "matmul": _around(_matmul),
    "scaled_dot_product_attention": _around(lambda x: F.scaled_dot_product_attention(x, x, x)),
    **{
        name: _around(cast("Callable[..., Tensor]", getattr(torch.ops.aten, name)))
        for name in _UNARY
    },
    "sqrt": _around(lambda x: (x.abs() + 1).sqrt()),
    "rsqrt": _around(lambda x: (x.abs() + 1).rsqrt()),
    "log": _around(lambda x: (x.abs() + 1).log()),
    "pow": _around(lambda x: x.pow(2)),
    "clamp": _around(lambda x: x.clamp(-0.3, 0.4)),
    "prelu": _layer(lambda: nn.PReLU(4)),
    "softmax": _around(lambda x: x.softmax(-1)),
    "log_softmax": _around(lambda x: x.log_softmax(-1)),
    "layer_norm": _layer(lambda: nn.LayerNorm(8)),
    "group_norm": _layer(lambda: nn.GroupNorm(2, 4)),
    "instance_norm": _layer(lambda: nn.InstanceNorm2d(4)),
    "rms_norm": _layer(lambda: nn.RMSNorm(8)),
    "dropout": _layer(lambda: nn.Dropout(0.3)),
    "max_pool1d": _around(lambda x: F.max_pool1d(x, 2), SERIES),
    "max_pool2d": _around(lambda x: F.max_pool2d(x, 2)),
    "max_pool2d padded": _around(lambda x: F.max_pool2d(x, 3, 2, 1)),
    "max_pool2d ceiling": _around(lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True)),
    "avg_pool1d": _around(lambda x: F.avg_pool1d(x, 2), SERIES),
    "avg_pool2d": _around(lambda x: F.avg_pool2d(x, 2)),
    "avg_pool2d padded": _around(lambda x: F.avg_pool2d(x, 3, 2, 1)),
    "adaptive_avg_pool1d": _around(lambda x: F.adaptive_avg_pool1d(x, 1), SERIES),
    "adaptive_avg_pool2d": _around(lambda x: F.adaptive_avg_pool2d(x, 1)),
    "adaptive_avg_pool2d parts": _around(lambda x: F.adaptive_avg_pool2d(x, 2)),
    "adaptive_max_pool2d": _around(lambda x: F.adaptive_max_pool2d(x, 1)),
    "mean": _around(lambda x: x.mean((2, 3))),
    "mean of channels": _around(lambda x: x.mean(1)),
    "sum": _around(lambda x: x.sum((2, 3))),
    "amax": _around(lambda x: x.amax((2, 3))),
    "var": _around(lambda x: x.var((2, 3))),
    "add": _around(lambda x: x + x.relu()),
    "add number": _around(lambda x: x + 0.5),
    "sub": _around(lambda x: x - x.relu()),
    "mul": _around(lambda x: x * x.relu()),
    "mul number": _around(lambda x: 0.7 * x),
    "div": _around(lambda x: x / (x.abs() + 1)),
    "div number": _around(lambda x: x / 3),
    "maximum": _around(lambda x: torch.maximum(x, x.mean(1, keepdim=True))),
    "minimum": _around(lambda x: torch.minimum(x, x.mean(1, keepdim=True))),
    "cat": _around(lambda x: torch.cat([x, x.relu()], 1)),
    "stack": _around(lambda x: torch.stack([x, x.relu()], 1)),
    "where": _around(lambda x: torch.where(x > 0, x, 0.1 * x)),
    "flatten": _around(lambda x: x.flatten(1)),
    "view": _around(lambda x: x.view(len(x), 8, -1)),
    "permute": _around(lambda x: x.permute(0, 2, 3, 1)),
    "transpose": _around(lambda x: x.transpose(1, 2)),
    "squeeze": _around(lambda x: x.unsqueeze(1).squeeze(1)),
    "slice": _around(lambda x: x[:, 1:3]),
    "slice strided": _around(lambda x: x[:, :, ::2]),
    "select": _around(lambda x: x[:, :, 1]),
    "split": _around(lambda x: torch.cat(x.split(2, 1)[::-1], 1)),
    "chunk": _around(lambda x: x.chunk(2, 1)[1]),
    "unbind": _around(lambda x: x.unbind(1)[1]),
    "index_select": _around(lambda x: x[:, [2, 0]]),
    "flip": _around(lambda x: x.flip(2)),
    "roll": _around(lambda x: x.roll(1, 2)),
    "repeat": _around(lambda x: x.repeat(1, 2, 1, 1)),
    "expand": _around(lambda x: x.mean(1, keepdim=True).expand(-1, 3, -1, -1)),
    "pad": _around(lambda x: F.pad(x, (1, 2, 0, 1))),
    "pad value": _around(lambda x: F.pad(x, (1, 2, 0, 1), value=1.0)),
    "reflection_pad2d": _around(lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect")),
    "replication_pad2d": _around(lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate")),
    "pixel_shuffle": _around(lambda x: F.pixel_shuffle(x, 2)),
    "pixel_unshuffle": _around(lambda x: F.pixel_unshuffle(x, 2)),
    "channel_shuffle": _around(lambda x: F.channel_shuffle(x, 2)),
    "upsample_nearest2d": _around(lambda x: F.interpolate(x, scale_factor=2)),
    "upsample_bilinear2d": _around(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "embedding": Net(Table, lambda: torch.randint(9, (2, 4))),
    "lstm": _around(lambda x: x, SERIES),
}
"""By the op that is tried, sometimes with a word on how."""


class Recurrent(nn.Module):
    """An LSTM over a short sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.last = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.rnn(x)[0][:, -1]))


OPS["lstm"] = Net(Recurrent, lambda: torch.randn(2, 3, 5))


def _circuit(path: Path, result: Result, inputs: Tensor, folder: Path) -> str:
    """What the C++ of hls4ml computes, compiled."""
    project = hls_project(path, folder / "project", io_type="io_parallel")
    project.compile()
    with torch.no_grad():
        expected = result.model(inputs)
    same = (project.predict(inputs) == expected).float().mean()
    return f"{'ok' if same == 1 else 'FAILS'} {float(same):.2%} of the circuit's outputs exact"


def together(names: Sequence[str]) -> Net:
    """One net with several ops that take images, in branches."""
    made = [OPS[name].function for name in names]
    return Net(
        lambda: Several([build() for build in made if build is not None]),
        lambda: torch.randn(2, *IMAGES),
    )


def tried(net: Net, preset: Preset, folder: Path) -> str:
    """What happens with an op: how well the file agrees, or what goes wrong.

    Args:
        net: A net around it.
        preset: Where it is to run; its list of ops is not asked.
        folder: Where files go.
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
        unknown = exported.certificate.unknown
        return f"ok {exported.agreement}{f'; unknown: {unknown}' if unknown else ''}"
    except CgmqError as error:
        return f"FAILS {type(error).__name__}: {' '.join(str(error).split())[:160]}"


@click.command()
@click.argument("preset", type=click.Choice([n for n in PRESETS if n != "none"]))
@click.option("--op", "names", multiple=True, type=click.Choice(list(OPS)))
@click.option("--branches", default=1, show_default=True, help="Ops that share a net: faster.")
def main(preset: str, names: tuple[str, ...], branches: int) -> None:
    """Try ops, all by default."""
    warnings.simplefilter("ignore")
    chosen = list(names or OPS)
    alone = [[name] for name in chosen if branches == 1 or OPS[name].function is None]
    shared = [name for name in chosen if [name] not in alone]
    for group in (*batched(shared, branches), *alone):
        net = OPS[group[0]] if len(group) == 1 else together(group)
        with tempfile.TemporaryDirectory() as folder:
            found = tried(net, PRESETS[preset], Path(folder))
        click.echo(f"{', '.join(group):30} {found}")


def batched(names: Sequence[str], count: int) -> list[Sequence[str]]:
    """Groups of at most `count`."""
    return [names[i : i + count] for i in range(0, len(names), count)]


if __name__ == "__main__":
    main()
