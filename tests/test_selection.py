"""Patterns select the layers that are quantized, and their bit-widths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cgmq_fx
from cgmq_fx.passes.insert import QUANTIZERS
from cgmq_fx.passes.quantizer import Quantizer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.conv = nn.Conv1d(16, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.conv(self.encoder(x)[..., None]).flatten(1))
        return y


def widths(**options: Any) -> dict[str, tuple[int, ...]]:
    """The bit-widths of every quantizer of `Net`."""
    prepared = cgmq_fx.prepare(
        Net(), "bops <= 100%", torch.rand(2, 8), scheme=cgmq_fx.Scheme(**options)
    )
    container = prepared.model.get_submodule(QUANTIZERS)
    prepared.model(torch.rand(5, 8)).sum().backward()
    return {n: q.spec.bit_widths for n, q in container.named_children() if isinstance(q, Quantizer)}


EVERY = {
    "x",
    "encoder_0_weight",
    "relu",
    "encoder_2_weight",
    "relu_1",
    "conv_weight",
    "conv1d",
    "head_weight",
}
ENCODER = {"x", "encoder_0_weight", "relu", "encoder_2_weight"}
HEAD = {"conv1d", "head_weight"}

SELECTED = [
    ({}, EVERY),
    ({"skip": "head"}, EVERY - HEAD),
    ({"skip": ["head", "conv"]}, ENCODER),
    ({"skip": "Linear"}, {"relu_1", "conv_weight"}),
    ({"skip": "torch.nn.modules.conv.*"}, ENCODER | HEAD),
    ({"skip": "encoder.0"}, EVERY - {"x", "encoder_0_weight"}),
    ({"only": "encoder.*"}, ENCODER),
    ({"only": "encoder"}, ENCODER),
    ({"only": ("Linear",), "skip": ("encoder.?",)}, HEAD),
    ({"only": "linear_2"}, HEAD),
]


@pytest.mark.parametrize(("options", "names"), SELECTED)
def test_patterns_select_layers(options: dict[str, Any], names: set[str]) -> None:
    assert set(widths(**options)) == names


def test_layers_have_bit_widths_of_their_own() -> None:
    found = widths(layers={"encoder.*": (4, 8), "head": 8, "Conv1d": (2, 16)})
    assert {found[name] for name in ENCODER} == {(4, 8)}
    assert {found[name] for name in HEAD} == {(8,)}
    assert found["conv_weight"] == found["relu_1"] == (2, 16)


def test_weights_have_bit_widths_of_their_own() -> None:
    found = widths(weight_widths=(2, 4, 7), layers={"head": 8})
    weights = {name for name in EVERY if name.endswith("weight")}
    assert {found[name] for name in weights - HEAD} == {(2, 4, 7)}
    assert {found[name] for name in EVERY - weights - HEAD} == {cgmq_fx.Scheme().bit_widths}
    assert {found[name] for name in HEAD} == {(8,)}


def test_the_last_pattern_counts() -> None:
    found = widths(layers={"Linear": (2, 4), "head": 8})
    assert found["head_weight"] == (8,)
    assert found["encoder_0_weight"] == (2, 4)


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.left(x) + self.right(x)
        return y


@pytest.mark.parametrize(
    ("layers", "common"),
    [({"left": (4, 8), "right": (2, 8)}, (8,)), ({"left": (2, 4)}, (2, 4))],
)
def test_a_tensor_has_the_widths_that_all_its_readers_allow(
    layers: dict[str, tuple[int, ...]], common: tuple[int, ...]
) -> None:
    scheme = cgmq_fx.Scheme(layers=layers)
    prepared = cgmq_fx.prepare(Fork(), "bops <= 100%", torch.rand(2, 8), scheme=scheme)
    assert prepared.facts.quantizers["x"].bit_widths == common


def test_a_skipped_layer_reads_and_costs_float() -> None:
    scheme = cgmq_fx.Scheme(skip="right")
    prepared = cgmq_fx.prepare(Fork(), "bops <= 100%", torch.rand(2, 8), scheme=scheme)
    nodes = {n.module: n for n in prepared.facts.nodes if n.operands}
    assert all(o.quantizer is None for o in nodes["right"].operands)
    assert all(o.quantizer for o in nodes["left"].operands)


def test_a_result_with_skipped_layers_survives_a_file(tmp_path: Any) -> None:
    scheme = cgmq_fx.Scheme(skip="head", layers={"encoder.*": (4, 8)})
    result = cgmq_fx.prepare(Net(), "bops <= 60%", torch.rand(2, 8), scheme=scheme).finalize()
    loaded = cgmq_fx.load(result.save(tmp_path / "model.safetensors"))
    for x in torch.rand(20, 3, 8):  # all digits are the same
        assert torch.equal(loaded.model(x), result.model(x))
    assert all(t.data_ptr() % 32 == 0 for t in loaded.model.state_dict().values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": "classifier"}, r"'classifier' in skip matches no layer.*encoder\.0, encoder\.2"),
        ({"only": ["head", "Conv3d"]}, r"'Conv3d' in only matches no layer"),
        ({"layers": {"tail.*": 8}}, r"'tail\.\*' in layers matches no layer"),
        ({"layers": {"head": 8}, "skip": "head"}, r"'head' in layers .* skip, or only, leaves"),
        ({"layers": {"head": 8}, "only": "encoder.*"}, r"'head' in layers .* skip, or only"),
        ({"skip": "*"}, "skip and only leave nothing to quantize"),
        ({"only": "head", "skip": "head"}, "skip and only leave nothing to quantize"),
        ({"layers": {"head": (5, 4)}}, r"layers\['head'\] must be ascending"),
        ({"layers": {"head": 64}}, "64 is no bit-width"),
        ({"layers": 8}, "layers takes bit-widths by pattern"),
        ({"skip": 3}, "skip takes a pattern"),
        ({"only": [""]}, "only takes a pattern"),
    ],
)
def test_options_that_select_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(cgmq_fx.OptionError, match=message):
        widths(**options)


def test_readers_without_a_common_width_are_named() -> None:
    scheme = cgmq_fx.Scheme(layers={"left": 4, "right": 8})
    with pytest.raises(cgmq_fx.OptionError, match=r"no bit-width in common: left .*right"):
        cgmq_fx.prepare(Fork(), "bops <= 100%", torch.rand(2, 8), scheme=scheme)
