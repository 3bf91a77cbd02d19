"""Small nets, each around one op, to try what a runtime makes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGES, SERIES, ROWS = (4, 8, 8), (4, 16), (12,)


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


class Attention(nn.Module):
    """Self-attention over a series."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.attention(x, x, x, need_weights=False)[0])


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
    "softmax of rows": _around(lambda x: x.softmax(-1), ROWS),
    "softmax of series": _around(lambda x: x.softmax(-1), SERIES),
    "softmax of channels": _around(lambda x: x.softmax(1)),
    "layer_norm of rows": _layer(lambda: nn.LayerNorm(12), ROWS),
    "layer_norm of series": _layer(lambda: nn.LayerNorm(16), SERIES),
    "mean of series": _around(lambda x: x.mean(1), SERIES),
    "bmm": _around(lambda x: torch.bmm(x, x.transpose(1, 2)), SERIES),
    "batch_norm": _layer(lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))),
    "batch_norm of rows": _layer(lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(12)), ROWS),
    "attention": _layer(Attention, SERIES),
    "glu": _around(lambda x: F.glu(x, 1)),
    "clamp_min": _around(lambda x: x.clamp_min(-0.3)),
    "clamp_max": _around(lambda x: x.clamp_max(0.4)),
    "log_sigmoid": _around(F.logsigmoid),
    "softsign": _around(F.softsign),
    "tanhshrink": _around(F.tanhshrink),
    "softshrink": _around(F.softshrink),
    "hardshrink": _around(F.hardshrink),
    "threshold": _around(lambda x: F.threshold(x, 0.1, 0.0)),
    "erf": _around(torch.erf),
    "reciprocal": _around(lambda x: (x.abs() + 1).reciprocal()),
    "rsub": _around(lambda x: 1 - x),
    "masked_fill": _around(lambda x: x.masked_fill(x > 0.5, 0.25)),
    "amin": _around(lambda x: x.amin((2, 3))),
    "std": _around(lambda x: x.std((2, 3))),
    "norm": _around(lambda x: F.normalize(x, dim=1)),
    "cumsum": _around(lambda x: x.cumsum(2)),
    "adaptive_max_pool1d": _around(lambda x: F.adaptive_max_pool1d(x, 1), SERIES),
    "upsample_nearest1d": _around(lambda x: F.interpolate(x, scale_factor=2), SERIES),
    "upsample_bicubic2d": _around(lambda x: F.interpolate(x, scale_factor=2, mode="bicubic")),
    "narrow": _around(lambda x: x.narrow(1, 1, 2)),
    "unflatten": _around(lambda x: x.unflatten(1, (2, 2))),
    "movedim": _around(lambda x: x.movedim(1, 2)),
    "tile": _around(lambda x: x.tile(1, 2, 1, 1)),
    "repeat_interleave": _around(lambda x: x.repeat_interleave(2, 1)),
    "contiguous": _around(lambda x: x.permute(0, 2, 3, 1).contiguous()),
    "clone": _around(lambda x: x.clone()),
    "detach": _around(lambda x: x.detach()),
    "gather": _around(lambda x: x.gather(1, x.new_zeros(len(x), 1, 8, 8, dtype=torch.int64))),
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
    "view": _around(lambda x: x.view(x.shape[0], 8, -1)),
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
    "select_scatter": _around(lambda x: x.select_scatter(x[:, 1].relu(), 1, 0)),
    "slice_scatter": _around(lambda x: x.slice_scatter(x[:, 1:3].relu(), 1, 0, 2)),
    "slice_scatter strided": _around(lambda x: x.slice_scatter(x[..., 1::2].relu(), 3, 0, None, 2)),
    "index_put": _around(lambda x: x.index_put([x > 0.5], x.new_tensor(0.25))),
    "zeros_like": _around(lambda x: torch.cat([x, torch.zeros_like(x)], 1)),
    "full_like": _around(lambda x: torch.cat([x, torch.full_like(x, 0.3)], 1)),
    "expand_as": _around(lambda x: torch.cat([x, x.mean((2, 3), True).expand_as(x)], 1)),
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
    """Recurrent layers over a short sequence."""

    def __init__(self, layer: Callable[..., nn.Module] = nn.LSTM) -> None:
        super().__init__()
        self.rnn, self.last = layer(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.rnn(x)[0][:, -1]))


OPS["lstm"] = Net(Recurrent, lambda: torch.randn(2, 3, 5))
OPS["gru"] = Net(lambda: Recurrent(nn.GRU), lambda: torch.randn(2, 3, 5))


def together(names: Sequence[str]) -> Net:
    """One net with several ops that take images, in branches."""
    made = [OPS[name].function for name in names]
    return Net(
        lambda: Several([build() for build in made if build is not None]),
        lambda: torch.randn(2, *IMAGES),
    )
