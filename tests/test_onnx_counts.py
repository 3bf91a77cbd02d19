"""ONNX files of nets whose ops torch.onnx writes as several cost what the nets cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cgmq_fx import Result, Scheme, quantize

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def quantized(net: nn.Module, x: torch.Tensor, budget: str, **options: Any) -> Result:
    """The net with random numbers everywhere, so that no tensor is equal to another."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return quantize(net.eval(), budget, example_inputs=x, epochs=0, progress=False, **options)


def assert_counted_alike(result: Result, path: Path) -> None:
    """The file is written, computes the same, and costs the same."""
    certificate = result.export(path).certificate
    assert certificate.from_file
    assert not certificate.unknown
    assert [s.value for s in certificate.states] == [s.value for s in result.cost.states]


@pytest.mark.parametrize("dimensions", [2, 3])
def test_global_pools_of_images_with_channels_last(dimensions: int, tmp_path: Path) -> None:
    conv, pool = [(nn.Conv2d, nn.AdaptiveAvgPool2d), (nn.Conv3d, nn.AdaptiveAvgPool3d)][
        dimensions - 2
    ]
    net = nn.Sequential(conv(3, 8, 3), nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(8, 4))
    x = torch.rand(2, 3, *[6] * dimensions).movedim(1, -1).contiguous().movedim(-1, 1)
    budget = "bops <= 20%, weights <= 90%, activations <= 90%"
    result = quantized(net, x, budget, target="onnxruntime")
    assert_counted_alike(result, tmp_path / "net.onnx")


class Applies(nn.Module):
    """Layers by name, and what is done with them."""

    def __init__(
        self, forward: Callable[[Any, torch.Tensor], torch.Tensor], **layers: nn.Module
    ) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._forward = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward(self, x)


def two_readers(m: Any, x: torch.Tensor) -> Any:
    parts = m.first(x).view(-1, 2, 8)
    return m.left(parts[:, 0]) + m.right(parts[:, 1])


def clamped_twice(m: Any, x: torch.Tensor) -> Any:
    x = m.first(x).view(-1, 2, 8).sum(1)
    return m.left(x.clamp(-1, 1).clamp(max=0.5)) + m.right(x.clamp(-2, 2).clamp(max=0.25))


@pytest.mark.parametrize("forward", [two_readers, clamped_twice])
def test_limits_of_one_tensor_keep_apart(forward: Any, tmp_path: Path) -> None:
    linear = nn.Linear
    net = Applies(forward, first=linear(8, 16), left=linear(8, 4), right=linear(8, 4))
    result = quantized(net, torch.rand(2, 8), "bops <= 25%", scheme=Scheme((16,)))
    assert_counted_alike(result, tmp_path / "net.onnx")


def sampled(m: Any, x: torch.Tensor) -> Any:
    grid = m.first(x).permute(0, 2, 3, 1)
    return m.last(nn.functional.grid_sample(x, grid, align_corners=False))


def test_samples_on_a_computed_grid(tmp_path: Path) -> None:
    net = Applies(sampled, first=nn.Conv2d(3, 2, 1), last=nn.Conv2d(3, 4, 1))
    budget = "bops <= 20%, activations <= 90%"
    result = quantized(net, torch.rand(2, 3, 6, 6), budget, target="onnxruntime")
    assert_counted_alike(result, tmp_path / "net.onnx")
