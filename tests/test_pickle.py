"""Pickled results: what is loaded again computes, costs and exports the same."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cgmq_fx import Result, load, prepare
from cgmq_fx.passes.infra import module_path
from tests.nets import NETS, call, distance
from tests.test_output_classes import Pair

ELSEWHERE = """
import sys, torch
module = torch.load(sys.argv[1], weights_only=False)
given, expected = torch.load(sys.argv[2])
assert "tests" not in sys.modules
torch.testing.assert_close(module(given), expected, rtol=0, atol=0)
"""


class Sized(nn.Module):
    """Makes zeros of the size of the batch, and returns a named tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 6, batch_first=True)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Pair:
        y, state = self.rnn(x)
        return Pair(self.out(y[:, -1]), state)


def result_of(model: nn.Module, example: Any) -> Result:
    return prepare(model.eval(), "bops <= 5%", example).finalize()


@pytest.mark.parametrize("name", ["cnn", "nested", "masked", "tied", "buffers"])
def test_a_pickled_graph_computes_the_same(name: str) -> None:
    module = NETS[name].quantized()
    again = pickle.loads(pickle.dumps(module))
    inputs = NETS[name].inputs(3)
    assert distance(call(again, inputs), call(module, inputs)) == 0
    assert again.code == module.code
    assert [*map(module_path, again.graph.nodes)] == [*map(module_path, module.graph.nodes)]
    assert [(n, m.training) for n, m in again.named_modules()] == [
        (n, m.training) for n, m in module.named_modules()
    ]


@pytest.mark.parametrize("stored", [False, True])
def test_a_pickled_result_is_as_good_as_the_result(stored: bool, tmp_path: Path) -> None:
    result = result_of(Sized(), torch.randn(4, 3, 4))
    if stored:
        result.save(tmp_path / "net.safetensors")
        result = load(tmp_path / "net.safetensors")
    again = pickle.loads(pickle.dumps(result))
    assert str(again) == str(result)
    x = torch.randn(2, 3, 4)
    assert type(again.model(x)) is type(result.model(x))
    torch.testing.assert_close(again.model(x), result.model(x), rtol=0, atol=0)
    values = [state.value for state in result.cost.states]
    assert [s.value for s in again.export(tmp_path / "net.pt2").certificate.states] == values
    again.save(tmp_path / "again.safetensors")
    assert [s.value for s in load(tmp_path / "again.safetensors").cost.states] == values


def test_a_pickled_graph_loads_in_another_process(tmp_path: Path) -> None:
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    result = result_of(nn.Sequential(*layers), torch.randn(4, 1, 6, 6))
    x = torch.randn(3, 1, 6, 6)
    torch.save(result.model, tmp_path / "net")
    torch.save((x, result.model(x).detach()), tmp_path / "rows")
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "net"), str(tmp_path / "rows")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
