"""Ops of other libraries in files: refused, unless the library is trusted by name."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import cgmq_fx
from cgmq_fx.cli import main


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


def test_a_sweep_trusts_what_the_model_calls(tmp_path: Path) -> None:
    budgets = ["bops <= 30%", "bops <= 20%"]
    found = cgmq_fx.sweep(
        Net(), budgets, [torch.rand(2, 8)], folder=tmp_path, epochs=0, progress=False
    )
    assert [len(point.result.cost.states) for point in found] == [1, 1]


@pytest.mark.skipif(find_spec("onnxscript") is None, reason="onnxscript is not installed")
def test_commands_take_libraries_by_name(
    saved: tuple[cgmq_fx.Result, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "someones", ModuleType("someones"))
    refused, *taken = (
        CliRunner().invoke(main, words)
        for words in (
            ["show", str(saved[1])],
            ["show", str(saved[1]), "--library", "someones"],
            ["export", str(saved[1]), str(saved[1].with_suffix(".onnx")), "--library", "someones"],
            ["show", str(saved[1]), "--library", "nowhere.to_be_found"],
        )
    )
    shown, exported, missing = taken
    assert refused.exit_code == 2
    assert shown.exit_code == 0
    assert "torch.onnx cannot translate the model" in " ".join(exported.output.split())
    assert "cannot import 'nowhere.to_be_found'" in " ".join(missing.output.split())


def test_trust_in_one_library_is_not_trust_in_all(saved: tuple[cgmq_fx.Result, Path]) -> None:
    with pytest.raises(cgmq_fx.ArtifactError, match="someones"):
        cgmq_fx.load(saved[1], libraries=["torchvision"])
