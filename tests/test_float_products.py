"""Products of float activations with quantized weights, in ONNX: no runtime rounds the former."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from cgmq_fx import prepare
from cgmq_fx.exporters.onnx_products import is_float
from tests.deploy_nets import assert_counted, optimised

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FORMATS = ["onnx", "onnx-signed", "onnx-compact"]
BUDGET = "weights <= 20%, bops <= 100%, activations <= 100%, arena <= 100%"


class Stored(nn.Module):
    """Weights that are stored as they are multiplied, as those of GPT-2."""

    def __init__(self, product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(32, 24)), nn.Parameter(torch.randn(24, 8))
        self.b, self.c = nn.Parameter(torch.randn(24)), nn.Parameter(torch.randn(8))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(torch.relu(self.product(x, self.w, self.b)), self.v, self.c)


class OfTheMean(nn.Module):
    """A layer of a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x * cast(Tensor, self.layer(x.mean(0)))


def _layers(bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(32, 24, bias), nn.ReLU(), nn.Linear(24, 8, bias))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layers of matrices": (_layers, (4, 32)),
    "layers of sequences": (_layers, (4, 5, 32)),
    "layers of images": (_layers, (4, 3, 5, 32)),
    "layers without biases": (lambda: _layers(bias=False), (4, 5, 32)),
    "layers of matrices without biases": (lambda: _layers(bias=False), (4, 32)),
    "products": (lambda: Stored(lambda x, w, _: x @ w), (4, 32)),
    "products of sequences": (lambda: Stored(lambda x, w, _: x @ w), (4, 5, 32)),
    "sums": (lambda: Stored(lambda x, w, b: torch.addmm(b, x, w)), (4, 32)),
    "vector": (OfTheMean, (4, 32)),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(32, 2, 24, 0.0, batch_first=True, norm_first=True),
        (4, 5, 32),
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_activations_that_are_float_stay_float(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, shape = NETS[name]
    result = prepare(build(), BUDGET, torch.randn(shape)).finalize()
    for form in FORMATS if name in ("layers of sequences", "sums") else FORMATS[:1]:
        exported = result.export(tmp_path / "net.onnx", form)
        assert exported.agreement is not None
        assert exported.agreement.exact == 1.0
        assert exported.remarks == ()
        assert "MatMulNBits" not in optimised(exported.path, tmp_path)
        if name != "encoder":  # whose biases of zero no file holds
            assert_counted(exported, result)


def test_their_weights_are_stored_as_integers(tmp_path: Path) -> None:
    result = prepare(_layers(), "weights <= 20%", torch.randn(4, 5, 32)).finalize()
    path = result.export(tmp_path / "net.onnx").path
    stored = [onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
    assert [values.dtype.name for values in stored if values.ndim > 1] == ["int8", "int8"]


def test_products_of_codes_keep_their_integer_kernels(tmp_path: Path) -> None:
    result = prepare(_layers(), "bops <= 4%", torch.randn(4, 5, 32)).finalize()
    found = optimised(result.export(tmp_path / "net.onnx").path, tmp_path)
    assert "Unsqueeze" not in found
    assert any(name in found for name in ("MatMulIntegerToFloat", "QLinearMatMul"))


@pytest.mark.parametrize(("op", "expected"), [("Reshape", False), ("Slice", False), ("Relu", True)])
def test_codes_that_are_moved_are_codes(op: str, expected: bool) -> None:
    ir = pytest.importorskip("onnx_ir")
    codes, step = ir.Value(name="codes"), ir.Value(name="step")
    assert is_float(codes)
    dequantized = ir.node("DequantizeLinear", [codes, step]).outputs[0]
    assert not is_float(dequantized)
    assert is_float(ir.node(op, [dequantized]).outputs[0]) is expected
