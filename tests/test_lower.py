from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from cgmq_fx import Scheme, UnsupportedModelError, prepare
from cgmq_fx.passes.absorb import AbsorbClamps
from cgmq_fx.passes.bias import BIASES
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.codes import (
    DEQUANTIZE,
    QUANTIZE,
    container,
    dequantize,
    dequantize_in_aten,
    is_dequantize,
    is_quantize,
    quantize,
    quantize_in_aten,
)
from cgmq_fx.passes.insert import QUANTIZERS
from cgmq_fx.passes.lower import lower
from cgmq_fx.passes.quantizer import Quantizer
from tests.deploy_nets import deployed, inputs_of
from tests.nets import NETS, call, distance, ops

CASES = [
    *(("lenet5", s) for s in ("tensor", "channel", "w2 tensor")),
    *(("mlp", s) for s in ("tensor", "both", "element", "w8", "w16", "float")),
    *(("resnet20", s) for s in ("channel", "w8")),
    *(("separable", s) for s in ("tensor", "both")),
    *(("transformer", s) for s in ("tensor", "element")),
]


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_the_lowered_graph_computes_what_the_frozen_one_computes(
    name: str, scheme: str, offset: bool
) -> None:
    result = deployed(name, scheme)
    lowered = lower(result.model, result.inputs, offset)
    inputs = inputs_of(name, 3).map(lambda t: 3 * t if t.is_floating_point() else t)
    assert distance(call(lowered, inputs), call(result.model, inputs)) < 1e-5


@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_graph_can_be_lowered(name: str) -> None:
    net = NETS[name]
    result = prepare(net.build(), "bops <= 30%", net.inputs(2), scheme=Scheme((2, 4, 8))).finalize()
    lowered = lower(result.model, result.inputs)
    assert not any(n.op == "call_module" for n in lowered.graph.nodes)
    assert not hasattr(lowered, QUANTIZERS)
    assert not hasattr(lowered, BIASES)
    inputs = net.inputs(3)
    assert distance(call(lowered, inputs), call(result.model, inputs)) < 1e-5


def test_weights_and_biases_are_integers_and_nothing_else_is_kept() -> None:
    lowered = lower(deployed("lenet5").model, deployed("lenet5").inputs)
    state = lowered.state_dict()
    assert {t.dtype for n, t in state.items() if n.endswith("weight_codes")} == {torch.int8}
    assert {t.dtype for n, t in state.items() if n.endswith("bias_codes")} == {torch.int32}
    assert all(n.endswith(("_codes", "_step")) for n in state)


def test_the_frozen_graph_is_left_alone() -> None:
    result = deployed("mlp")
    before = str(result.model.graph)
    lower(result.model, result.inputs)
    assert str(result.model.graph) == before


def test_codes_of_activations_are_clamped_to_their_bits() -> None:
    result = deployed("lenet5", "w2")
    for node in lower(result.model, result.inputs).graph.nodes:
        if is_quantize(node):
            low, high = node.args[3:5]
            assert (low, high) in (([0], [3]), ([-1], [1]))


def test_signed_codes_can_be_stored_with_an_offset() -> None:
    result = deployed("mlp", "w8")
    kinds = []
    for offset in (False, True):
        nodes = lower(result.model, result.inputs, offset).graph.nodes
        kinds.append([(n.args[2], n.args[6]) for n in nodes if is_quantize(n)])
    assert kinds[0][0] == (0, torch.int8)
    assert kinds[1][0] == (128, torch.uint8)
    assert kinds[0][1] == kinds[1][1] == (0, torch.uint8)  # after a ReLU


def test_channels_of_an_activation_end_on_one_grid() -> None:
    result = deployed("separable", "both")
    nodes = [n for n in lower(result.model, result.inputs).graph.nodes if is_quantize(n)]
    wide = [n for n in nodes if len(n.args[3]) > 1]
    assert wide
    for node in wide:
        (values,) = node.users
        (again,) = values.users
        assert is_dequantize(values)
        assert is_quantize(again)
        assert len(again.args[3]) == 1


def with_bits(bits: list[int], scheme: Scheme) -> tuple[torch.fx.GraphModule, object]:
    """Two linear layers whose first weight has these bits per channel."""
    model = torch.nn.Sequential(torch.nn.Linear(3, len(bits)), torch.nn.Linear(len(bits), 2))
    result = prepare(model, "bops <= 7%", torch.randn(2, 3), scheme=scheme).finalize()
    quantizer = result.model.get_submodule(f"{QUANTIZERS}.0_weight")
    assert isinstance(quantizer, Quantizer)
    quantizer.bits.copy_(torch.tensor(bits, dtype=torch.int32).reshape(-1, 1))
    return result.model, result.inputs


def test_float_channels_beside_quantized_ones_are_refused() -> None:
    module, inputs = with_bits([8, 32], Scheme((8, 32), weights="channel"))
    with pytest.raises(UnsupportedModelError, match=r"0_weight.*no integer container"):
        lower(module, inputs)  # type: ignore[arg-type]


def test_grids_that_do_not_nest_within_a_range_are_refused() -> None:
    scheme = Scheme((3, 4, 8), weights="channel", weight_ranges="tensor")
    module, inputs = with_bits([3, 8], scheme)
    with pytest.raises(UnsupportedModelError, match=r"0_weight.*do not nest"):
        lower(module, inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("low", "high", "offset", "expected"),
    [
        (0, 3, False, (torch.uint8, 0)),
        (0, 255, True, (torch.uint8, 0)),
        (0, 256, False, (torch.uint16, 0)),
        (-1, 1, False, (torch.int8, 0)),
        (-1, 1, True, (torch.uint8, 2)),
        (-7, 7, True, (torch.uint8, 8)),
        (-100, 7, True, (torch.uint8, 100)),
        (-127, 127, True, (torch.uint8, 128)),
        (-255, 255, False, (torch.int16, 0)),
        (-255, 255, True, (torch.uint16, 256)),
        (-40000, 40000, False, (torch.int32, 0)),
    ],
)
def test_container(low: int, high: int, offset: bool, expected: tuple[torch.dtype, int]) -> None:
    assert container(low, high, offset) == expected


def test_quantize_rounds_ties_to_even_and_clamps() -> None:
    x = torch.tensor([-9.0, -0.25, 0.25, 0.75, 1.25, 9.0])  # in steps: -18 -0.5 0.5 1.5 2.5 18
    codes = quantize(x, torch.tensor(0.5), 128, [-3], [3], 0, torch.uint8)
    assert codes.tolist() == [125, 128, 128, 130, 130, 131]
    assert dequantize(codes, torch.tensor(0.5), 128, 0).tolist() == [-1.5, 0.0, 0.0, 1.0, 1.0, 1.5]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_step_per_channel_runs_along_its_axis(axis: int) -> None:
    x = torch.randn(2, 2, 2)
    steps = torch.tensor([0.1, 0.5])
    codes = quantize(x, steps, 0, [-1, -7], [1, 7], axis, torch.int8)
    for channel, high in enumerate((1, 7)):
        part = (x.select(axis, channel) / steps[channel]).round().clamp(-high, high)
        assert torch.equal(codes.select(axis, channel).float(), part)
    values = dequantize(codes, steps, 0, axis)
    assert torch.equal(values.select(axis, 1), codes.select(axis, 1) * steps[1])


def test_the_ops_are_well_formed_for_torch() -> None:
    step = torch.tensor([0.1, 0.2])
    arguments = (torch.randn(3, 2), step, 0, [-1, -7], [1, 7], 1, torch.int8)
    torch.library.opcheck(QUANTIZE, arguments)
    torch.library.opcheck(DEQUANTIZE, (quantize(*arguments), step, 0, 1))
    assert torch.equal(quantize(*arguments), quantize_in_aten(*arguments))
    codes = quantize(*arguments)
    assert torch.equal(dequantize(codes, step, 0, 1), dequantize_in_aten(codes, step, 0, 1))


def clamped(build: Callable[[Tensor], Tensor], widths: tuple[int, ...] = (4,)) -> GraphModule:
    """A lowered graph of a clamp between two linear layers."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.b(build(self.a(x))))

    torch.manual_seed(0)
    result = prepare(Net(), "bops <= 50%", torch.randn(8, 3), scheme=Scheme(widths)).finalize()
    lowered = lower(result.model, result.inputs)
    inputs = ExampleInputs((5 * torch.randn(64, 3),))
    assert distance(call(lowered, inputs), call(result.model, inputs)) < 1e-5
    return lowered


@pytest.mark.parametrize(
    "build",
    [
        torch.relu,
        nn.functional.relu6,
        lambda x: nn.functional.hardtanh(x, -0.3, 0.2),
        lambda x: x.clamp(max=0.1),
        lambda x: x.clamp(-0.4),
        lambda x: x.clamp(-torch.inf, 0.3),
        lambda x: x.clamp(*(torch.finfo(x.dtype).min, torch.finfo(x.dtype).max)),
    ],
)
def test_a_clamp_that_is_rounded_becomes_limits_of_codes(
    build: Callable[[Tensor], Tensor],
) -> None:
    assert ops(clamped(build)) == [
        *("quantize", "dequantize", "dequantize", "dequantize", "linear"),
        *("quantize", "dequantize", "dequantize", "dequantize", "linear"),
    ]


def test_a_clamp_that_something_else_reads_stays() -> None:
    class Both(nn.Module):
        step: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("step", torch.tensor(0.5))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.ops.aten.relu.default(x)
            return quantize(y, self.step, 0, [0], [7], 0, torch.uint8), y

    exported = torch.export.export(Both(), (torch.randn(3),)).module(check_guards=False)
    assert isinstance(exported, GraphModule)
    assert not AbsorbClamps().run(exported).modified


class Uncaptured(nn.Module):
    """Leaves PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.detach().numpy().max().clip(1, 1))


def test_a_module_that_runs_as_it_is_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Uncaptured(), nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = prepare(model, "bops <= 10%", torch.randn(4, 3), scheme=Scheme((8,))).finalize()
    with pytest.raises(UnsupportedModelError, match=r"1 \(Uncaptured\) could not be captured"):
        lower(result.model, result.inputs)
