"""Ops of other libraries in files: refused, unless the library is trusted by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cgmq_fx


@torch.library.custom_op("someones::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.someones.twice(x) + self.layer(x)
        return result


@pytest.fixture(name="saved")
def _saved(tmp_path: Path) -> tuple[cgmq_fx.Result, Path]:
    result = cgmq_fx.prepare(Net(), "bops <= 30%", torch.rand(2, 8)).finalize()
    return result, result.save(tmp_path / "model.safetensors")


def test_ops_of_other_libraries_are_refused(saved: tuple[cgmq_fx.Result, Path]) -> None:
    with pytest.raises(cgmq_fx.ArtifactError, match=r"someones\.twice.*libraries=\['someones'\]"):
        cgmq_fx.load(saved[1])


def test_a_library_that_is_trusted_is_taken(saved: tuple[cgmq_fx.Result, Path]) -> None:
    result, path = saved
    loaded, x = cgmq_fx.load(path, libraries=["someones"]), torch.rand(3, 8)
    assert torch.equal(loaded.model(x), result.model(x))
    assert "someones.twice" in str(loaded.cost.facts.remarks)


def test_trust_in_one_library_is_not_trust_in_all(saved: tuple[cgmq_fx.Result, Path]) -> None:
    with pytest.raises(cgmq_fx.ArtifactError, match="someones"):
        cgmq_fx.load(saved[1], libraries=["torchvision"])
