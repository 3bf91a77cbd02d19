"""Layers that are applied several times: which of their inputs share a quantizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import cgmq_fx
from cgmq_fx import Scheme
from cgmq_fx.cost_models.facts import Role
from cgmq_fx.graphs import float_graph
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.insert import QUANTIZERS
from cgmq_fx.passes.quantizer import Quantizer
from tests.deploy_nets import assert_counted
from tests.nets import quantized
from tests.test_bias import biases


class Cells(nn.Module):
    """A cell, step by step, behind a layer for its input and in front of one for its state."""

    def __init__(self, fed_back: bool = False) -> None:
        super().__init__()
        self.inner, self.cell, self.out = nn.Linear(4, 6), nn.LSTMCell(6, 6), nn.Linear(6, 4)
        self.fed_back = fed_back

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 6), x.new_zeros(len(x), 6)
        results = [x[:, 0]]
        for t in range(x.shape[1]):
            read = results[-1] if self.fed_back else x[:, t]
            state = self.cell(torch.relu(self.inner(read)), state)
            results.append(self.out(state[0]))
        return torch.stack(results[1:], 1)


class Frames(nn.Module):
    """A small network for each frame, and the mean of what it finds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh())
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        return self.out(torch.stack([self.net(frame) for frame in x.unbind(1)]).mean(0))


def head() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))


class Pyramid(nn.Module):
    """One head of two layers, or a copy for each map, on maps of two scales."""

    def __init__(self, scale: float = 1.0, copies: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.large, self.small = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = self.other = head()
        for name in ("second.bias", "head.0.bias", "head.2.bias"):
            self.get_parameter(name).data.mul_(0.02)  # what is left is of the scale of the map
        nn.init.xavier_uniform_(self.second.weight, scale)
        if copies:
            self.other = head()
            self.other.load_state_dict(self.head.state_dict())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        large = torch.relu(self.large(x))
        maps = self.first(large), self.second(torch.relu(self.small(large)))
        return self.head(maps[0]), self.other(maps[1])


class Siamese(nn.Module):
    """One network for two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cosine_similarity(self.net(x), self.net(y))


class Pools(nn.Module):
    """One layer for two pools of the same map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        result: Tensor = self.gate(x.mean((2, 3))) + self.gate(x.amax((2, 3)))
        return result


class Blocks(nn.Module):
    """One block several times, whose first input has not been normalised."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.count, self.norm = nn.Linear(4, 8), count, nn.LayerNorm(8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x) * 0.05
        for _ in range(self.count):
            x = self.norm(x + self.block(x))
        return x


class Maps(nn.Module):
    """One layer for vectors, and between them for what a map of two channels is flattened to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.mix = nn.Linear(8, 8), nn.Conv1d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(self.layer(x))
        x = torch.tanh(self.mix(x.view(-1, 2, 4))).flatten(1)
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return x


def shared(module: GraphModule) -> list[int]:
    """How many tensors a quantizer of activations has, where it has several."""
    called: dict[str, int] = {}
    for node in module.graph.find_nodes(op="call_module"):
        if str(node.target).startswith(QUANTIZERS):
            called[str(node.target)] = called.get(str(node.target), 0) + 1
    return [count for count in called.values() if count > 1]


def graph_of(net: nn.Module, *shapes: tuple[int, ...], scheme: Scheme | None = None) -> GraphModule:
    inputs = ExampleInputs(tuple(torch.randn(2, *shape) for shape in shapes))
    return quantized(float_graph(net, inputs), scheme)


RECURRENT: dict[str, tuple[Callable[[], nn.Module], int, list[int]]] = {
    # biases, and steps beyond the first that a quantizer has
    "lstm": (lambda: nn.LSTM(4, 6, batch_first=True), 2, [0]),
    "gru": (lambda: nn.GRU(4, 6, batch_first=True), 2, [0]),
    "two lstms": (lambda: nn.LSTM(4, 6, 2, batch_first=True), 4, [0, 0]),
    "cells": (Cells, 4, [0, 0, 1]),  # inputs, what the cell reads, states (one more)
    "fed back": (lambda: Cells(True), 5, [0, 1, -1]),  # the first input is another tensor
    "frames": (Frames, 3, [0, 0]),
}


@pytest.mark.parametrize("steps", [3, 9])
@pytest.mark.parametrize("name", RECURRENT)
def test_the_steps_of_a_recurrence_share(name: str, steps: int) -> None:
    make, stored, more = RECURRENT[name]
    module = graph_of(make(), (steps, 4))
    assert sorted(shared(module)) == sorted(steps + count for count in more)
    assert len(biases(module)) == stored


@pytest.mark.parametrize(
    ("net", "shapes", "stored"),
    [
        (Pyramid(), [(3, 16, 16)], 4 + 2 * 2),
        (Siamese(), [(4,), (4,)], 2 * 2),
        (Pools(), [(3, 8, 8)], 1 + 2),
    ],
)
def test_tensors_of_their_own_do_not_share(
    net: nn.Module, shapes: list[tuple[int, ...]], stored: int
) -> None:
    module = graph_of(net, *shapes)
    assert shared(module) == []
    assert len(biases(module)) == stored


@pytest.mark.parametrize("count", [3, 8])
def test_a_block_that_is_repeated_shares_but_for_its_first_input(count: int) -> None:
    module = graph_of(Blocks(count), (4,))
    assert sorted(shared(module)) == [count - 1, count]
    assert len(biases(module)) == 1 + 2 + 1


def test_tensors_share_where_their_gates_have_one_shape() -> None:
    module = graph_of(Maps(), (8,), scheme=Scheme(activations="channel"))
    found = []
    for node in module.graph.find_nodes(op="call_module"):
        owner = module.get_submodule(str(node.target))
        if isinstance(owner, Quantizer) and owner.spec.role is Role.ACTIVATION:
            found.append((owner.spec.gate_shape, tuple(node.meta["val"].shape)))
    vector = ((1, 8), (2, 8))
    assert found == [vector, vector, ((), (2, 8)), ((1, 2, 1), (2, 2, 4)), vector, vector]
    assert shared(module) == [3]  # all but the first vector, which is the input


def errors(net: nn.Module, data: list[Tensor]) -> list[float]:
    """The relative error of each output at 8 bits, without training."""
    scheme = Scheme((8,))
    result = cgmq_fx.quantize(
        net.eval(), "bops <= 100%", data, epochs=0, scheme=scheme, progress=False
    )
    with torch.no_grad():
        found, expected = result.model(data[0]), net(data[0])
    if isinstance(expected, Tensor):
        found, expected = [found], [expected]
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.02])
def test_one_head_on_maps_of_two_scales_is_as_good_as_two(scale: float) -> None:
    data = [torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))]
    one, two = errors(Pyramid(scale), data), errors(Pyramid(scale, copies=True), data)
    assert all(a < 1.5 * b for a, b in zip(one, two, strict=True))


def test_blocks_read_their_first_input_on_a_grid_of_its_own() -> None:
    data = [torch.randn(64, 4, generator=torch.Generator().manual_seed(1))]
    assert errors(Blocks(), data)[0] < 0.03


@pytest.mark.parametrize("kind", ["onnx", "pt2", "qonnx", "safetensors"])
def test_files_cost_what_the_result_does(kind: str, tmp_path: Path) -> None:
    """Biases on two grids are stored twice there as well."""
    if "onnx" in kind:
        pytest.importorskip("onnxscript")
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    budget = "bops <= 100%, weights <= 100%, activations <= 100%"
    prepared = cgmq_fx.prepare(Pyramid(0.1).eval(), budget, x, scheme=Scheme((4, 8)))
    prepared.calibrate([x])
    result = prepared.finalize()
    path = tmp_path / f"net.{kind.replace('qonnx', 'onnx')}"
    assert_counted(result.export(path, kind, verify=False), result)
