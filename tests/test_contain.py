"""Graphs for runtimes with 8-bit tensors: the same values, every op between two of codes."""

from __future__ import annotations

from collections import Counter
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from cgmq_fx import PRESETS, Scheme, UnsupportedModelError, prepare
from cgmq_fx.passes.codes import is_quantize
from cgmq_fx.passes.contain import HoistCodes, contained
from cgmq_fx.passes.copying import copy_graph
from cgmq_fx.passes.infra import run_passes
from cgmq_fx.passes.insert import QUANTIZERS
from cgmq_fx.passes.lower import lower
from cgmq_fx.passes.optable import compute_op
from tests.deploy_nets import deployed, inputs_of
from tests.nets import NETS, call, distance, op_name, ops

CASES = [
    ("lenet5", "integer channel", False),
    ("lenet5", "integer", True),
    ("mlp", "integer element", False),
    ("mlp", "fpga", True),
    ("parts", "integer channel", False),
    ("resnet20", "integer", False),
    ("separable", "tensor", True),
    ("transformer", "integer", False),
]


@pytest.mark.parametrize(("name", "scheme", "float_weights"), CASES)
def test_values_are_those_of_the_frozen_graph(name: str, scheme: str, float_weights: bool) -> None:
    result = deployed(name, scheme)
    module = contained(lower(result.model, result.inputs), float_weights)
    inputs = inputs_of(name, 3).map(lambda t: 3 * t if t.is_floating_point() else t)
    # float32 sums in another order can round a tie to the other code, and 20 layers meet some
    within = 0.02 if name == "resnet20" else 1e-5
    assert distance(call(module, inputs), call(result.model, inputs)) < within


@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_graph_can_be_contained(name: str) -> None:
    net, scheme = NETS[name], PRESETS["xnnpack"].scheme
    result = prepare(net.build(), "bops <= 30%", net.inputs(2), scheme=scheme).finalize()
    module = contained(lower(result.model, result.inputs))
    inputs = net.inputs(3)
    assert distance(call(module, inputs), call(result.model, inputs)) < 1e-5
    assert "cgmq_fx" not in module.code


def in_containers(name: str, scheme: str) -> GraphModule:
    result = deployed(name, scheme)
    return contained(lower(result.model, result.inputs))


@pytest.mark.parametrize("name", ["lenet5", "resnet20"])
def test_every_op_stands_between_codes(name: str) -> None:
    module = in_containers(name, "integer")
    fused = ("relu", "quantize_per_tensor")
    for node in module.graph.nodes:
        if node.op != "call_function" or "quantize" in op_name(node):
            continue
        after = {op_name(user) for user in node.users}
        assert after <= ({*fused} if compute_op(node) or op_name(node) == "add" else {fused[1]})
        if op_name(node) != "relu":
            read = {op_name(n) for n in node.all_input_nodes if n.op == "call_function"}
            assert read <= {"dequantize_per_tensor", "dequantize_per_channel"}


def test_every_reader_has_a_dequantize_of_its_own() -> None:
    module = in_containers("resnet20", "integer")
    shared = [n for n in module.graph.nodes if "dequantize" in op_name(n) and len(n.users) > 1]
    assert shared == []


# Behind a ReLU the container is the upper limit and the ReLU the lower one: no clamp is needed but
# at the input and at the signed output, whose lowest code is -127 and not -128.
@pytest.mark.parametrize(
    ("name", "relus", "clamps"), [("lenet5", 3, 2), ("mlp", 2, 2), ("separable", 3, 2)]
)
def test_limits_are_ops_only_where_they_must_be(name: str, relus: int, clamps: int) -> None:
    found = Counter(ops(in_containers(name, "integer")))
    assert (found["relu"], found["clamp"]) == (relus, clamps)


class PoolFirst(nn.Module):
    """A ReLU behind the pool, as many people write it; two branches that are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 3, 3)
        self.c = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [torch.max_pool2d(conv(x), 2).relu() for conv in (self.a, self.b)]
        return cast(Tensor, self.c(torch.cat(parts, 1)))


def test_rounding_moves_in_front_of_pools_and_joins() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, 1, 8, 8)
    scheme = PRESETS["xnnpack"].scheme
    result = prepare(PoolFirst(), "bops <= 5%", inputs, scheme=scheme).finalize()
    lowered = lower(result.model, result.inputs)
    hoisted = run_passes(copy_graph(lowered), [HoistCodes()])
    before = [op_name(n.all_input_nodes[0]) for n in hoisted.graph.nodes if is_quantize(n)]
    assert Counter(before) == {"x": 1, "conv2d": 3}
    module = contained(lowered)
    assert Counter(ops(module))["relu"] == 2
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(module(x), result.model(x))


class Shifts(nn.Module):
    """A part of a tensor is written after it was made, and read in a way that stays in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 3, 1), nn.Conv1d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = torch.zeros_like(y)
        z.detach()[:, :, 1:] = y[:, :, :-1]
        return cast(Tensor, self.b(torch.cat([y, z], 1)))


def test_rounding_stays_behind_what_is_written_in_place() -> None:
    torch.manual_seed(0)
    scheme = PRESETS["xnnpack"].scheme
    result = prepare(Shifts(), "bops <= 10%", torch.randn(8, 2, 6), scheme=scheme).finalize()
    assert "copy_" in ops(result.model)
    x = torch.randn(5, 2, 6)
    assert torch.equal(contained(lower(result.model, result.inputs))(x), result.model(x))


REFUSED = [
    ("mlp", "w16", "codes from .* do not fit into 8 bits|more than 8 bits"),
    ("mlp", "both", "bit-widths of its own per channel"),
]


@pytest.mark.parametrize(("name", "scheme", "message"), REFUSED)
def test_what_no_container_holds_is_refused(name: str, scheme: str, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        in_containers(name, scheme)


def test_float_layers_stay_float() -> None:
    result = prepare(
        nn.Linear(3, 2), "bops <= 100%", torch.randn(2, 3), scheme=Scheme((32,))
    ).finalize()
    assert not list(result.model.get_submodule(QUANTIZERS).children())
    module = contained(lower(result.model, result.inputs))
    assert ops(module) == ["linear"]
