"""Dropout that evaluation does not show: inside fused attention, between recurrent layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cgmq_fx.graphs import float_graph
from cgmq_fx.passes.inputs import ExampleInputs


class Attention(nn.Module):
    def __init__(self, probability: float, always: bool = False) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.probability, self.always = probability, always

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(x)
        on = self.training or self.always
        return F.scaled_dot_product_attention(y, y, y, dropout_p=self.probability if on else 0.0)


class Recurrent(nn.Module):
    def __init__(self, kind: Any, probability: float) -> None:
        super().__init__()
        self.layers = kind(8, 8, 3, dropout=probability, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)[0]
        return y


def graph(model: nn.Module) -> torch.fx.GraphModule:
    return float_graph(model, ExampleInputs((torch.randn(2, 4, 8),))).module


def varies(module: nn.Module) -> bool:
    x = torch.randn(3, 4, 8)
    return not torch.equal(module(x), module(x))


MODELS: dict[str, Any] = {
    "attention": Attention,
    "encoder layer": lambda p: nn.TransformerEncoderLayer(8, 2, 16, dropout=p, batch_first=True),
    "lstm": lambda p: Recurrent(nn.LSTM, p),
    "gru": lambda p: Recurrent(nn.GRU, p),
    "rnn": lambda p: Recurrent(nn.RNN, p),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_dropout_is_on_in_training_and_off_in_evaluation(make: Any) -> None:
    model = make(0.5).eval()
    found = graph(model)
    assert varies(found.train())
    assert not varies(found.eval())
    x = torch.randn(3, 4, 8)
    torch.testing.assert_close(found(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_without_dropout_there_is_none(make: Any) -> None:
    assert not varies(graph(make(0.0)).train())


def test_attention_drops_what_its_probability_says() -> None:
    found = graph(Attention(0.3)).train()
    (node,) = [n for n in found.graph.nodes if n.target is torch.ops.aten.dropout.default]
    assert node.args[1] == 0.3


def test_dropout_that_is_always_on_stays_on() -> None:
    assert varies(graph(Attention(0.5, always=True)).eval())


def test_capture_leaves_the_random_state_alone() -> None:
    model = Attention(0.5)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    float_graph(model, ExampleInputs((torch.zeros(2, 4, 8),)))
    assert torch.equal(torch.rand(1), expected)


class Failing(Attention):
    """Attention that cannot be called in training mode without gradients."""

    def __init__(self, late: bool) -> None:
        super().__init__(0.5)
        self.late = late

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x) if self.late else x
        if self.training and not torch.is_grad_enabled():
            raise RuntimeError("no gradients")
        return found if self.late else super().forward(x)


def test_dropout_that_cannot_be_seen_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert varies(graph(Failing(late=True).eval()).train())
    assert "left out" not in caplog.text
    assert not varies(graph(Failing(late=False).eval()).train())
    assert "left out: the model calls it 1 times, but 0 times in training mode" in caplog.text
    assert "where it fails (no gradients)" in caplog.text
