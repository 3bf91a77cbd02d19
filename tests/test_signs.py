"""What is proved never to be negative."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cgmq_fx import Scheme, prepare
from cgmq_fx.graphs import float_graph
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.signs import non_negative
from tests.nets import call, distance

Function = Callable[[Tensor], Tensor]

PROVED: dict[str, Function] = {
    "relu": lambda x: x.relu(),
    "sum": lambda x: x.relu() + x.abs(),
    "min of two": lambda x: torch.min(x.relu(), x.abs()),
    "minimum of two": lambda x: torch.minimum(x.relu(), x.abs()),
    "max of the first": lambda x: torch.max(x.relu(), x),
    "max of the second": lambda x: torch.max(x, x.relu()),
    "maximum of one": lambda x: torch.maximum(x, x.abs()),
    "max along an axis": lambda x: x.relu().max(1)[0],
    "clamp": lambda x: x.clamp(0.5, 2),
    "zeros": lambda x: torch.cat([x.relu(), torch.zeros_like(x)], 1),
    "full": lambda x: x.relu() * torch.full_like(x, 0.5),
    "part of one": lambda x: x.relu().slice_scatter(x[:, :2].abs(), 1, 0, 2),
}
NOT_PROVED: dict[str, Function] = {
    "sum": lambda x: x.relu() + x,
    "min of the first": lambda x: torch.min(x.relu(), x),
    "min of the second": lambda x: torch.min(x, x.relu()),
    "minimum": lambda x: torch.minimum(x.relu(), x),
    "max": lambda x: torch.max(x, x - 1),
    "clamp to below": lambda x: x.clamp(0, -1),
    "full": lambda x: x.relu() * torch.full_like(x, -0.5),
    "part of one": lambda x: x.relu().slice_scatter(x[:, :2], 1, 0, 2),
    "column of one": lambda x: x.relu().select_scatter(x[:, 0], 1, 0),
    "whole around one": lambda x: x.slice_scatter(x[:, :2].relu(), 1, 0, 2),
}
ALL = [(name, f, True) for name, f in PROVED.items()]
ALL += [(name, f, False) for name, f in NOT_PROVED.items()]


class Applies(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(("name", "function", "proved"), ALL, ids=[f"{n}-{p}" for n, _, p in ALL])
def test_signs(name: str, function: Function, proved: bool) -> None:
    graph = float_graph(Applies(function), ExampleInputs((torch.randn(3, 4),))).module.graph
    (result,) = graph.output_node().all_input_nodes
    assert non_negative(result) is proved


def written(x: Tensor) -> Tensor:
    y = x.relu()
    y.detach()[:, 0] = -1
    return y * 2


def written_before(x: Tensor) -> Tensor:
    y = x.relu()
    z = y[:, :2]
    y.detach()[:, 0] = -1
    return z * 2


@pytest.mark.parametrize("function", [written, written_before])
def test_what_is_written_in_place_proves_nothing(function: Function) -> None:
    graph = float_graph(Applies(function), ExampleInputs((torch.randn(3, 4),))).module.graph
    assert not non_negative(graph.output_node().all_input_nodes[0])


def test_the_smaller_of_two_keeps_its_negative_values() -> None:
    class Smaller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            z: Tensor = self.last(torch.min(y.relu(), y))
            return z

    torch.manual_seed(0)
    model, x = Smaller(), torch.randn(64, 4)
    result = prepare(model, "bops <= 100%", x, scheme=Scheme((16,))).finalize()
    inputs = ExampleInputs((x,))
    assert distance(call(result.model, inputs), call(model, inputs)) < 1e-3
