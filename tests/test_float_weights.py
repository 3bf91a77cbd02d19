"""Products of codes with float weights, in ONNX: no runtime rounds the latter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cgmq_fx import Result, Scheme, prepare
from tests.deploy_nets import assert_counted, optimised

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FORMATS = ["onnx", "onnx-signed", "onnx-compact"]
BUDGET = "weights <= 100%, bops <= 100%, activations <= 100%, arena <= 100%"
FLOAT = Scheme((2, 4, 8), weight_widths=(32,), output_bits=8)
ROUNDED = {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat"}

IMAGE, ROW = (4, 3, 9, 9), (4, 12)


class Layers(nn.Module):
    """Two layers, and what is done with them."""

    def __init__(self, first: nn.Module, second: nn.Module, forward: Callable[..., object]) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.computed = forward

    def forward(self, x: Tensor) -> object:
        return self.computed(x, self.first, self.second, self.scale)


def _convolutions(bias: bool = True) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, bias=bias), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=bias)),
    )


def _layers(bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8, bias), nn.ReLU(), nn.Linear(8, 6, bias))


def _two(forward: Callable[..., object], bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: Layers(nn.Conv2d(3, 4, 3, bias=bias), nn.Conv2d(4, 4, 3), forward)


def _unrolled(x: Tensor, first: nn.Module, second: nn.Module, _: Tensor) -> Tensor:
    state = torch.relu(first(x[:, 0]))
    for step in (1, 2):
        state = torch.relu(first(x[:, step]) + second(state))
    return state


def _with_hidden(x: Tensor, first: nn.Module, second: nn.Module, _: Tensor) -> object:
    hidden = first(x)
    return hidden, second(hidden)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (_convolutions, IMAGE),
    "convolutions without biases": (lambda: _convolutions(bias=False), IMAGE),
    "transposed convolutions": (
        lambda: nn.Sequential(nn.ConvTranspose1d(3, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 5, 3)),
        (4, 3, 9),
    ),
    "layers": (_layers, ROW),
    "layers without biases": (lambda: _layers(bias=False), ROW),
    "layers of sequences": (_layers, (4, 5, 12)),
    "layers of three rows each": (
        lambda: Layers(
            nn.Linear(6, 8),
            nn.Linear(8, 3),
            lambda x, a, b, _: b(torch.relu(a(x.reshape(8, 6)))).reshape(4, 6),
        ),
        ROW,
    ),
    "steps of a recurrence": (
        lambda: Layers(nn.Linear(8, 6), nn.Linear(6, 6), _unrolled),
        (4, 3, 8),
    ),
    "a factor behind": (_two(lambda x, a, b, s: b(a(x) * s)), IMAGE),
    "a sum behind": (_two(lambda x, a, b, s: b(torch.relu(a(x) + s)), bias=False), IMAGE),
    "a view behind": (
        lambda: Layers(
            nn.Conv2d(3, 4, 3),
            nn.Linear(4, 3),
            lambda x, a, b, _: b(a(x).flatten(2).transpose(1, 2)),
        ),
        IMAGE,
    ),
    "an output behind": (_two(_with_hidden), IMAGE),
    "a slope of one": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(1.0), nn.Conv2d(4, 5, 3)),
        IMAGE,
    ),
}


def _result(
    build: Callable[[], nn.Module], shape: tuple[int, ...], scheme: Scheme, budget: str = BUDGET
) -> Result:
    torch.manual_seed(0)
    return prepare(build().eval(), budget, torch.rand(shape) - 0.3, scheme=scheme).finalize()


def _slopes(path: Path) -> int:
    return sum(node.op_type == "LeakyRelu" for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("name", NETS)
def test_weights_that_are_float_stay_float(name: str, tmp_path: Path) -> None:
    result = _result(*NETS[name], FLOAT)
    for form in FORMATS if name in ("convolutions", "layers") else FORMATS[:1]:
        exported = result.export(tmp_path / "net.onnx", form)
        assert exported.agreement is not None
        assert exported.agreement.exact > 0.999
        assert ROUNDED.isdisjoint(optimised(exported.path, tmp_path))
        if name != "steps of a recurrence":
            assert_counted(exported, result)


def test_a_bound_on_activations_alone_leaves_weights_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    result = prepare(net, "activations <= 100 B", torch.rand(3, 1, 8, 8)).finalize()
    exported = result.export(tmp_path / "net.onnx")
    assert exported.agreement is not None
    assert exported.agreement.exact == 1.0
    assert_counted(exported, result)
    assert _slopes(exported.path) == 1  # the last layer is not rounded


def test_convolutions_and_layers_compute_the_slope_on_the_way(tmp_path: Path) -> None:
    for name in ("convolutions", "layers"):
        exported = _result(*NETS[name], FLOAT).export(tmp_path / "net.onnx", verify=False)
        assert _slopes(exported.path) == 2
        assert "LeakyRelu" not in optimised(exported.path, tmp_path)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("convolutions", Scheme((4,), output_bits=8)),
        ("convolutions", Scheme((4,), weight_widths=(16,), output_bits=8)),
        ("convolutions", Scheme((4,), weight_widths=(32,), activations="channel")),
        ("convolutions", Scheme((32,))),
        ("layers", Scheme((4,), output_bits=8)),
        ("layers of sequences", FLOAT),
    ],
)
def test_other_files_have_no_slope(name: str, scheme: Scheme, tmp_path: Path) -> None:
    exported = _result(*NETS[name], scheme).export(tmp_path / "net.onnx", verify=False)
    assert _slopes(exported.path) == 0


def test_float_layers_beside_integer_ones(tmp_path: Path) -> None:
    scheme = Scheme((8,), weight_widths=(8,), layers={"second": (8, 32)}, output_bits=8)
    net = _two(lambda x, a, b, _: b(torch.relu(a(x))))
    result = _result(net, IMAGE, scheme, "activations <= 50%")
    exported = result.export(tmp_path / "net.onnx")
    assert _slopes(exported.path) == 1
    assert exported.agreement is not None
    assert exported.agreement.exact > 0.999
    assert_counted(exported, result)
