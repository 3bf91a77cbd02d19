"""Channels that hardly depend on their input keep their bias."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import cgmq_fx
from cgmq_fx.exporters.agreement import outputs_of
from cgmq_fx.passes.integer import simulate_graph
from cgmq_fx.passes.lower import lower


def shut_off(size: float, seed: int = 0) -> nn.Sequential:
    """Two convolutions with a channel whose weights are tiny, but whose bias is not."""
    torch.manual_seed(seed)
    first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
    with torch.no_grad():
        for layer, channel, bias in ((first, 1, 0.5), (second, 2, -2.0)):
            layer.weight[channel] *= size
            layer.bias[channel] = bias  # type: ignore[index]
    return nn.Sequential(first, nn.ReLU(), second).eval()


@pytest.mark.parametrize("size", [1e-9, 1e-5, 0.0])
@pytest.mark.parametrize("target", ["onnxruntime", "litert"])
def test_a_channel_that_is_shut_off_keeps_its_bias(size: float, target: str) -> None:
    model, inputs = shut_off(size), torch.rand(8, 3, 8, 8)
    result = cgmq_fx.quantize(
        model, "bops <= 7%", example_inputs=inputs, epochs=0, target=target, progress=False
    )
    found: Tensor = result.model(inputs)[:, 2]
    torch.testing.assert_close(found, torch.full_like(found, -2.0), rtol=0.02, atol=0)
    lowered = lower(result.model, result.inputs)
    held = dict(lowered.named_buffers())
    product = held["relu_step"] * held["2_weight_step"]  # what a runtime takes it for
    torch.testing.assert_close(held["conv2d_1_bias_step"], product, rtol=1e-6, atol=0)
    assert int(held["conv2d_1_bias_codes"].abs().max()) < 2**30


def test_sixteen_bits_keep_a_large_bias_in_every_form() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 3)
    with torch.no_grad():
        model.weight.mul_(0.3)
        model.bias.copy_(torch.tensor([0.5, -0.5, 1.0]))
    inputs = torch.rand(64, 8)
    result = cgmq_fx.quantize(model, "bops <= 30%", example_inputs=inputs, epochs=0, progress=False)
    assert {int(b.max()) for b in result.cost.assignment.values()} == {16}
    torch.testing.assert_close(result.model(inputs), model(inputs), rtol=0, atol=1e-3)
    lowered = lower(result.model, result.inputs)
    (own,), (found,) = (outputs_of(m, [result.inputs]) for m in (result.model, lowered))
    torch.testing.assert_close(found, own, rtol=0, atol=1e-5)
    simulated = simulate_graph(lowered, result.inputs)
    assert simulated.float_ops == ()
    torch.testing.assert_close(simulated.outputs[0].float(), own[0], rtol=0, atol=1e-5)
