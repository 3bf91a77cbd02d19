from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from cgmq_fx.graphs import float_graph
from cgmq_fx.passes.bias import BIASES, align_signs
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.quantizer import BiasQuantizer
from tests.nets import NETS, quantized, quantizers, small_classifier


def biases(module: GraphModule) -> dict[str, BiasQuantizer]:
    children = module.get_submodule(BIASES).named_children()
    return {name: b for name, b in children if isinstance(b, BiasQuantizer)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cnn", ["conv2d", "linear"]),
        ("concat", ["conv2d", "conv2d_1", "conv2d_2"]),
        ("transposed", ["conv_transpose2d", "conv_transpose2d_1"]),
        ("tied", []),
        ("masked", ["linear"]),
    ],
)
def test_every_bias_has_a_quantizer(name: str, expected: list[str]) -> None:
    assert list(biases(NETS[name].quantized())) == expected


def test_a_bias_lands_on_the_steps_of_input_and_weight() -> None:
    """Input: 4 bits, unsigned, range 1: step 1/15. Weight: 2 bits, ranges 1 and 3: steps 2/3, 2."""
    module = quantized(float_graph(small_classifier(), ExampleInputs((torch.randn(2, 3),))))
    own = quantizers(module)
    own["relu"].bits.fill_(4)
    own["2_weight"].bits.fill_(2)
    own["2_weight"].log_range.data[1] = torch.tensor(3.0).log()
    rounded: list[Tensor] = []
    biases(module)["linear_1"].register_forward_hook(lambda *a: rounded.append(a[2].detach()))
    bias = module.get_parameter("2.bias")
    with torch.no_grad():
        bias.copy_(torch.tensor([0.1, -0.5]))
    module(torch.randn(2, 3))
    steps = torch.tensor([1 / 15 * 2 / 3, 1 / 15 * 2])  # 0.0444, 0.1333
    torch.testing.assert_close(rounded[0], torch.tensor([2.0, -4.0]) * steps)


def test_biases_learn_when_calibration_clears_a_sign() -> None:
    module = NETS["cnn"].quantized()
    quantizers(module)["input_1"].signed = False
    align_signs(module)
    found = biases(module)
    assert [(b.input_signed, b.weight_signed) for b in found.values()] == [(False, True)] * 2
