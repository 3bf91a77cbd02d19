"""Regions without gradients or without autocast are written out into the graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cgmq_fx.graphs import float_graph
from cgmq_fx.passes.inputs import ExampleInputs
from cgmq_fx.passes.wrappers import InlineRegions

HIGHER = torch.ops.higher_order
REGIONS = (HIGHER.wrap_with_set_grad_enabled, HIGHER.wrap_with_autocast)


class Regions(nn.Module):
    """A layer without gradients, one without autocast, and one within a region of a region."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            first = self.a(x)
            with torch.autocast("cpu", enabled=False):
                first, second = first * 2, first + torch.ones(4)
        with torch.autocast("cpu", enabled=False):
            last: Tensor = self.b(first).relu()
        out: Tensor = self.c(last) + second
        return out


@pytest.fixture
def found() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Regions()
    return model, float_graph(model, ExampleInputs((torch.rand(2, 4),))).module


def test_no_region_is_left(found: tuple[nn.Module, torch.fx.GraphModule]) -> None:
    graph = found[1].graph
    assert not [n for n in graph.nodes if n.target in REGIONS]
    assert len([n for n in graph.nodes if n.target is torch.ops.aten.linear.default]) == 3
    assert not InlineRegions().run(found[1]).modified


def test_the_graph_computes_the_same(found: tuple[nn.Module, nn.Module]) -> None:
    model, module = found
    x = torch.rand(5, 4)
    torch.testing.assert_close(module(x), model(x))


def test_what_had_no_gradient_has_none(found: tuple[nn.Module, nn.Module]) -> None:
    for net in found:
        net(torch.rand(2, 4)).sum().backward()
        grads = {name: p.grad is not None for name, p in net.named_parameters()}
        assert {n for n, there in grads.items() if there} == {
            *("b.weight", "b.bias", "c.weight", "c.bias")
        }
