"""QONNX: the grids in the file, and the same outputs in qonnx's executor."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cgmq_fx import PRESETS, ArtifactError, ExportError, Scheme, prepare
from cgmq_fx.exporters import exporters
from cgmq_fx.exporters.agreement import compare
from cgmq_fx.exporters.certificate import verify
from cgmq_fx.passes.insert import QUANTIZERS
from cgmq_fx.passes.lower import lower
from cgmq_fx.passes.quant_nodes import width_of
from cgmq_fx.passes.quantizer import Quantizer
from tests.deploy_nets import deployed, inputs_of
from tests.nets import NETS

onnx = pytest.importorskip("onnx", reason="QONNX needs onnx")
pytest.importorskip("onnxscript", reason="QONNX needs onnxscript")
pytest.importorskip("qonnx", reason="QONNX files are run by qonnx, which is not installed")

CASES = [
    *(("lenet5", s) for s in ("fpga", "channel")),
    *(("mlp", s) for s in ("fpga", "both", "w16")),
    ("resnet20", "fpga"),
    ("separable", "fpga"),
]


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_qonnx_computes_it(name: str, scheme: str, tmp_path: Path) -> None:
    result = deployed(name, scheme)
    path = result.export(tmp_path / "net.onnx", "qonnx").path
    inputs = [inputs_of(name, batch) for batch in (1, 3)]
    found = exporters()["qonnx"].run(path, inputs)
    agreement = compare(lower(result.model, result.inputs), found, inputs)
    assert agreement.largest <= 1.0
    assert agreement.exact >= 0.95
    if scheme == "fpga":  # sums of products of powers of two are exact in float32
        assert agreement.exact == 1.0


@pytest.mark.parametrize(("scheme", "count"), [("fpga", 0), ("tensor", 0), ("channel", 1)])
def test_channels_that_a_node_cannot_tell_apart_are_told_of(
    scheme: str, count: int, tmp_path: Path
) -> None:
    exported = deployed("mlp", scheme).export(tmp_path / "net.onnx", "qonnx", verify=False)
    told = [f"tensors whose gates have different bit-widths: {count}; a Quant node has one, the"]
    assert [remark[: len(told[0])] for remark in exported.remarks] == told * (count > 0)


def test_every_tensor_has_its_own_bits(tmp_path: Path) -> None:
    result = deployed("lenet5", "fpga")
    model = onnx.load(result.export(tmp_path / "net.onnx", "qonnx").path)
    numbers = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    quants = [node for node in model.graph.node if node.op_type == "Quant"]
    assert {node.domain for node in quants} == {"qonnx.custom_op.general"}
    found = Counter(int(numbers[node.input[3]]) for node in quants if node.input[0] not in numbers)
    own = {n: q for n, q in result.model.get_submodule(QUANTIZERS).named_children()}
    expected = Counter(
        int(q.bits)
        for q in own.values()
        if isinstance(q, Quantizer) and q.spec.role.value == "activation"
    )
    assert found == expected
    weights = {
        name: int(numbers[node.input[3]])
        for node in quants
        for name in [node.input[0]]
        if name in numbers and numbers[name].ndim > 1
    }
    assert len(weights) == 4
    assert all(bits <= 8 for bits in weights.values())


COUNTED = [
    *(("lenet5", s) for s in ("fpga", "channel")),
    *(("mlp", s) for s in ("fpga", "both", "element", "w16")),
    ("separable", "fpga"),
]


@pytest.mark.parametrize(("name", "scheme"), COUNTED)
def test_the_cost_is_counted_from_the_file(name: str, scheme: str, tmp_path: Path) -> None:
    result = deployed(name, scheme)
    exported = result.export(tmp_path / "net.onnx", "qonnx", verify=False)
    assert exported.certificate.from_file
    (counted,), (known,) = exported.certificate.states, result.cost.states
    assert counted.reference == known.reference
    if scheme == "element":  # codes may need fewer bits than they were given
        assert 0.5 * known.value < counted.value <= known.value
    else:
        assert counted.value == known.value
    assert verify(exported.path).states[0].value == counted.value


SHORTENED: dict[str, tuple[tuple[int, ...], list[nn.Module]]] = {
    "flattened": ((8, 8), [nn.Flatten(), nn.Linear(4 * 36, 3)]),
    "max-pool": ((8, 8), [nn.MaxPool2d(2), nn.Conv2d(4, 3, 1)]),
    "larger": ((8, 8), [nn.UpsamplingNearest2d(scale_factor=2), nn.Conv2d(4, 3, 1)]),
    "mean": ((8, 8), [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]),
    "mean of sequences": ((9,), [nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)]),
    "max-pool of sequences": ((9,), [nn.MaxPool1d(2), nn.Conv1d(4, 3, 1)]),
}


@pytest.mark.parametrize("name", SHORTENED)
def test_channels_of_zeros_are_counted_as_gone(name: str, tmp_path: Path) -> None:
    size, behind = SHORTENED[name]
    maker = (nn.Conv2d if len(size) == 2 else nn.Conv1d)(2, 4, 3, bias=False)
    nn.init.zeros_(maker.weight[1].detach())
    scheme = Scheme((0, 2, 4), weights="element")
    net = prepare(
        nn.Sequential(maker, nn.ReLU(), *behind),
        "bops <= 10%",
        torch.rand(2, 2, *size),
        scheme=scheme,
    )
    net.freeze({n: np.full_like(b, 4) for n, b in net.controller.assignment.items()})
    result = net.finalize()
    files = [("net.onnx", "qonnx"), ("net.pt2", "pt2")]
    made = [result.export(tmp_path / file, form, verify=False) for file, form in files]
    counted = [exported.certificate.states[0].value for exported in made]
    assert counted[0] == counted[1] < 0.76 * result.cost.states[0].value
    assert verify(made[0].path).states[0].value == counted[0]


def test_joined_tensors_are_on_a_grid_of_their_own(tmp_path: Path) -> None:
    net, scheme = NETS["concat"], PRESETS["fpga"].scheme
    result = prepare(net.build(), "bops <= 3%", net.inputs(2), scheme=scheme).finalize()
    exported = result.export(tmp_path / "net.onnx", "qonnx")
    assert exported.certificate.states[0].value == result.cost.states[0].value


def tampered(change: Callable[[Any], None], folder: Path) -> Path:
    path = deployed("mlp", "fpga").export(folder / "net.onnx", "qonnx", verify=False).path
    (folder / "net.onnx.certificate.json").unlink()
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    return path


def states_a_large_batch(model: Any) -> None:
    (entry,) = (p for p in model.metadata_props if p.key == "cgmq_fx")
    entry.value = entry.value.replace('"batch": 1', '"batch": 8')


def quant(model: Any) -> Any:
    return next(node for node in model.graph.node if node.op_type == "Quant")


def is_asymmetric(model: Any) -> None:
    flags = {a.name: a for a in quant(model).attribute}
    flags["narrow"].i = 1 - flags["narrow"].i


def has_no_grid(model: Any) -> None:
    quant(model).input[1] = "nothing"


def is_another_op(model: Any) -> None:
    quant(model).op_type = "Trunc"


TAMPERED: list[tuple[Callable[[Any], None], str]] = [
    (states_a_large_batch, "states a batch of 8, the file has a smaller one"),
    (is_asymmetric, "a grid that this library does not write"),
    (has_no_grid, "the grid of .* is not in the file"),
    (is_another_op, "is a Trunc, which is not counted"),
]


@pytest.mark.parametrize(("change", "message"), TAMPERED)
def test_a_file_that_was_changed_is_refused(
    change: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=message):
        verify(tampered(change, tmp_path))


def test_pools_run_on_codes(tmp_path: Path) -> None:
    model = onnx.load(deployed("lenet5", "fpga").export(tmp_path / "net.onnx", "qonnx").path)
    made = {name: node.op_type for node in model.graph.node for name in node.output}
    pools = [node for node in model.graph.node if node.op_type == "MaxPool"]
    assert [made[pool.input[0]] for pool in pools] == ["Quant", "Quant"]


@pytest.mark.parametrize(
    ("low", "high", "signed", "bits"),
    [
        (0, 1, False, 2),
        (0, 3, False, 2),
        (0, 4, False, 3),
        (0, 255, False, 8),
        (-1, 1, True, 2),
        (-2, 2, True, 3),
        (-127, 127, True, 8),
        (0, 0, False, 2),
        (0, 0, True, 2),
    ],
)
def test_the_least_bits_of_codes(low: int, high: int, signed: bool, bits: int) -> None:
    assert width_of(low, high, signed) == bits


def test_packages_that_do_not_fit_together_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("Unsupported model IR version: 99, max supported IR version: 13")

    monkeypatch.setattr("qonnx.core.onnx_exec.execute_onnx", refuse)
    with pytest.raises(ExportError, match=r'pip install "onnx<1.23"'):
        deployed("mlp", "fpga").export(tmp_path / "net.onnx", "qonnx")
    assert list(tmp_path.iterdir()) == []


def test_an_activation_of_no_bits_costs_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 6, 6)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    scheme = Scheme(bit_widths=(0, 2, 4, 8))
    prepared = prepare(model, "bops <= 0.3%", x, scheme=scheme)
    prepared.calibrate([x])
    result = prepared.finalize()
    assert result.cost.assignment["input_1"] == 0
    exported = result.export(tmp_path / "net.onnx", "qonnx")
    assert exported.certificate.states[0].value == result.cost.states[0].value


def unfolded(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.unfold(x, 3).transpose(1, 2)


def rotated(x: torch.Tensor) -> torch.Tensor:
    angles = torch.arange(18.0) @ torch.linspace(0.0, 1.0, 18)[:, None]
    return x.flatten(1)[:, None, :18] * angles.cos()


CASES_OF_PARTS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "gelu": (lambda x: nn.functional.gelu(x.flatten(1)[:, :18]), "activations <= 72 B"),
    "unfold": (unfolded, "weights <= 50 B"),
    "vectors": (rotated, "weights <= 60 B, bops <= 3%"),
}


class Between(nn.Module):
    """A linear layer behind an op."""

    def __init__(self, op: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.op, self.head = op, nn.Linear(18, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.op(x))


@pytest.mark.parametrize("case", CASES_OF_PARTS)
def test_files_hold_no_more_than_the_model(case: str, tmp_path: Path) -> None:
    op, budget = CASES_OF_PARTS[case]
    result = prepare(Between(op), budget, torch.randn(2, 2, 5, 5)).finalize()
    states = result.export(tmp_path / "net.onnx", "qonnx").certificate.states
    assert [s.value for s in states] == [s.value for s in result.cost]


class Steps(nn.Module):
    """A cell that reads one row of its input after the other, and starts from zeros."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell = nn.LSTMCell(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, c = x.new_zeros(x.shape[0], 16), x.new_zeros(x.shape[0], 16)
        for step in range(2):
            h, c = self.cell(x[:, step], (h, c))
        return h


def test_what_is_picked_from_an_activation_has_its_bits(tmp_path: Path) -> None:
    result = prepare(Steps(), "bops <= 5%", torch.randn(4, 2, 8)).finalize()
    (state,) = result.export(tmp_path / "net.onnx", "qonnx").certificate.states
    assert state.value == result.cost.states[0].value


def spread(x: torch.Tensor) -> torch.Tensor:
    """What is expanded to a batch of 1 is no tensor of its own in the file."""
    return torch.eye(16)[None].expand(x.shape[0], -1, -1).bmm(x)


def test_a_file_that_costs_less_at_32_bits_states_what_its_bounds_refer_to(tmp_path: Path) -> None:
    x = torch.randn(4, 16, 18)
    result = prepare(Between(spread), "activations <= 70%, bops <= 5%", x).finalize()
    path = result.export(tmp_path / "net.onnx", "qonnx", verify=False).path
    found = verify(path, "activations <= 70%, arena <= 70%").states
    assert [s.reference for s in verify(path).states] == [s.reference for s in result.cost]
    assert found[0].reference == result.cost["activations"].reference > found[1].reference
    (entry,) = (p for p in onnx.load(path).metadata_props if p.key == "cgmq_fx")
    assert list(json.loads(entry.value)["references"]) == ["activations of 32 bits"]
