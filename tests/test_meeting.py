"""Every product counts at the bits of its own two factors: against a count of all products.

The count runs the graph on bits in the place of values, so it knows nothing of gates or channels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional as F

import cgmq_fx
from cgmq_fx import Scheme
from cgmq_fx.cost_models import Assignment, BOPs, MACs, parse_budget
from cgmq_fx.exporters.code_bits import Layout as FileLayout
from cgmq_fx.exporters.cost_graph import CostGraph, Manifest
from cgmq_fx.passes.insert import QUANTIZERS
from cgmq_fx.passes.oplists import PADS
from cgmq_fx.passes.optable import Layout, argument, compute_op
from cgmq_fx.passes.quantizer import Quantizer
from tests.cost_helpers import cost, quantized
from tests.deploy_nets import assert_counted

BATCH = 2
CHANNEL = Scheme((0, 2, 4, 8), weights="channel", activations="channel")
ELEMENT = Scheme((0, 2, 4, 8), weights="element", activations="channel")
Shape = tuple[int, ...]


class Products(Interpreter):
    """Runs a graph on bits, and adds up all products.

    Attributes:
        bops: Sum over all products of the bits of one factor times those of the other.
        macs: How many products have two factors of more than 0 bits.
    """

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.bops = self.macs = 0.0

    def run_node(self, n: Node) -> Any:
        """Bits behind a quantizer, what is made of them behind an op."""
        op = compute_op(n)
        if op is not None:
            first, second = self.env[argument(n, op.activation)], self.env[argument(n, op.weight)]
            self.bops += float(self._products(n, op.layout, first, second).sum())
            used = [(factor > 0).double() for factor in (first, second)]
            made = self._products(n, op.layout, *used)
            self.macs += float(made.sum())
            return made
        if n.op == "call_module":
            owner = self.module.get_submodule(str(n.target))
            given = self.env[n.all_input_nodes[0]]
            return (
                owner.bits.expand(given.shape).double() if isinstance(owner, Quantizer) else given
            )
        if n.target in PADS:
            return F.pad(self.env[n.all_input_nodes[0]], argument(n, "pad"), mode="replicate")
        return super().run_node(n)

    def _products(self, node: Node, layout: Layout, first: Tensor, second: Tensor) -> Tensor:
        if layout is Layout.PRODUCT:
            return first @ second
        if layout is Layout.LINEAR:
            return F.linear(first, second)
        target: Any = node.target
        names = [a.name for a in target._schema.arguments[3:]]
        return target(first, second, None, **{n: argument(node, n) for n in names})  # type: ignore[no-any-return]


class Net(nn.Module):
    """Layers and parameters, and what is done with them."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def shuffled(x: Tensor, groups: int) -> Tensor:
    batch, channels, *space = x.shape
    parts = x.view(batch, groups, channels // groups, *space)
    return parts.transpose(1, 2).reshape(batch, channels, *space)


def heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)


def attended(m: Any, x: Tensor) -> Tensor:
    y = heads(m.a(x))
    return m.b(((y @ y.transpose(2, 3)).softmax(-1) @ y).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def parted(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    first, second = y.chunk(2, 1)
    return m.b(y) + m.c(first) * m.c(second)  # type: ignore[no-any-return]


def over_both(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)  # as many tokens as channels
    return m.b(y.transpose(1, 2)) + m.b(y)  # type: ignore[no-any-return]


def one_token(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y) + m.c(y[:, 0])[:, None]  # type: ignore[no-any-return]


def largest(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y) + m.c(y.amax(1))[:, None]  # type: ignore[no-any-return]


def padded_for_one(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    return m.b(F.pad(y, (1, 1, 1, 1))) + m.c(y)  # type: ignore[no-any-return]


def moved_by_padding(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    return m.b(F.pad(y, (1, -1))) + m.c(y)  # type: ignore[no-any-return]


def over_time(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x).transpose(1, 2))  # type: ignore[no-any-return]


def two() -> dict[str, nn.Module]:
    return {"a": nn.Linear(4, 8), "b": nn.Linear(4, 8)}


def convolutions(groups: int, **options: Any) -> dict[str, nn.Module]:
    return {"a": nn.Conv2d(3, 16, 3), "b": nn.Conv2d(16, 16, 3, groups=groups, **options)}


TOKENS, IMAGE = (6, 4), (3, 7, 7)
NETS: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "with itself": (
        lambda: Net(lambda m, x: torch.bmm(y := m.a(x), y.transpose(1, 2)), a=nn.Linear(4, 8)),
        TOKENS,
    ),
    "a matrix with itself": (
        lambda: Net(lambda m, x: (y := m.a(x)) @ y.t(), a=nn.Linear(4, 8)),
        (4,),
    ),
    "einsum over channels": (
        lambda: Net(lambda m, x: torch.einsum("bid,bjd->bij", m.a(x), m.b(x)), **two()),
        TOKENS,
    ),
    "einsum over tokens": (
        lambda: Net(lambda m, x: torch.einsum("bid,bie->bde", m.a(x), m.b(x)), **two()),
        TOKENS,
    ),
    "einsum over channels backwards": (
        lambda: Net(lambda m, x: torch.einsum("bid,bjd->bij", m.a(x), m.b(x).flip(2)), **two()),
        TOKENS,
    ),
    "heads": (lambda: Net(attended, a=nn.Linear(4, 8), b=nn.Linear(8, 8)), TOKENS),
    "shuffle": (
        lambda: Net(lambda m, x: m.b(shuffled(m.a(x).relu(), 4)), **convolutions(4)),
        IMAGE,
    ),
    "shuffle op": (
        lambda: Net(lambda m, x: m.b(torch.channel_shuffle(m.a(x).relu(), 2)), **convolutions(8)),
        IMAGE,
    ),
    "shuffle, padded": (
        lambda: Net(
            lambda m, x: m.b(F.pad(shuffled(m.a(x).relu(), 2), (1, 0, 2, 1))), **convolutions(2)
        ),
        IMAGE,
    ),
    "padded for one layer": (
        lambda: Net(
            padded_for_one, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 3), c=nn.Conv2d(8, 4, 1)
        ),
        IMAGE,
    ),
    "moved by padding": (
        lambda: Net(moved_by_padding, a=nn.Linear(4, 6), b=nn.Linear(6, 5), c=nn.Linear(6, 5)),
        TOKENS,
    ),
    "shuffle, transposed convolution": (
        lambda: Net(
            lambda m, x: m.b(shuffled(m.a(x).relu(), 4)),
            a=nn.Conv2d(3, 16, 3),
            b=nn.ConvTranspose2d(16, 8, 1, groups=2),
        ),
        IMAGE,
    ),
    "shuffle, flattened": (
        lambda: Net(
            lambda m, x: m.b(shuffled(m.a(x).relu(), 2).flatten(1)),
            a=nn.Conv2d(3, 4, 3),
            b=nn.Linear(100, 6),
        ),
        IMAGE,
    ),
    "parts": (
        lambda: Net(parted, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 1), c=nn.Conv2d(4, 4, 1)),
        IMAGE,
    ),
    "tokens or channels": (
        lambda: Net(over_both, a=nn.Linear(4, 6), b=nn.Linear(6, 5)),
        TOKENS,
    ),
    "one token": (
        lambda: Net(one_token, a=nn.Linear(4, 8), b=nn.Linear(8, 5), c=nn.Linear(8, 5)),
        TOKENS,
    ),
    "the largest": (
        lambda: Net(largest, a=nn.Linear(4, 8), b=nn.Linear(8, 5), c=nn.Linear(8, 5)),
        TOKENS,
    ),
    "as many tokens as channels": (
        lambda: Net(over_time, a=nn.Linear(4, 6), b=nn.Conv1d(6, 5, 3)),
        TOKENS,
    ),
    "a weight from the right": (
        lambda: Net(
            lambda m, x: m.a(x) @ m.w.permute(0, 2, 1),
            a=nn.Linear(4, 8),
            w=nn.Parameter(torch.randn(2, 8, 8)),
        ),
        TOKENS,
    ),
    "pixels": (
        lambda: Net(
            lambda m, x: m.b(F.pixel_unshuffle(m.a(x).relu(), 2)),
            a=nn.Conv2d(3, 4, 2),
            b=nn.Conv2d(16, 6, 1, groups=2),
        ),
        IMAGE,
    ),
}


def at_random(module: GraphModule, seed: int) -> Assignment:
    """Give every gate a bit-width at random."""
    rng, found = np.random.default_rng(seed), {}
    for name, quantizer in module.get_submodule(QUANTIZERS).named_children():
        if isinstance(quantizer, Quantizer):
            bits = rng.choice(quantizer.spec.bit_widths, quantizer.bits.shape)
            quantizer.bits.copy_(torch.from_numpy(np.asarray(bits)))
            found[name] = np.asarray(bits, dtype=np.int64).ravel()
    return found


def products(module: GraphModule, x: Tensor) -> tuple[float, float]:
    """BOPs and MACs per sample, product by product."""
    counted = Products(module)
    with torch.no_grad():
        counted.run(x.double())
    return counted.bops / len(x), counted.macs / len(x)


@pytest.mark.parametrize("scheme", [CHANNEL, ELEMENT], ids=["channel", "element"])
@pytest.mark.parametrize("name", NETS)
def test_every_product_counts_at_the_bits_of_its_own_factors(name: str, scheme: Scheme) -> None:
    make, shape = NETS[name]
    x = torch.rand(BATCH, *shape)
    module, facts = quantized(make().eval(), x, scheme)
    for seed in range(3):
        assignment = at_random(module, seed)
        found = cost(BOPs(), facts, assignment), cost(MACs(), facts, assignment)
        assert found == pytest.approx(products(module, x))


def test_gates_that_cannot_be_followed_are_one() -> None:
    make, shape = NETS["as many tokens as channels"]
    module, _ = quantized(make(), torch.rand(BATCH, *shape), CHANNEL)
    gates = module.get_submodule(QUANTIZERS).get_submodule("linear").get_buffer("bits")
    assert gates.shape == ()


@pytest.mark.parametrize(
    ("op", "channels"), [(torch.ops.aten.slice.Tensor, 2), (torch.ops.aten.pad.default, 4)]
)
def test_gates_that_a_file_does_not_place_count_at_their_most_bits(op: Any, channels: int) -> None:
    graph, layout = CostGraph(), FileLayout((2, 4, 8), (1, 4, 1, 1))
    x = graph.input((1, 4, 2, 2), torch.float32)
    high = np.array([3, 15, 3, 255]).reshape(1, 4, 1, 1)
    rounded = graph.activation(x, 0 * high, high, np.ones((1, 4, 1, 1)), layout)
    part = graph.call(op, (rounded,), (1, channels, 2, 2))  # which ones?
    weight = graph.weight(np.full((3, channels, 1, 1), 7), (), FileLayout((4,)))
    made = graph.call(torch.ops.aten.conv2d.default, (part, weight), (1, 3, 2, 2))
    (state,), _ = graph.count([made], parse_budget("bops <= 1"), Manifest(batch=1))
    assert state.value == 3 * 4 * channels * 4 * 8


FILES = ["heads", "shuffle", "padded for one layer", "parts", "one token", "the largest"]


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("name", FILES)
def test_files_cost_what_was_counted(name: str, suffix: str, tmp_path: Path) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    make, shape = NETS[name]
    torch.manual_seed(0)
    x = torch.randn(BATCH, *shape)
    scheme = Scheme((2, 4, 8), weights="channel", activations="channel")
    prepared = cgmq_fx.prepare(make().eval(), "bops <= 101%", x, scheme=scheme)
    prepared.calibrate([x])
    prepared.freeze(at_random(prepared.model, 0))
    result = prepared.finalize()
    assert result.cost["bops"].value == pytest.approx(products(result.model, x)[0])
    assert_counted(result.export(tmp_path / f"net{suffix}"), result)
