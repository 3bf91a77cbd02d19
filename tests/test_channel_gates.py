"""Channel gates stand on axes of channels: never on the batch, tokens or heads."""

import pytest
import torch
from torch import Tensor, nn

import cgmq_fx
from cgmq_fx.passes.insert import QUANTIZERS
from cgmq_fx.passes.quantizer import Quantizer


class Attention(nn.Module):
    """Attention between two sequences."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.project = nn.Linear(8, 16)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=batch_first)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.attend(self.project(x), self.project(y), self.project(y))[0]
        return result


def quantizers(prepared: cgmq_fx.Prepared) -> dict[str, Quantizer]:
    container = prepared.model.get_submodule(QUANTIZERS)
    return {n: q for n, q in container.named_children() if isinstance(q, Quantizer)}


class Neighbours(nn.Module):
    """Samples attend to one another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        result: Tensor = self.last(torch.softmax(y @ y.T, -1) @ y)
        return result


def call(prepared: cgmq_fx.Prepared, *inputs: Tensor) -> Tensor:
    """The output with all gates at 8 bits: at 32, quantizers pass a tensor of any shape."""
    for quantizer in quantizers(prepared).values():
        quantizer.bits.fill_(8)
    output: Tensor = prepared.model(*inputs)
    return output


@pytest.mark.parametrize("activations", ["tensor", "channel"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_takes_other_sizes(activations: str, batch_first: bool) -> None:
    """Gates on the free axis would fit only the inputs that the model was captured with."""
    scheme = cgmq_fx.Scheme(activations=activations)  # type: ignore[arg-type]
    inputs = (torch.rand(8, 8, 8), torch.rand(8, 8, 8))
    prepared = cgmq_fx.prepare(Attention(batch_first), "bops <= 50%", inputs, scheme=scheme)
    assert call(prepared, torch.rand(3, 8, 8), torch.rand(3, 8, 8)).shape == (3, 8, 16)


@pytest.mark.parametrize("batch", [7, 12])
def test_samples_have_no_gates_of_their_own(batch: int) -> None:
    """Channels have, also where there are as many of them."""
    scheme = cgmq_fx.Scheme(activations="channel")
    inputs = torch.rand(batch, 12)
    prepared = cgmq_fx.prepare(Neighbours(), "bops <= 50%", inputs, scheme=scheme)
    shapes = {n: q.spec.gate_shape for n, q in quantizers(prepared).items()}
    assert (shapes["linear"], shapes["softmax"]) == ((1, 12), ())
    assert call(prepared, inputs[:3]).shape == (3, 5)


def test_projected_tokens_have_a_gate_per_channel() -> None:
    scheme = cgmq_fx.Scheme(activations="channel")
    inputs = (torch.rand(2, 4, 8), torch.rand(2, 5, 8))
    prepared = cgmq_fx.prepare(Attention(True), "bops <= 50%", inputs, scheme=scheme)
    shapes = {n: q.spec.gate_shape for n, q in quantizers(prepared).items()}
    expected = {"x": (1, 1, 8), "y": (1, 1, 8), "linear": (1, 1, 16), "linear_1": (1, 1, 16)}
    assert {name: shapes[name] for name in expected} == expected
