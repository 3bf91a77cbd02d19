"""Costs by hand: the arithmetic stands beside each number."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.lenet5 import LeNet5
from cgmq_fx.cost_models import (
    BitArray,
    BOPs,
    MACs,
    NodeBits,
    NodeFacts,
    Operand,
    Role,
    Stored,
    WeightMemory,
    lowest_bits,
    node_bits,
    uniform_bits,
)
from cgmq_fx.passes.insert import QUANTIZERS
from cgmq_fx.passes.quantizer import Quantizer
from cgmq_fx.passes.scheme import Granularity, Scheme
from tests.cost_helpers import bits, cost, graph, linear, quantized

Cost = tuple[float, float, float]
"""BOPs, MACs and bytes."""

PER_CHANNEL = ((3, 1, 1), (1, 1, 1))  # a gate per output channel against one of the input
PER_ELEMENT = ((2, 2, 1), (1, 1, 1))
CHANNEL_X_ELEMENT = ((2, 2, 1), (1, 2, 1))
CHANNEL_X_TENSOR = ((1, 1, 1), (1, 4, 1))


def product(first: str | None, second: str | None) -> NodeFacts:
    """A product of two activations, 24 MACs."""
    operands = (Operand(Role.ACTIVATION, 6, first), Operand(Role.ACTIVATION, 8, second))
    return NodeFacts("attention", "aten.matmul.default", 24, operands)


def embedding(dtype_bits: int) -> NodeFacts:
    return NodeFacts("table", "aten.embedding.default", stored=(Stored("t", 10, bits=dtype_bits),))


SMALL = (2, 2)
CASES = {
    # 12 MACs x 4 x 8; 12 weights x 4 bits / 8 + 3 biases x 4 bytes
    "single gates": (linear("fc", "w", "x"), {"w": bits(4), "x": bits(8)}, (384, 12, 18)),
    # 12 x 8 x (2 + 4 + 8) / 3; 4 weights each at 2, 4 and 8 bits: 56 / 8 + 12
    "weight channels": (
        linear("fc", "w", "x", meets=PER_CHANNEL),
        {"w": bits(2, 4, 8), "x": bits(8)},
        (448, 12, 19),
    ),
    # 12 x 4 x (2 + 2 + 8 + 32) / 4; 12 x 4 / 8 + 12
    "activation channels": (
        linear("fc", "w", "x", meets=CHANNEL_X_TENSOR),
        {"w": bits(4), "x": bits(2, 2, 8, 32)},
        (528, 12, 18),
    ),
    # 4 x (2 + 4 + 8 + 32); 46 / 8 + 2 biases x 4
    "weight elements": (
        linear("fc", "w", "x", shape=SMALL, meets=PER_ELEMENT),
        {"w": bits(2, 4, 8, 32), "x": bits(4)},
        (184, 4, 13.75),
    ),
    # rows of the weight (2, 4) and (8, 32) against inputs of 2 and 8 bits:
    # 2 x 2 + 4 x 8 + 8 x 2 + 32 x 8; the product of the means would be 4 x 11.5 x 5 = 230
    "channels x elements": (
        linear("fc", "w", "x", shape=SMALL, meets=CHANNEL_X_ELEMENT),
        {"w": bits(2, 4, 8, 32), "x": bits(2, 8)},
        (308, 4, 13.75),
    ),
    # 12 x 8 x (0 + 4 + 8) / 3; 2 of 3 channels are left; 4 x (0 + 4 + 8) / 8 + 12
    "pruned channel": (
        linear("fc", "w", "x", meets=PER_CHANNEL),
        {"w": bits(0, 4, 8), "x": bits(8)},
        (384, 8, 18),
    ),
    # 1 x 0 products of the second column are gone: 2 x 2 + 8 x 2; weights are still stored
    "pruned input": (
        linear("fc", "w", "x", shape=SMALL, meets=CHANNEL_X_ELEMENT),
        {"w": bits(2, 4, 8, 32), "x": bits(2, 0)},
        (20, 2, 13.75),
    ),
    # 12 x 32 x 8; 12 x 32 / 8 + 12
    "float weight": (linear("fc", None, "x"), {"x": bits(8)}, (3072, 12, 60)),
    # 12 x (2 + 4 + 8) / 3 x 32
    "float activation": (
        linear("fc", "w", None, meets=PER_CHANNEL),
        {"w": bits(2, 4, 8)},
        (1792, 12, 19),
    ),
    # 24 x 4 x 8, nothing stored
    "two activations": (product("q", "k"), {"q": bits(4), "k": bits(8)}, (768, 24, 0)),
    # 24 x 32 x 32
    "float product": (product(None, None), {}, (24576, 24, 0)),
    # 10 x 16 / 8 bytes, no products
    "half table": (embedding(16), {}, (0, 0, 20)),
    "int64 buffer": (embedding(64), {}, (0, 0, 80)),
}


@pytest.mark.parametrize(("node", "assignment", "expected"), CASES.values(), ids=CASES)
def test_cost_by_hand(node: NodeFacts, assignment: dict[str, BitArray], expected: Cost) -> None:
    facts = graph(node, gates={name: b.size for name, b in assignment.items()})
    found = [cost(m, facts, assignment) for m in (BOPs(), MACs(), WeightMemory())]
    assert found == list(expected)


def test_a_graph_costs_the_sum_and_a_tied_weight_is_stored_once() -> None:
    facts = graph(linear("a", "w", "x"), linear("b", "w", "h", tied=True))
    assignment = {"w": bits(4), "x": bits(8), "h": bits(2)}
    assert cost(BOPs(), facts, assignment) == 12 * 4 * 8 + 12 * 4 * 2
    assert cost(WeightMemory(), facts, assignment) == 12 * 4 / 8 + 2 * 3 * 4


def test_mean_bits_of_the_operands() -> None:
    node = linear("fc", "w", "x", shape=SMALL, meets=CHANNEL_X_ELEMENT)
    found = node_bits(node, {"w": bits(2, 4, 8, 32), "x": bits(2, 8)})
    assert (found.weight, found.activation) == (46 / 4, 5)
    assert sorted(found.pairs) == [(1, 2, 2), (1, 4, 8), (1, 8, 2), (1, 32, 8)]
    assert NodeBits((), 0).weight == 0


def test_mixed_bits_are_the_mean_over_a_loop_over_all_elements() -> None:
    rng = np.random.default_rng(0)
    weight, inputs = rng.choice([0, 2, 4, 8], (5, 7)), rng.choice([0, 2, 16], 7)
    node = linear("fc", "w", "x", shape=(5, 7), meets=((5, 7, 1), (1, 7, 1)))
    facts = graph(node, gates={"w": 35, "x": 7})
    loop = [(int(weight[o, i]), int(inputs[i])) for o in range(5) for i in range(7)]
    assignment = {"w": weight.ravel(), "x": inputs}
    assert cost(BOPs(), facts, assignment) == pytest.approx(sum(w * a for w, a in loop), rel=1e-12)
    assert cost(MACs(), facts, assignment) == pytest.approx(sum(w * a > 0 for w, a in loop))


class Applied(nn.Module):
    """A layer behind a view of the input."""

    def __init__(self, layer: nn.Module, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.view = layer, view

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(self.view(x))
        return result


class Product(nn.Module):
    """`x @ weight`."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Shared(nn.Module):
    """Two layers on the grid of one quantizer, the second behind a max-pool."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(3, 2, 2, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.max_pool2d(x, 2)
        return torch.cat([self.first(x).flatten(1), self.second(pooled).flatten(1)], 1)


class BitsOf(nn.Module):
    """In the place of a quantizer: random bits of each gate, as a tensor of the tensor's shape."""

    def __init__(self, gates: tuple[int, ...], rng: np.random.Generator) -> None:
        super().__init__()
        self.drawn = torch.from_numpy(rng.choice([2, 4, 8, 16], gates))

    def forward(self, x: Tensor) -> Tensor:
        return self.drawn.to(x.dtype).expand_as(x)


MODULES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(3, 2, 2, bias=False), (3, 5)),
    "conv2d": (nn.Conv2d(3, 4, (2, 3), bias=False), (3, 4, 5)),
    "grouped": (nn.Conv2d(4, 6, 2, groups=2, bias=False), (4, 3, 3)),
    "depthwise": (nn.Conv2d(4, 8, 2, groups=4, bias=False), (4, 3, 3)),
    "transposed": (nn.ConvTranspose2d(3, 2, 2, bias=False), (3, 3, 3)),
    "grouped transposed": (nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False), (4, 3, 3)),
    "linear": (nn.Linear(5, 3, bias=False), (5,)),
    "tokens": (nn.Linear(5, 3, bias=False), (4, 5)),
    "flattened": (Applied(nn.Linear(12, 5, bias=False), lambda x: x.flatten(1)), (3, 2, 2)),
    "moved": (Applied(nn.Linear(3, 5, bias=False), lambda x: x.movedim(1, 3)), (3, 2, 4)),
    "mixed": (Applied(nn.Linear(4, 5, bias=False), lambda x: x.flatten(2)), (2, 2, 2)),
    "product": (Product(5, 3), (4, 5)),
    "shared": (Shared(), (3, 4, 6)),
}
WEIGHTS: tuple[Granularity, ...] = ("element", "channel", "tensor")
ACTIVATIONS: tuple[Granularity, ...] = ("channel", "tensor")
SCHEMES = [Scheme(weights=w, activations=a) for w, a in itertools.product(WEIGHTS, ACTIVATIONS)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.weights}-{s.activations}")
@pytest.mark.parametrize("name", MODULES)
def test_bops_are_the_sum_over_all_products(name: str, scheme: Scheme) -> None:
    module, shape = MODULES[name]
    graph_module, facts = quantized(module, torch.ones(2, *shape), scheme)
    container, rng = graph_module.get_submodule(QUANTIZERS), np.random.default_rng(0)
    assignment = {}
    for quantizer, owner in list(container.named_children()):
        assert isinstance(owner, Quantizer)
        stand_in = BitsOf(owner.spec.gate_shape, rng)
        container.add_module(quantizer, stand_in)
        assignment[quantizer] = stand_in.drawn.numpy().reshape(-1)
    every_product = float(graph_module(torch.ones(2, *shape)).sum()) / 2
    assert cost(BOPs(), facts, assignment) == pytest.approx(every_product, rel=1e-12)


def test_lenet_at_two_bits() -> None:
    _, facts = quantized(LeNet5(), torch.zeros(2, 1, 28, 28), Scheme())
    full = uniform_bits(facts, 32)
    # 24 x 24 x 32 x 25 + 8 x 8 x 64 x 800 + 512 x 1024 + 10 x 512
    assert cost(MACs(), facts, full) == 460_800 + 3_276_800 + 524_288 + 5_120 == 4_267_008
    assert cost(BOPs(), facts, full) == 4_267_008 * 32 * 32
    low = lowest_bits(facts)
    assert cost(BOPs(), facts, low) / cost(BOPs(), facts, full) == 0.00390625  # (2 x 2) / (32 x 32)
    # (800 + 51,200 + 524,288 + 5,120) x 2 / 8 + (32 + 64 + 512 + 10) x 4
    assert cost(WeightMemory(), facts, low) == 145_352 + 2_472


def test_lenet_with_an_input_of_eight_bits() -> None:
    _, facts = quantized(LeNet5(), torch.zeros(2, 1, 28, 28), Scheme(input_bits=8))
    least = cost(BOPs(), facts, lowest_bits(facts))
    # The first convolution at 2 x 8 bits, the rest at 2 x 2: 0.517 % of 4,267,008 x 1024.
    assert least == 460_800 * 16 + 3_806_208 * 4 == 22_597_632
    assert f"{least / cost(BOPs(), facts, uniform_bits(facts, 32)):.4%}" == "0.5172%"


class Tied(nn.Module):
    """One weight of 25 elements, read by two layers with biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x).relu())
        return result


def test_a_tied_weight_of_a_module_is_stored_once() -> None:
    _, facts = quantized(Tied(), torch.zeros(2, 5), Scheme())
    assert cost(MACs(), facts, uniform_bits(facts, 4)) == 25 + 25
    assert cost(WeightMemory(), facts, uniform_bits(facts, 4)) == 25 * 4 / 8 + 2 * 5 * 4
