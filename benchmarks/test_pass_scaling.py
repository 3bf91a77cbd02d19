"""How long the passes take over the size of the graph.

    python -m pytest benchmarks/test_pass_scaling.py

A chain of residual blocks of linear layers, norms and activations, captured once; the passes behind
torch.export are timed: normalise, insert quantizers, annotate. One core is enough for it.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from cgmq_fx.graphs import normalised, quantized_graph
from cgmq_fx.passes.capture import Captured, capture
from cgmq_fx.passes.copying import copy_graph
from cgmq_fx.passes.inputs import ExampleInputs
from cgmq_fx.passes.scheme import Scheme

_NODES_PER_BLOCK = 10


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(self.norm(x)).relu())
        return x + y.view(-1, 8)


def captured(nodes: int) -> Captured:
    blocks = nn.Sequential(*(Block() for _ in range(nodes // _NODES_PER_BLOCK)))
    return capture(blocks, ExampleInputs((torch.rand(2, 8),)))


def passes(found: Captured) -> int:
    """All passes behind the capture; the number of compute nodes."""
    _, facts = quantized_graph(normalised(found), Scheme())
    return len([node for node in facts.nodes if node.operands])


@pytest.mark.parametrize("nodes", [1250, 2500, 5000, 10_000])
def test_passes(benchmark: BenchmarkFixture, nodes: int) -> None:
    found = captured(nodes)
    size = len(found.module.graph.nodes)
    benchmark.extra_info["nodes"] = size
    assert size >= nodes

    def fresh() -> tuple[tuple[Captured], dict[str, object]]:
        return (Captured(copy_graph(found.module), found.inputs, found.dynamic),), {}

    count = benchmark.pedantic(passes, setup=fresh, rounds=1)  # type: ignore[no-untyped-call]
    assert count == 2 * (nodes // _NODES_PER_BLOCK)
