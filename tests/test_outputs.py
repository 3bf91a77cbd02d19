"""Outputs of a network: rounded where integer kernels make them, in float where float ops do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cgmq_fx
from cgmq_fx import PRESETS, Scheme


class Heads(nn.Module):
    """Two convolutions on one stem, of scales that differ by far, and what is made of them."""

    def __init__(self, end: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.stem, self.end = nn.Conv2d(3, 8, 3, stride=2, padding=1), end
        self.boxes, self.classes = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            for parameter in self.boxes.parameters():
                parameter.mul_(100)

    def forward(self, x: Tensor) -> object:
        y = F.relu(self.stem(x))
        return self.end(self.boxes(y), self.classes(y))


def _yolo(boxes: Tensor, classes: Tensor) -> Tensor:
    """Coordinates in pixels beside probabilities."""
    xy, wh = boxes.sigmoid().split(2, 1)
    return torch.cat([xy * 64, (wh * 2) ** 2 * 30, classes.sigmoid()], 1)


def _ssd(boxes: Tensor, classes: Tensor) -> Tensor:
    rows = (x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4) for x in (boxes, classes))
    return torch.cat(list(rows), 2)


BOXES, CLASSES = "conv2d_1", "conv2d_2"

# What is made of the heads, and the tensors that are rounded for it.
ENDS: dict[str, tuple[Callable[[Tensor, Tensor], object], set[str]]] = {
    "a layer": (lambda b, c: c, {CLASSES}),
    "a view": (lambda b, c: c.flatten(2).transpose(1, 2), {CLASSES}),
    "another precision": (lambda b, c: c.permute(0, 2, 3, 1).double(), {CLASSES}),
    "relu": (lambda b, c: c.relu(), {"relu_1"}),
    "limits": (lambda b, c: c.clamp(-0.1, 0.2), {"clamp"}),
    "sum": (lambda b, c: b + c, {BOXES, CLASSES, "add"}),
    "pool": (lambda b, c: c.mean((2, 3)), {CLASSES, "mean"}),
    "part": (lambda b, c: c[:, :2], {"slice_2"}),
    "two": (lambda b, c: {"b": b, "c": c}, {BOXES, CLASSES}),
    "logits and probabilities": (lambda b, c: (c, c.softmax(1)), {CLASSES}),
    "join": (lambda b, c: torch.cat([b, c], 1), {BOXES, CLASSES}),
    "stack": (lambda b, c: torch.stack([b, c], 1)[:, :1], {BOXES, CLASSES}),
    "join of joins": (lambda b, c: torch.cat([torch.cat([b, c]).double(), b]), {BOXES, CLASSES}),
    "join with float": (lambda b, c: torch.cat([b, c.sigmoid()], 1), {BOXES}),
    "ssd": (_ssd, {BOXES, CLASSES}),
    "yolo": (_yolo, set()),
    "sigmoid": (lambda b, c: c.sigmoid(), set()),
    "scaled": (lambda b, c: c * 0.5, set()),
    "sum with float": (lambda b, c: b + c.exp(), set()),
    "pool of a join": (lambda b, c: torch.cat([b, c], 1).mean((2, 3)), set()),
}


def _rounded(scheme: Scheme, end: Callable[[Tensor, Tensor], object]) -> set[str]:
    """Tensors behind the heads that are rounded."""
    found = cgmq_fx.prepare(Heads(end), "bops <= 100%", torch.rand(2, 3, 8, 8), scheme=scheme)
    names = {name for name in found.facts.quantizers if not name.endswith("_weight")}
    return names - {"x", "relu"}


@pytest.mark.parametrize("name", ENDS)
def test_outputs_are_rounded_where_integer_kernels_make_them(name: str) -> None:
    end, expected = ENDS[name]
    assert _rounded(Scheme((8,), output_bits=8), end) == expected


def test_layers_that_are_skipped_return_floats() -> None:
    scheme = Scheme((8,), output_bits=8, skip="classes")
    assert _rounded(scheme, lambda b, c: (b, c)) == {BOXES}


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "none"])
def test_outputs_stay_float_under_a_preset_where_that_is_asked(name: str) -> None:
    scheme = PRESETS[name].apply(Scheme(output_bits=32))
    assert scheme == PRESETS[name].apply(scheme)
    assert _rounded(scheme, lambda b, c: (b, c)) == set()


@pytest.mark.parametrize("end", [_yolo, _ssd])
def test_scores_beside_coordinates_keep_their_accuracy(
    end: Callable[[Tensor, Tensor], Tensor], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model, x = Heads(end).eval(), torch.randn(4, 3, 16, 16)
    result = cgmq_fx.quantize(
        model,
        "bops <= 100%, activations <= 100%",
        [x],
        epochs=0,
        progress=False,
        target="onnxruntime",
    )
    axis = 1 if end is _yolo else 2
    with torch.no_grad():
        found, expected = (net(x).split(4, axis) for net in (result.model, model))
    errors = [float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True)]
    assert max(errors) < 0.03
    exported = result.export(tmp_path / "net.onnx", samples=[x])
    assert exported.agreement is not None
    assert exported.agreement.within == 1.0
