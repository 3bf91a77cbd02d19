"""Example inputs of one sample, with models that take more and with models that do not."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

import cgmq_fx
from cgmq_fx.graphs import float_graph
from cgmq_fx.passes.inputs import ExampleInputs
from tests.test_batch import Scaled, macs


class One(nn.Module):
    """Takes one sample only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.inner(x.reshape(1, 8)))


def test_one_sample_is_enough_for_a_model_that_takes_no_more() -> None:
    captured = float_graph(One(), ExampleInputs((torch.rand(1, 8),)))
    assert not captured.dynamic
    assert captured.inputs.batch == 1
    assert macs(One(), torch.rand(1, 8)) == 32


def test_a_scale_of_one_number_is_not_repeated_with_the_batch() -> None:
    given = {"x": torch.rand(1, 8), "scale": torch.rand(1)}
    captured = float_graph(Scaled(), ExampleInputs((), given))
    assert captured.dynamic
    assert [tuple(t.shape) for t in captured.inputs.tensors] == [(2, 8), (1,)]
    assert macs(Scaled(), given) == 88


def test_what_fails_is_told_of_the_inputs_that_were_given() -> None:
    with pytest.raises(cgmq_fx.CaptureError, match=r"example inputs \(\(1, 7\) torch.float32\)"):
        cgmq_fx.cost(One(), torch.rand(1, 7))


@pytest.mark.parametrize(("model", "shape"), [(One(), (1, 8)), (nn.Linear(8, 4), (8,))])
def test_a_model_of_one_size_is_exported(
    model: nn.Module, shape: tuple[int, ...], tmp_path: Path
) -> None:
    data = [torch.rand(shape) for _ in range(3)]
    result = cgmq_fx.quantize(model, "macs <= 100%, bops <= 30%", data, progress=False)
    found = cgmq_fx.export(result, tmp_path / "model.onnx").certificate
    assert found.agreement is not None
    assert found.agreement.holds
    assert result.cost["macs"].value == 32
