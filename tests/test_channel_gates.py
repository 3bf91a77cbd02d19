"""Channel gates stand on axes of channels: never on the batch, tokens or heads."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cgmq_fx
from cgmq_fx.cost_models.errors import OptionError
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


class Branches(nn.Module):
    """Two branches that are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.wide = nn.Linear(4, 8), nn.Linear(4, 64)
        self.narrow, self.last = nn.Linear(64, 8), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        short, long = self.short(x).relu(), self.narrow(self.wide(x).relu()).relu()
        result: Tensor = self.last(torch.cat([short, long], 1))
        return result


# 8 channels of 8 bits wait while 64 of 2 and 8 of 2 are alive: 8 + 16 + 2 bytes
@pytest.mark.parametrize("suffix", ["safetensors", "onnx", "pt2"])
def test_parts_of_a_join_have_the_bits_of_their_own_channels(suffix: str, tmp_path: Path) -> None:
    if suffix == "onnx":
        pytest.importorskip("onnxscript")
    scheme = cgmq_fx.Scheme((2, 8), activations="channel")
    budget = "activations <= 26 B, arena <= 26 B"
    prepared = cgmq_fx.prepare(Branches().eval(), budget, torch.randn(3, 4), scheme=scheme)
    bits = {name: np.full(q.gates, 2) for name, q in prepared.facts.quantizers.items()}
    over = {"cat": np.array([8] * 9 + [2] * 7)}
    with pytest.raises(OptionError, match=r"activations 27 > .*arena 27 > "):
        prepared.freeze(bits | over)
    prepared.freeze(bits | {"cat": np.array([8] * 8 + [2] * 8)})
    result = prepared.finalize()
    assert [s.value for s in result.cost] == [26, 26]
    path = tmp_path / f"net.{suffix}"
    result.export(path)
    assert [s.value for s in cgmq_fx.verify(path).states] == [26, 26]
