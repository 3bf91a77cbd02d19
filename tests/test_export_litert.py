"""LiteRT: integers from end to end, and the same outputs in its interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from benchmarks.op_nets import OPS
from cgmq_fx import ExportError, prepare
from tests.deploy_nets import SCHEMES, assert_counted, assert_runs, deployed, inputs_of
from tests.nets import NETS
from tests.test_tables import words_in_few_bits

pytest.importorskip(
    "litert_torch",
    reason="litert-torch is not installed: .tflite files are neither written nor run",
)

CASES = [
    ("lenet5", "integer channel"),
    ("lenet5", "fpga"),
    ("mlp", "integer"),
    ("separable", "integer"),
    ("resnet20", "integer"),
]


@pytest.mark.parametrize("name", ["transformer", "parts"])
def test_what_has_no_integers_stays_in_float(name: str, tmp_path: Path) -> None:
    result = deployed(name, "integer channel")
    exported = result.export(tmp_path / "net.tflite")
    assert_counted(exported, result)
    assert exported.agreement is not None
    assert exported.agreement.largest <= 1.01


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_litert_computes_it_in_integers(name: str, scheme: str, tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    result = deployed(name, scheme)
    exported = result.export(tmp_path / "net.tflite")
    path = exported.path
    assert_counted(exported, result)
    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    assert {d["dtype"].__name__ for d in interpreter.get_tensor_details()} <= {"int8", "int32"}
    assert_runs(exported, result, inputs_of(name, 3))


def test_images_enter_with_channels_last(tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    path = deployed("separable", "integer").export(tmp_path / "net.tflite", verify=False).path
    (entry,) = Interpreter(str(path)).get_input_details()
    assert entry["shape"].tolist() == [1, 16, 16, 3]


def test_weights_that_are_read_in_float_are_counted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = OPS["cat"]  # not on one grid, so the first layer runs in float
    scheme = SCHEMES["integer"]
    result = prepare(net.build().eval(), "bops <= 100%", net.inputs(), scheme=scheme).finalize()
    assert_counted(result.export(tmp_path / "net.tflite"), result)


def test_keyword_inputs_are_refused(tmp_path: Path) -> None:
    net = NETS["keywords"]
    scheme = SCHEMES["integer"]
    result = prepare(net.build(), "bops <= 10%", net.inputs(2), scheme=scheme).finalize()
    with pytest.raises(ExportError, match="tensors by position"):
        result.export(tmp_path / "net.tflite")


def test_two_inputs_keep_their_order(tmp_path: Path) -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return cast(torch.Tensor, torch.relu(self.a(x)) + self.b(y))

    inputs = (torch.randn(4, 3), torch.randn(4, 3))
    result = prepare(Two(), "bops <= 10%", inputs, scheme=SCHEMES["integer"]).finalize()
    exported = result.export(tmp_path / "net.tflite")
    assert exported.agreement is not None
    assert exported.agreement.largest <= 1.01


@pytest.mark.parametrize("ranges", ["channel", "tensor"])
def test_tables_are_bytes_that_count_at_their_bits(ranges: Any, tmp_path: Path) -> None:
    result = words_in_few_bits(ranges)
    exported = result.export(tmp_path / "net.tflite")
    assert_counted(exported, result)
    assert exported.certificate.states[0].value == result.cost.states[0].value
