"""MACs of ops that are written out as products: by hand, and by torch's counter if it is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import cgmq_fx
from cgmq_fx.graphs import float_graph
from cgmq_fx.passes.inputs import ExampleInputs
from tests.nets import distance

BATCH = 3
Shape = tuple[int, ...]


class Apply(nn.Module):
    """A function of the input and a parameter."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


class First(nn.Module):
    """The first output of a layer that has several."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        output = self.layer(x)
        return output[0] if isinstance(output, tuple) else output


def attend(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, **options) * weight


def convolve(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    return torch.convolution(x, weight, None, [1], [0], [1], transposed, [0], 1)


def complex_product(x: Tensor, weight: Tensor) -> Tensor:
    return (torch.complex(x, x) @ torch.complex(weight, weight)).abs()


# name: (model, shape without batch, MACs per sample)
PRODUCTS: dict[str, tuple[nn.Module, Shape, int]] = {
    "mv": (Apply(torch.mv, 5), (5,), 5),
    "dot": (Apply(lambda x, w: torch.dot(x.reshape(-1), w), 15), (5,), 15),  # over all samples
    "inner": (Apply(torch.inner, 4, 5), (5,), 4 * 5),
    "inner of a vector": (Apply(torch.inner, 5), (2, 5), 2 * 5),
    "inner of tokens": (Apply(torch.inner, 2, 4, 5), (6, 5), 6 * 8 * 5),
    "vecdot": (Apply(torch.linalg.vecdot, 5), (4, 5), 4 * 5),
    "linalg.matmul": (Apply(torch.linalg.matmul, 5, 4), (5,), 5 * 4),
    "tensordot": (
        Apply(lambda x, w: torch.tensordot(x, w, dims=([1, 2], [0, 1])), 2, 5, 4),
        (2, 5),
        4 * 10,
    ),
    "multi_dot": (Apply(lambda x, w: torch.linalg.multi_dot([x, w]), 5, 4), (5,), 5 * 4),
    "matrix_power": (Apply(lambda x, w: torch.matrix_power(x, 3) * w, 1), (5, 5), 2 * 125),
    "addmv": (Apply(lambda x, w: torch.addmv(x[:, 0], x, w, alpha=2), 5), (5,), 5),
    "addbmm": (Apply(lambda x, w: torch.addbmm(w, x, x, beta=0.5), 4, 4), (4, 4), 64),
    "conv_tbc": (
        Apply(lambda x, w: torch.conv_tbc(x, w, w[0, 0]), 2, 5, 4),
        (2, 5),
        (2 * 2 * 4) * (2 * 5),  # time comes first: two steps of output, two sequences
    ),
    "convolution": (Apply(lambda x, w: convolve(x, w, False), 4, 3, 3), (3, 6), (4 * 4) * (3 * 3)),
    "convolution back": (
        Apply(lambda x, w: convolve(x, w, True), 3, 4, 3),
        (3, 6),
        (3 * 6) * (4 * 3),
    ),
    "bilinear": (Apply(lambda x, w: F.bilinear(x, x, w), 3, 5, 5), (5,), 15 * 5 + 3 * 5),
    "einsum": (Apply(lambda x, w: torch.einsum("bi,ij->bj", x, w), 5, 4), (5,), 5 * 4),
    "einsum of heads": (
        Apply(lambda x, w: torch.einsum("bhqd,bhkd->bhqk", x, x * w), 1),
        (2, 4, 5),
        2 * 4 * 4 * 5,
    ),
    "einsum of images": (
        Apply(lambda x, w: torch.einsum("bchw,oc->bohw", x, w), 6, 3),
        (3, 4, 5),
        (6 * 4 * 5) * 3,
    ),
    "einsum of three": (
        Apply(lambda x, w: torch.einsum("bi,ij,kj->bk", x, w, w), 5, 4),
        (5,),
        5 * 4 + 4 * 5,
    ),
    "lstm": (First(nn.LSTM(5, 4, batch_first=True)), (6, 5), 6 * (16 * 5 + 16 * 4)),
    "gru": (First(nn.GRU(5, 4, batch_first=True)), (6, 5), 6 * (12 * 5 + 12 * 4)),
    "rnn": (
        First(nn.RNN(5, 4, 2, batch_first=True, bidirectional=True)),
        (6, 5),
        2 * 6 * (4 * 5 + 4 * 4) + 2 * 6 * (4 * 8 + 4 * 4),
    ),
    "lstm cell": (First(nn.LSTMCell(5, 4)), (5,), 16 * 5 + 16 * 4),
    "gru cell": (First(nn.GRUCell(5, 4)), (5,), 12 * 5 + 12 * 4),
    "rnn cell": (First(nn.RNNCell(5, 4)), (5,), 4 * 5 + 4 * 4),
    "attention": (Apply(attend, 1), (4, 5, 8), 2 * 4 * 5 * 5 * 8),
    "causal attention": (
        Apply(lambda x, w: attend(x, w, is_causal=True), 1),
        (4, 5, 8),
        2 * 4 * 5 * 5 * 8,
    ),
    "masked attention": (
        Apply(lambda x, w: attend(x, w[0], attn_mask=w), 5, 5),
        (4, 5, 5),
        2 * 4 * 5 * 5 * 5,
    ),
    "complex": (Apply(complex_product, 4, 5), (4,), 4 * 4 * 5),
    "outer": (Apply(lambda x, w: torch.outer(x[:, 0], w), 4), (5,), 0),
    "addr": (Apply(lambda x, w: torch.addr(x, x[:, 0], w), 5), (5,), 0),
    "kron": (Apply(torch.kron, 2, 2), (5,), 0),
}

# why torch's counter does not give the count
COUNTER_DIFFERS = {
    "mv": "no formula for matrix times vector",
    "dot": "no formula for dot",
    "vecdot": "no formula: a product and a sum",
    "addmv": "no formula for addmv",
    "addbmm": "no formula for addbmm",
    "conv_tbc": "no formula for conv_tbc",
    "bilinear": "no formula for bilinear",
    "lstm": "the fused op has no formula",
    "attention": "the CPU's fused op has no formula",
    "causal attention": "the CPU's fused op has no formula",
    "complex": "one complex product counts once, though it is four",
}


@pytest.mark.parametrize(("model", "shape", "macs"), PRODUCTS.values(), ids=PRODUCTS)
def test_macs_equal_a_hand_count(model: nn.Module, shape: Shape, macs: int) -> None:
    costs = cgmq_fx.cost(model, torch.rand(BATCH, *shape), "macs")
    assert costs["macs"].totals[32] == macs
    assert not costs.facts.unknown
    products = [node for node in costs.nodes if node.operands]
    assert all(o.quantizer for node in products for o in node.operands)


@pytest.mark.parametrize(("model", "shape", "macs"), PRODUCTS.values(), ids=PRODUCTS)
def test_what_is_written_out_is_equal(model: nn.Module, shape: Shape, macs: int) -> None:
    x = torch.rand(BATCH, *shape)
    graph = float_graph(model, ExampleInputs((x,))).module
    with torch.no_grad():
        assert distance([graph(x)], [model(x)]) < 1e-5


@pytest.mark.parametrize("name", PRODUCTS)
def test_torchs_counter_agrees_where_it_is_right(name: str) -> None:
    model, shape, macs = PRODUCTS[name]
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(BATCH, *shape))
    agrees = counter.get_total_flops() == 2 * BATCH * macs
    assert agrees == (name not in COUNTER_DIFFERS), counter.get_flop_counts()
