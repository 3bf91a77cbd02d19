"""What real models are made of, as files: written, run, and counted as the model is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional

import cgmq_fx
from cgmq_fx.exporters import exporters
from cgmq_fx.exporters.agreement import output_steps
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.lower import lower
from tests.deploy_nets import assert_counted

FORMATS = ["onnx", "pt2", "safetensors"]


class Layers(nn.Module):
    """Two layers, between which a subclass does something."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def between(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.between(self.first(x))))


class ClampsAPart(Layers):
    """The parts have one grid, but other limits."""

    def between(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat([first, second.clamp(-1, 1)], -1)


class NormsBehindTheActivation(Layers):
    """Batch norm that cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def between(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(torch.relu(x)))


class WritesIntoASlice(Layers):
    def between(self, x: Tensor) -> Tensor:
        x[:, :2] *= 0.5
        return x


class Masks(Layers):
    """Minus infinity where a token must not look."""

    def between(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 2, 4)
        found = functional.scaled_dot_product_attention(rows, rows, rows, is_causal=True)
        return found.reshape(-1, 8)


class Cell(Layers):
    """A step of a recurrent layer, from a state of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, 8)

    def between(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.cell(x, x.new_zeros(x.shape[0], 8)))


class ReturnsASize(Layers):
    def forward(self, x: Tensor) -> tuple[int, Tensor]:  # type: ignore[override]
        return x.shape[0], self.last(torch.relu(self.first(x)))


class ReturnsFlags(Layers):
    """Flags, and a size, beside values and what may be empty."""

    def forward(self, x: Tensor) -> tuple[Tensor, int, Tensor, Tensor]:  # type: ignore[override]
        y = self.last(torch.relu(self.first(x)))
        return y > 0, x.shape[0], y, y[:, :0]


class ReadsBytes(Layers):
    """An image as it is decoded."""

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(torch.relu(self.first(x.float() / 255))))


class StartsWithoutBias(nn.Module):
    """A layer of GPT-2, whose bias of zero no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b, x, self.w)


NETS = [
    *(ClampsAPart, NormsBehindTheActivation, WritesIntoASlice, Masks, Cell, ReturnsASize),
    *(ReturnsFlags, StartsWithoutBias),
]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("net", NETS)
def test_it_is_written_run_and_counted(net: type[nn.Module], form: str, tmp_path: Path) -> None:
    if form == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    result = cgmq_fx.prepare(net().eval(), "bops <= 6%", torch.randn(4, 6)).finalize()
    exported = result.export(tmp_path / f"net.{form}")
    assert_counted(exported, result)
    assert exported.agreement is not None
    assert exported.agreement.largest <= 1.01


@pytest.mark.parametrize("form", FORMATS[:2])
def test_bytes_that_come_in_are_counted_as_such(form: str, tmp_path: Path) -> None:
    if form == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    x = torch.randint(256, (4, 6), dtype=torch.uint8)
    result = cgmq_fx.prepare(ReadsBytes(), "activations <= 100%, arena <= 100%", x).finalize()
    assert_counted(result.export(tmp_path / f"net.{form}"), result)


def test_the_grid_of_an_output_is_its_own_behind_a_size() -> None:
    scheme = cgmq_fx.Scheme((2, 4, 8), output_bits=8)
    x = torch.randn(4, 6)
    result = cgmq_fx.prepare(ReturnsASize(), "bops <= 7%", x, scheme=scheme).finalize()
    module = lower(result.model, result.inputs)
    last = module.graph.output_node().args[0][1]  # type: ignore[index]
    step = module.get_buffer(str(cast(Node, cast(Node, last).args[1]).target))
    assert output_steps(module, [[torch.randn(4, 3)]]) == [float(step)]


def test_outputs_that_are_empty_cannot_be_compared(tmp_path: Path) -> None:
    class Empty(Layers):
        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.last(self.first(x)))[:, :0]

    result = cgmq_fx.prepare(Empty(), "bops <= 100%", torch.randn(4, 6)).finalize()
    with pytest.raises(cgmq_fx.ExportError, match="all outputs of the model are empty"):
        result.export(tmp_path / "net.pt2")
    assert result.export(tmp_path / "net.pt2", verify=False).agreement is None


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_precision_are_deployed_in_float32(
    dtype: torch.dtype, form: str, tmp_path: Path
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model, x = ClampsAPart().eval().to(dtype), torch.randn(4, 6, dtype=dtype)
    scheme = cgmq_fx.Scheme((8,), output_bits=8)
    result = cgmq_fx.prepare(model, "bops <= 7%", x, scheme=scheme).finalize()
    exported = result.export(tmp_path / f"net.{form}", samples=[x])
    assert_counted(exported, result)
    found = exporters()[exported.format].run(exported.path, [ExampleInputs((x.float(),))])[0][0]
    torch.testing.assert_close(found, result.model(x).float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_stays_float_counts_as_it_is_deployed(
    dtype: torch.dtype, form: str, tmp_path: Path
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype)
    x, scheme = torch.randn(4, 8, dtype=dtype), cgmq_fx.Scheme(skip="2")
    costs = "weights, activations"
    wide = copy.deepcopy(model).float()
    found, expected = cgmq_fx.cost(model, x, costs), cgmq_fx.cost(wide, x.float(), costs)
    assert [row.totals for row in found.rows] == [row.totals for row in expected.rows]
    result = cgmq_fx.prepare(
        model, "weights <= 80%, activations <= 80%", x, scheme=scheme
    ).finalize()
    exported = result.export(tmp_path / f"net.{form}", verify=False)
    assert_counted(exported, result)


@pytest.mark.parametrize(
    ("constant", "form", "message"),
    [
        (3, "onnx", "an ONNX file returns tensors, and the model returns 3 beside them"),
        ("v2", "onnx", "an ONNX file returns tensors, and the model returns 'v2' beside them"),
        ("v2", "pt2", r"a \.pt2 file returns tensors and numbers, not 'v2'"),
    ],
)
def test_what_no_file_returns_is_said_shortly(
    constant: object, form: str, message: str, tmp_path: Path
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxscript")

    class Returns(Layers):
        def forward(self, x: Tensor) -> dict[str, object]:  # type: ignore[override]
            return {"logits": self.last(self.first(x)), "version": constant}

    result = cgmq_fx.prepare(Returns(), "bops <= 6%", torch.randn(4, 6)).finalize()
    with pytest.raises(cgmq_fx.ExportError, match=message):
        result.export(tmp_path / f"net.{form}")


@pytest.mark.parametrize("form", FORMATS[:2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_outputs_of_other_precision_are_rounded_to_their_grid(
    dtype: torch.dtype, form: str, tmp_path: Path
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")

    class Returns(Layers):
        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.last(torch.relu(self.first(x)))).to(dtype)

    budget = "bops <= 7%, activations <= 100%, arena <= 100%"
    scheme = cgmq_fx.Scheme((2, 4, 8), output_bits=8)
    result = cgmq_fx.prepare(Returns(), budget, torch.randn(4, 6), scheme=scheme).finalize()
    exported = result.export(tmp_path / f"net.{form}")
    assert_counted(exported, result)
    assert exported.agreement is not None
    assert exported.agreement.largest <= 1.01
