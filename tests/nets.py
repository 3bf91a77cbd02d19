"""Small models that the tests of passes and artifacts share, and helpers to run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from cgmq_fx.graphs import float_graph
from cgmq_fx.passes.bias import QuantizeBiases
from cgmq_fx.passes.capture import Captured, ExampleInputs
from cgmq_fx.passes.infra import run_passes
from cgmq_fx.passes.insert import QUANTIZERS, InsertQuantizers
from cgmq_fx.passes.quantizer import Quantizer
from cgmq_fx.passes.scheme import Scheme
from cgmq_fx.passes.shapes import PropagateShapes


class Residual(nn.Module):
    """Two convolutions with batch norm, in-place ReLU and an in-place sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a, self.na = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.b, self.nb = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.nb(self.b(self.relu(self.na(self.a(x)))))
        y += x
        return cast(Tensor, self.head(self.relu(y).mean((2, 3))))


class Concat(nn.Module):
    """Two branches put side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 3, 3, padding=1)
        self.c = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.c(torch.cat([self.a(x).relu(), self.b(x)], 1)))


class Attention(nn.Module):
    """Self-attention with a residual sum and layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(x + self.attention(x, x, x, need_weights=False)[0]))


class Tied(nn.Module):
    """An embedding whose table is the weight of the last layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.table(tokens)))


class Keywords(nn.Module):
    """Takes a positional and a keyword tensor, returns a dict of a tensor and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, x: Tensor, *, other: Tensor) -> dict[str, Any]:
        a, b = self.a(x), self.b(other)
        return {"sum": a + b, "parts": (a, b)}


class Nested(nn.Module):
    """Takes a dict and a tuple, returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, x: dict[str, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.a(x["left"]) * y[0], self.b(x["right"]) * y[1]


class Buffers(nn.Module):
    """Reads a buffer, a buffer that is not saved, and a constant."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.register_buffer("shift", torch.tensor([1.0, 2.0, 3.0]))
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.a((x - self.shift) / self.scale) * torch.tensor([1.0, 0.5, 2.0]))


class Masked(nn.Module):
    """Attention scores under a boolean mask, and rows that are picked by index."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor, index: Tensor) -> Tensor:
        scores = (self.a(x) @ x.transpose(1, 2)).masked_fill(mask, -1e4)
        return cast(Tensor, (scores.softmax(-1) @ x)[:, index[0]])


class TokenNorm(nn.Module):
    """Batch norm over the tokens of a linear layer with two token axes: cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.a(x)))


def plain_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


def separable() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, groups=3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU6(),
        nn.Conv2d(6, 4, 1),
    )


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(3, 4, 2, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
        nn.BatchNorm2d(6),
    )


def conv1d() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 4, 3, dilation=2), nn.BatchNorm1d(4), nn.Conv1d(4, 2, 1))


def conv3d() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), nn.ReLU(), nn.AvgPool3d(2))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 3)
    )


def linear_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Sigmoid(), nn.Linear(4, 2))


@dataclass(frozen=True)
class Net:
    """A model and inputs of any batch size.

    Attributes:
        name: What the tests call it.
        make: Makes the model.
        inputs: Batch size -> arguments.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], ExampleInputs]

    def build(self) -> nn.Module:
        """The model with fixed weights, its batch norms having statistics of their own."""
        torch.manual_seed(0)
        model = self.make()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                for tensor in (module.running_mean, module.weight, module.bias):
                    if tensor is not None:
                        nn.init.normal_(tensor)
                if module.running_var is not None:
                    nn.init.uniform_(module.running_var, 0.5, 2.0)
        return model

    def float_graph(self, batch: int = 2) -> Captured:
        """The captured and normalised model."""
        return float_graph(self.build(), self.inputs(batch))

    def quantized(self, scheme: Scheme | None = None) -> GraphModule:
        """The graph with quantizers, not calibrated: all at 32 bits and range 1."""
        return quantized(self.float_graph(), scheme)


def quantized(captured: Captured, scheme: Scheme | None = None) -> GraphModule:
    """A captured model with quantizers, not calibrated."""
    passes = [
        InsertQuantizers(scheme or Scheme(), batched=captured.inputs.batch is not None),
        QuantizeBiases(),
        PropagateShapes(captured.inputs),
    ]
    return run_passes(captured.module, passes)


def quantizers(module: GraphModule) -> dict[str, Quantizer]:
    """The quantizers of a graph by name."""
    container = module.get_submodule(QUANTIZERS)
    return {name: q for name, q in container.named_children() if isinstance(q, Quantizer)}


def tensors(*shapes: tuple[int, ...]) -> Callable[[int], ExampleInputs]:
    """Random positional arguments of these shapes, after the batch."""
    return lambda batch: ExampleInputs(tuple(torch.randn(batch, *s) for s in shapes))


def randoms(batch: int, size: int) -> Tensor:
    return torch.randn(batch, size)


NETS = {
    net.name: net
    for net in [
        Net("cnn", plain_cnn, tensors((3, 8, 8))),
        Net("residual", Residual, tensors((3, 6, 6))),
        Net("concat", Concat, tensors((3, 5, 5))),
        Net("separable", separable, tensors((3, 7, 7))),
        Net("transposed", transposed, tensors((3, 4, 4))),
        Net("conv1d", conv1d, tensors((3, 9))),
        Net("conv3d", conv3d, tensors((2, 5, 5, 5))),
        Net("attention", Attention, tensors((5, 8))),
        Net("mlp", mlp, tensors((6,))),
        Net("linear_norm", linear_norm, tensors((6,))),
        Net("token_norm", TokenNorm, tensors((5, 3))),
        Net("buffers", Buffers, tensors((3,))),
        Net("tied", Tied, lambda b: ExampleInputs((torch.arange(3 * b).reshape(b, 3) % 7,))),
        Net(
            "keywords",
            Keywords,
            lambda b: ExampleInputs((randoms(b, 3),), {"other": randoms(b, 2)}),
        ),
        Net(
            "nested",
            Nested,
            lambda b: ExampleInputs(
                (
                    {"left": randoms(b, 3), "right": randoms(b, 2)},
                    (randoms(b, 4), randoms(b, 4)),
                )
            ),
        ),
        Net(
            "masked",
            Masked,
            lambda b: ExampleInputs(
                (torch.randn(b, 5, 4), torch.rand(b, 5, 5) > 0.5, torch.tensor([[1, 3]] * b))
            ),
        ),
    ]
}
"""All models by name."""


def call(module: nn.Module, inputs: ExampleInputs) -> list[Any]:
    """The outputs of a module, flat, without gradients."""
    with torch.no_grad():
        return pytree.tree_leaves(module(*inputs.args, **inputs.kwargs))


def distance(found: list[Any], expected: list[Any]) -> float:
    """The largest difference, relative to the largest value; infinite for other shapes."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        return float("inf")
    pairs = list(zip(found, expected, strict=True))
    scale = max(float(b.abs().max()) for _, b in pairs) or 1.0
    return max(float((a - b).abs().max()) for a, b in pairs) / scale


def ops(module: GraphModule) -> list[str]:
    """The names of the ops that a graph calls, in order: "conv2d", "relu"."""
    return [op_name(n) for n in module.graph.nodes if n.op == "call_function"]


def op_name(node: Node) -> str:
    """The name of the op that a node calls, without namespace and overload."""
    return str(getattr(node.target, "_opname", getattr(node.target, "__name__", node.target)))


def small_classifier() -> nn.Module:
    """Two linear layers with a ReLU in between: the smallest model of all."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
