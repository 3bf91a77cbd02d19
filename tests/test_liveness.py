"""Lifetimes and grids of the tensors of small captured nets."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cgmq_fx.passes.scheme import Scheme
from tests.cost_helpers import quantized
from tests.nets import NETS

Row = tuple[int, int, int, str | None]
"""Elements, first and last step, quantizer."""


class Given(nn.Module):
    """Layers and what is done with them."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def strided_and_padded(m: Any, x: Tensor) -> Any:
    """The shortcut of ResNet-20: a strided slice and new channels of zeros."""
    return m.b(F.pad(m.a(x).relu()[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)))


def padded_with_ones(m: Any, x: Tensor) -> Any:
    return m.b(F.pad(m.a(x).relu(), (1, 1, 1, 1), value=1.0))


def sized(m: Any, x: Tensor) -> Any:
    y = F.max_pool2d(m.a(x).relu(), 2)
    return m.b(y.view(x.size(0), -1))


def seen_twice(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.b(y.view(-1, 2, 2).sigmoid().view(-1, 4)) + y * 2


def two_outputs(m: Any, x: Tensor) -> Any:
    y = m.a(x).relu()
    return y, m.b(y)


def two_grids(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.b(F.max_pool2d(y, 2)), m.c(y[:, :, :4])


def chunked(m: Any, x: Tensor) -> Any:
    left, right = m.a(x).chunk(2, 1)
    return m.b(left) + right


def in_the_shape_of(m: Any, x: Tensor) -> Any:
    return x.expand_as(m.a(x)) + 1


def limited(m: Any, x: Tensor) -> Any:
    y, most = m.a(x), m.b(x)
    return m.c(torch.clamp(y, max=most))


class Limits(nn.Module):
    """A layer whose outputs are kept below a buffer."""

    most: Tensor

    def __init__(self, limit: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.limit = nn.Linear(4, 3), limit
        self.register_buffer("most", torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.limit(self.layer(x), self.most)


IMAGE, VECTOR = (1, 8, 8), (4,)

LIFETIMES: dict[str, tuple[nn.Module, tuple[int, ...], list[Row]]] = {
    # conv with batch norm and ReLU, pool, flatten, linear: neither ReLU nor flatten is a tensor,
    # and what is pooled is on the grid behind the pool
    "chain": (
        NETS["cnn"].build(),
        (3, 8, 8),
        [
            (192, 0, 1, "input_1"),
            (256, 1, 2, "max_pool2d"),
            (64, 2, 3, "max_pool2d"),
            (5, 3, 3, None),
        ],
    ),
    # the stem's output lives from step 1 to the sum in step 4
    "residual": (
        NETS["residual"].build(),
        (3, 6, 6),
        [
            (108, 0, 1, "x"),
            (144, 1, 4, "relu_"),
            (144, 2, 3, "relu__1"),
            (144, 3, 4, "conv2d_2"),
            (144, 4, 5, "relu__2"),
            (4, 5, 6, "mean"),
            (5, 6, 6, None),
        ],
    ),
    # both branches are on the grid of what they are put into
    "concat": (
        NETS["concat"].build(),
        (3, 5, 5),
        [
            (75, 0, 2, "x"),
            (50, 1, 3, "cat"),
            (75, 2, 3, "cat"),
            (125, 3, 4, "cat"),
            (50, 4, 4, None),
        ],
    ),
    "slice and zero padding keep the grid": (
        Given(strided_and_padded, a=conv(1, 2), b=conv(4, 1)),
        IMAGE,
        [
            (64, 0, 1, "x"),
            (128, 1, 2, "pad"),
            (64, 2, 3, "pad"),
            (32, 3, 4, "pad"),
            (64, 4, 5, "pad"),
            (16, 5, 5, None),
        ],
    ),
    "padding with ones does not": (
        Given(padded_with_ones, a=conv(1, 2), b=conv(2, 1)),
        IMAGE,
        [(64, 0, 1, "x"), (128, 1, 2, None), (200, 2, 3, "pad"), (100, 3, 3, None)],
    ),
    # the input's size is asked for in step 3, its values are read in step 1
    "a size is not a reading": (
        Given(sized, a=conv(1, 2), b=nn.Linear(32, 3)),
        IMAGE,
        [(64, 0, 1, "x"), (128, 1, 2, "max_pool2d"), (32, 2, 3, "max_pool2d"), (3, 3, 3, None)],
    ),
    # the sigmoid reads a view of a tensor that is read again in step 4, so it cannot run in place
    "in place only where nobody else reads": (
        Given(seen_twice, a=nn.Linear(4, 4), b=nn.Linear(4, 4)),
        VECTOR,
        [
            (4, 0, 1, "x"),
            (4, 1, 4, None),
            (4, 2, 3, "sigmoid"),
            (4, 3, 5, None),
            (4, 4, 5, None),
            (4, 5, 5, None),
        ],
    ),
    "outputs are kept": (
        Given(two_outputs, a=nn.Linear(4, 3), b=nn.Linear(3, 2)),
        VECTOR,
        [(4, 0, 1, "x"), (3, 1, 2, "relu"), (2, 2, 2, None)],
    ),
    # step 2 pools, step 4 slices: the tensor would have to be on two grids, so it stays float
    "two grids": (
        Given(two_grids, a=conv(1, 2), b=conv(2, 1), c=conv(2, 1)),
        IMAGE,
        [
            (64, 0, 1, "x"),
            (128, 1, 4, None),
            (32, 2, 3, "max_pool2d"),
            (16, 3, 5, None),
            (64, 4, 5, "slice_2"),
            (32, 5, 5, None),
        ],
    ),
    "chunks": (
        Given(chunked, a=nn.Linear(4, 6), b=nn.Linear(3, 3)),
        VECTOR,
        [
            (4, 0, 1, "x"),
            (6, 1, 3, None),
            (3, 2, 4, "getitem"),
            (3, 3, 5, None),
            (3, 4, 5, None),
            (3, 5, 5, None),
        ],
    ),
    # the limit is made after what it limits, so that cannot be changed before, and both are kept
    "clamped by a tensor": (
        Given(limited, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4)),
        VECTOR,
        [
            (4, 0, 2, "x"),
            (4, 1, 3, None),
            (4, 2, 3, None),
            (4, 3, 4, "clamp"),
            (4, 4, 4, None),
        ],
    ),
    **{
        f"{name} of a constant": (Limits(limit), VECTOR, [(4, 0, 1, "x"), (3, 1, 1, None)])
        for name, limit in {
            "clamp": lambda y, most: torch.clamp(y, max=most),
            "minimum": torch.minimum,
        }.items()
    },
    # what was made from a tensor gives it its shape: its values are not read
    "in the shape of": (
        Given(in_the_shape_of, a=nn.Linear(4, 4)),
        VECTOR,
        [(4, 0, 2, "x"), (4, 1, 1, None), (4, 2, 2, None)],
    ),
}


@pytest.mark.parametrize(("net", "shape", "rows"), LIFETIMES.values(), ids=LIFETIMES)
def test_lifetimes(net: nn.Module, shape: tuple[int, ...], rows: list[Row]) -> None:
    found = quantized(net, torch.randn(2, *shape), Scheme())[1].tensors
    assert [(t.elements, t.first, t.last, t.quantizer) for t in found] == rows


def test_integer_inputs_have_the_bits_of_their_type() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    _, facts = quantized(NETS["tied"].build(), tokens, Scheme())
    assert [(t.elements, t.bits) for t in facts.tensors] == [(3, 64), (12, 32), (21, 32)]


def joined(m: Any, x: Tensor) -> Any:
    return m.c(torch.cat([m.a(x).relu(), F.max_pool2d(m.b(x), 3, 1, 1).relu()], 1))


def joined_twice(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.c(torch.cat([y, y], 1))


def sliced(m: Any, x: Tensor) -> Any:
    y = m.a(x).relu()
    return m.b(y), m.c(y[:, 1:]), m.d(y[:, :, ::2])


def sliced_first(m: Any, x: Tensor) -> Any:
    return m.c(m.a(x)[:, 1:].relu())


def strided_first(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x)[:, :, ::2].relu())


def pooled_whole(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x).amax((2, 3)))


def turned(m: Any, x: Tensor) -> Any:
    return m.b(torch.cat([m.a(x).flatten(2), x.flatten(2)], 1).transpose(1, 2))


SHARES: dict[str, tuple[nn.Module, dict[str, tuple[int, ...] | None]]] = {
    # all of 2 and of 3 of the channels of the join; the pool keeps them
    "parts of a join": (
        Given(joined, a=conv(1, 2), b=conv(1, 3), c=conv(5, 1)),
        {
            "conv2d": (1, 1, 0, 0, 0),
            "conv2d_1": (0, 0, 1, 1, 1),
            "max_pool2d": (0, 0, 1, 1, 1),
            "cat": (),
        },
    ),
    # each channel is in two places, and the gates there may differ
    "one tensor twice in a join": (
        Given(joined_twice, a=conv(1, 2), c=conv(4, 1)),
        {"conv2d": None, "cat": ()},
    ),
    "slices of channels and of space": (
        Given(sliced, a=conv(1, 3), b=conv(3, 1), c=conv(2, 1), d=conv(3, 1)),
        {"conv2d": (), "slice_2": (0, 1, 1), "slice_4": ()},
    ),
    # nothing says how many bits the first channel has
    "a channel that is dropped": (
        Given(sliced_first, a=conv(1, 3), c=conv(2, 1)),
        {"conv2d": None, "slice_2": ()},
    ),
    "rows that are dropped": (
        Given(strided_first, a=conv(1, 2), b=conv(2, 1)),
        {"conv2d": (), "slice_2": ()},
    ),
    "the largest of each channel": (
        Given(pooled_whole, a=conv(1, 2), b=nn.Linear(2, 1)),
        {"conv2d": (), "amax": ()},
    ),
    "the channels of tokens": (
        Given(turned, a=conv(1, 2), b=nn.Linear(3, 1)),
        {"conv2d": (1, 1, 0), "cat": ()},
    ),
}


@pytest.mark.parametrize(("net", "expected"), SHARES.values(), ids=SHARES)
def test_what_each_gate_stands_for(
    net: nn.Module, expected: dict[str, tuple[int, ...] | None]
) -> None:
    scheme = Scheme(activations="channel")
    tensors = quantized(net, torch.randn(2, *IMAGE), scheme)[1].tensors
    found = {t.name: t.shares for t in tensors if t.name in expected}
    assert found == expected
