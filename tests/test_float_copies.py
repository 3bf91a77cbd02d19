"""What a skipped layer reads in float besides a quantized one is kept twice, and counted twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cgmq_fx

WIDTH = 64
WEIGHT = WIDTH * WIDTH
HALF = 2 * 8 * 8
"""Pixels of two channels."""


class Shared(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in "ab")
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(x)))
        return y


class Fork(nn.Module):
    """Two layers that read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.a, self.b = nn.Conv2d(16, 1, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        z: Tensor = self.a(y) + self.b(y)
        return z


def result_of(model: nn.Module, budget: str, example: Tensor, **options: Any) -> cgmq_fx.Result:
    scheme = cgmq_fx.Scheme(**{"bit_widths": (2,), **options})
    prepared = cgmq_fx.prepare(model, budget, example, scheme=scheme)
    prepared.calibrate([example])
    return prepared.finalize()


@pytest.mark.parametrize(("skip", "floats", "rounded"), [((), 0, 1), ("a", 1, 1), ("b", 1, 1)])
def test_a_weight_on_a_grid_and_in_float_is_stored_twice(
    skip: Any, floats: int, rounded: int, tmp_path: Path
) -> None:
    result = result_of(Shared(), "weights <= 30 kB", torch.rand(4, WIDTH), skip=skip)
    (state,) = result.cost.states
    assert state.value == WEIGHT * (4 * floats + rounded / 4)
    assert state.reference == 4 * WEIGHT  # a network in float has one
    for name in ("net.safetensors", "net.pt2", "net.onnx"):
        exported = result.export(tmp_path / name)
        assert exported.certificate.states[0].value == state.value
        assert cgmq_fx.verify(tmp_path / name).satisfied


def test_a_bound_that_only_one_copy_would_meet_is_refused_before_training() -> None:
    with pytest.raises(cgmq_fx.InfeasibleBudgetError, match="17408 byte"):
        result_of(Shared(), "weights <= 5 kB", torch.rand(4, WIDTH), skip="b")


def test_a_pruned_weight_leaves_the_copy_in_float(tmp_path: Path) -> None:
    options = {"bit_widths": (0, 2), "weights": "channel", "skip": "b"}
    result = result_of(Shared(), "weights <= 16.5 kB", torch.rand(4, WIDTH), **options)
    assert 4 * WEIGHT < result.cost.states[0].value <= 16_500
    for name in ("net.safetensors", "net.pt2", "net.onnx"):
        assert result.export(tmp_path / name).certificate.satisfied


@pytest.mark.parametrize(
    ("skip", "byte"),
    [
        ((), 16 * 64 / 4 + HALF * 4),
        ("b", 16 * 64 * (4 + 1 / 4) + 64 * 4),
        (("a", "b"), 16 * 64 * 4 + HALF * 4),
    ],
)
def test_an_activation_on_a_grid_and_in_float_is_kept_twice(
    skip: Any, byte: float, tmp_path: Path
) -> None:
    budget = "activations <= 20 kB, arena <= 200%"
    result = result_of(Fork(), budget, torch.rand(2, 1, 8, 8), skip=skip)
    state, arena = result.cost.states
    assert state.value == byte
    assert arena.value >= byte
    assert state.reference == 16 * 64 * 4 + HALF * 4
    for name in ("net.pt2", "net.onnx"):
        exported = result.export(tmp_path / name)
        assert [s.value for s in exported.certificate.states] == [byte, arena.value]
        assert cgmq_fx.verify(tmp_path / name).states[1].reference == arena.reference
