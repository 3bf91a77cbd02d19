"""Quantized models for the tests of export: small budgets, and ranges that really clip."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.lenet5 import LeNet5
from benchmarks.resnet20 import ResNet20
from cgmq_fx import PRESETS, Result, Scheme, prepare
from cgmq_fx.exporters import Exported, exporters
from cgmq_fx.exporters.agreement import compare
from cgmq_fx.exporters.certificate import verify
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.insert import QUANTIZERS
from cgmq_fx.passes.lower import lower
from cgmq_fx.passes.quantizer import Quantizer

_CLIPPED = 0.7
"""What is left of the calibrated range of an activation."""


class Transformer(nn.Module):
    """Token embedding, one encoder layer, a classifier on the mean token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.layer(self.table(tokens)).mean(1)))


class Parts(nn.Module):
    """Parts of images cut out, joined, padded, enlarged, compared and multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.head = nn.Linear(24, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.leaky_relu(self.stem(images), 0.1)
        first, second = x.split(2, 1)
        large = self.up(x)[:, :, 4:12, :8]
        x = torch.cat([first * torch.sigmoid(second), large], 1)
        x = functional.max_pool2d(functional.pad(x, (1, 0, 1, 0)), 3, 2)
        x = functional.interpolate(x - torch.tanh(x), scale_factor=2.0)
        rows = x.flatten(2)
        alike = rows @ rows.transpose(1, 2)
        joined = [alike.flatten(1), x.mean((2, 3)), x.amax((2, 3))]
        return cast(Tensor, self.head(torch.cat(joined, 1)))


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5)
    )


def _separable() -> nn.Module:
    """Depthwise and pointwise convolutions, global average pooling."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
        *(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    )


_MODELS = {
    "lenet5": (LeNet5, (1, 28, 28)),
    "mlp": (_mlp, (16,)),
    "resnet20": (ResNet20, (3, 32, 32)),
    "separable": (_separable, (3, 16, 16)),
    "parts": (Parts, (3, 16, 16)),
    "transformer": (Transformer, None),
}
_MIXED = (2, 4, 8)
SCHEMES = {
    "tensor": Scheme(_MIXED),
    "channel": Scheme(_MIXED, weights="channel"),
    "pruned": Scheme((0, *_MIXED), weights="channel"),
    "both": Scheme((0, *_MIXED), weights="channel", activations="channel"),
    "element": Scheme((0, *_MIXED), weights="element"),
    "w2": Scheme((2,)),
    "w2 tensor": Scheme((2,), weight_ranges="tensor"),
    "w8": Scheme((8,)),
    "w16": Scheme((16,)),
    "float": Scheme((8, 32)),
    "integer": PRESETS["xnnpack"].scheme,
    "integer channel": replace(PRESETS["xnnpack"].scheme, weights="channel"),
    "integer element": replace(PRESETS["xnnpack"].scheme, weights="element"),
    "fpga": PRESETS["fpga"].scheme,
}


def inputs_of(name: str, batch: int) -> ExampleInputs:
    """Random inputs of a model."""
    shape = _MODELS[name][1]
    if shape is None:
        return ExampleInputs((torch.randint(11, (batch, 6)),))
    return ExampleInputs((torch.randn(batch, *shape),))


def float_net(name: str) -> nn.Module:
    """A model with random weights, always the same."""
    torch.manual_seed(0)
    model = _MODELS[name][0]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.2)
    return model.eval()


@lru_cache
def deployed(name: str, scheme: str = "tensor", budget: str = "bops <= 2%") -> Result:
    """A model quantized under a budget, bits spread over what the scheme allows."""
    model = float_net(name)
    own = SCHEMES[scheme]
    if name == "resnet20":
        budget = "bops <= 6%"
    if own.bit_widths[0] > 2:
        budget = "bops <= 100%"
    prepared = prepare(model, budget, inputs_of(name, 4), scheme=own)
    result = prepared.finalize()
    for quantizer in result.model.get_submodule(QUANTIZERS).children():
        if isinstance(quantizer, Quantizer) and quantizer.spec.role.value == "activation":
            with torch.no_grad():
                quantizer.log_range.add_(math.log(_CLIPPED))
    return result


def assert_counted(exported: Exported, result: Result) -> None:
    """A file was counted on its own, and costs what its graph costs."""
    assert exported.certificate.from_file
    again = verify(exported.path, result.budget)
    assert [s.value for s in again.states] == [s.value for s in result.cost.states]


def assert_runs(exported: Exported, result: Result, inputs: ExampleInputs) -> None:
    """In its runtime a file gives what the lowered graph gives, to a step."""
    found = exporters()[exported.format].run(exported.path, [inputs])
    agreement = compare(lower(result.model, result.inputs), found, [inputs])
    assert agreement.largest <= 1.01
    assert agreement.argmax == 1.0


def optimised(path: Path, folder: Path) -> set[str]:
    """The ops that a session at its default options makes of a file."""
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return {node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node}
