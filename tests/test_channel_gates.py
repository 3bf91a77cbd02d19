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


@pytest.mark.parametrize("activations", ["tensor", "channel"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_takes_other_sizes(activations: str, batch_first: bool) -> None:
    """Gates on the free axis would fit only the inputs that the model was captured with."""
    scheme = cgmq_fx.Scheme(activations=activations)  # type: ignore[arg-type]
    inputs = (torch.rand(8, 8, 8), torch.rand(8, 8, 8))
    prepared = cgmq_fx.prepare(Attention(batch_first), "bops <= 50%", inputs, scheme=scheme)
    output = prepared.model(torch.rand(3, 8, 8), torch.rand(3, 8, 8))
    assert output.shape == (3, 8, 16)


def test_projected_tokens_have_a_gate_per_channel() -> None:
    scheme = cgmq_fx.Scheme(activations="channel")
    inputs = (torch.rand(2, 4, 8), torch.rand(2, 5, 8))
    prepared = cgmq_fx.prepare(Attention(True), "bops <= 50%", inputs, scheme=scheme)
    shapes = {n: q.spec.gate_shape for n, q in quantizers(prepared).items()}
    expected = {"x": (1, 1, 8), "y": (1, 1, 8), "linear": (1, 1, 16), "linear_1": (1, 1, 16)}
    assert {name: shapes[name] for name in expected} == expected
