"""LiteRT's operators as the ATen ops that cost the same, with the shapes that they give."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cgmq_fx.cost_models.errors import ArtifactError
from cgmq_fx.exporters.byte_graph import ByteGraph, Constant, Operand, Pads, Value
from cgmq_fx.exporters.flat import Table

_ATEN = torch.ops.aten
_SAME = 0
_DEPTHWISE = 4
_FUSED_FIELD = {0: 0, 1: 5, 2: 1, 3: 3, 4: 4, 9: 0, 17: 5, 67: 3, 18: 0, 41: 0, 42: 0}
"""Where the options of an operator say what clamp it has."""

_FUSED: dict[int, tuple[float, float]] = {1: (0.0, math.inf), 2: (-1.0, 1.0), 3: (0.0, 6.0)}


@dataclass
class Call:
    """One operator.

    Attributes:
        builder: What it is added to.
        code: Its number.
        options: Its options.
        stated: The shape that the file states of its first output.
        inputs: What it reads; None where an optional one is absent.
        pads: Zeros around the images that it reads.
    """

    builder: ByteGraph
    code: int
    options: Table | None
    stated: tuple[int, ...]
    inputs: list[Operand | None] = field(default_factory=list)
    pads: Pads | None = None

    @property
    def fused(self) -> tuple[float, float] | None:
        """The limits of its results, if it clamps them."""
        place = _FUSED_FIELD.get(self.code)
        return None if place is None else _FUSED.get(self.option(place, "i1"))

    def option(self, field_number: int, kind: str = "i4", default: int = 0) -> int:
        """A number among its options."""
        if self.options is None:
            return default
        return int(self.options.number(field_number, kind, default))

    def operand(self, index: int) -> Operand:
        """An input."""
        found = self.inputs[index] if index < len(self.inputs) else None
        if found is None:
            raise ArtifactError(f"operator {self.code} lacks an input")
        return found

    def value(self, index: int = 0) -> Value:
        """An input that is computed."""
        found = self.operand(index)
        if isinstance(found, Constant):
            raise ArtifactError(f"operator {self.code} reads a constant where none can be")
        return found

    def integers(self, index: int) -> list[int]:
        """An input that is a row of whole numbers in the file."""
        found = self.operand(index)
        if not isinstance(found, Constant) or found.values.dtype.kind != "i":
            raise ArtifactError(f"operator {self.code} computes a shape")
        return [int(number) for number in found.values.reshape(-1)]

    def unknown(self, given: Sequence[Operand], shape: tuple[int, ...]) -> Value:
        """An operator that no table knows, with the shape that the file states."""
        return self.builder.call(
            _ATEN.clone.default, given, lambda *_: torch.empty(shape, device="meta")
        )


Read: TypeAlias = Callable[[Call], list[Value]]


@dataclass(frozen=True)
class Handler:
    """How an operator is read.

    Attributes:
        read: Adds it.
        pads: Whether it takes zeros around its first input as part of itself.
    """

    read: Read
    pads: bool = False


def _alike(target: Any, count: int) -> Handler:
    """An op whose result has the shape of its operands."""
    return Handler(
        lambda call: [call.builder.same(target, [call.operand(i) for i in range(count)])]
    )


def _moved(target: Any, rule: Callable[[Call, Tensor], Tensor]) -> Handler:
    """An op on one tensor."""
    return Handler(
        lambda call: [call.builder.call(target, [call.operand(0)], lambda x: rule(call, x))]
    )


def _around(size: int, kernel: int, stride: int, dilation: int, same: bool) -> tuple[int, int]:
    """Zeros before and after an axis that TensorFlow's "same" padding adds."""
    if not same:
        return 0, 0
    reach = (kernel - 1) * dilation + 1
    total = max((-(-size // stride) - 1) * stride + reach - size, 0)
    return total // 2, total - total // 2


def _window(
    call: Call, kernel: tuple[int, int], strides: tuple[int, int], dilations: tuple[int, int]
) -> Pads:
    """Zeros around the images: those of an op before, and those of this op."""
    before = call.pads or (0, 0, 0, 0)
    shape = call.value().shape
    sizes = shape[1] + before[2] + before[3], shape[2] + before[0] + before[1]
    same = call.option(0, "i1") == _SAME
    rows = [_around(*row, same) for row in zip(sizes, kernel, strides, dilations, strict=True)]
    (top, bottom), (left, right) = rows
    return before[0] + left, before[1] + right, before[2] + top, before[3] + bottom


def _convolution(call: Call) -> list[Value]:
    depthwise = call.code == _DEPTHWISE
    weight = call.operand(1)
    if not isinstance(weight, Constant) or weight.values.ndim != 4:
        raise ArtifactError("a convolution has a weight that is computed")
    weight = weight.permuted((3, 0, 1, 2) if depthwise else (0, 3, 1, 2))
    strides = call.option(2, default=1), call.option(1, default=1)
    first = 5 if depthwise else 4
    dilations = call.option(first + 1, default=1), call.option(first, default=1)
    channels = call.value().shape[-1]
    groups = channels if depthwise else channels // max(weight.values.shape[1], 1)
    kernel = weight.values.shape[2], weight.values.shape[3]
    pads = _window(call, kernel, strides, dilations)
    operands = [call.value(), weight, *[i for i in call.inputs[2:3] if i is not None]]
    return [call.builder.convolution(operands, strides, dilations, pads, groups)]


def _transposed_convolution(call: Call) -> list[Value]:
    """Its inputs: the size of the result, the weight, the images, perhaps a bias."""
    weight, sizes = call.operand(1), call.integers(0)
    if not isinstance(weight, Constant) or len(sizes) != 4:
        raise ArtifactError("a transposed convolution has a weight that is computed")
    bias = [i for i in call.inputs[3:4] if i is not None]
    operands = [call.value(2), weight.permuted((3, 0, 1, 2)), *bias]
    made = call.builder.transposed_convolution(
        operands,
        strides=(call.option(2, default=1), call.option(1, default=1)),
        dilations=(1, 1),
        size=(sizes[1], sizes[2]),
        pads=(0, 0, 0, 0),
    )
    return [made]


def _pool(target: Any) -> Handler:
    def read(call: Call) -> list[Value]:
        strides = call.option(2, default=1), call.option(1, default=1)
        sizes = call.option(4, default=1), call.option(3, default=1)
        pads = _window(call, sizes, strides, (1, 1))
        return [call.builder.pooled(target, call.value(), sizes, strides, (1, 1), pads)]

    return Handler(read)


def _linear(call: Call) -> list[Value]:
    if call.option(1, "i1"):
        raise ArtifactError("a linear layer has its weight in an order that is not known")
    keeps = bool(call.option(2, "u1"))

    def rule(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        rows = x if keeps else x.reshape(-1, weight.shape[1])
        return torch.nn.functional.linear(rows.float(), weight.float())

    operands = [call.value(), call.operand(1), *[i for i in call.inputs[2:3] if i is not None]]
    return [call.builder.multiplied(_ATEN.linear.default, operands, rule)]


def _product(call: Call) -> list[Value]:
    turned = [bool(call.option(i, "u1")) for i in (0, 1)]

    def rule(first: Tensor, second: Tensor) -> Tensor:
        pair = [t.mT if turn else t for t, turn in zip((first, second), turned, strict=True)]
        return pair[0].float() @ pair[1].float()

    operands = [call.operand(0), call.operand(1)]
    return [call.builder.multiplied(_ATEN.matmul.default, operands, rule)]


def _reshaped(call: Call, x: Tensor) -> Tensor:
    shape = call.integers(1) if len(call.inputs) > 1 else list(call.stated)
    return x.reshape(shape)


def _transposed(call: Call) -> list[Value]:
    return [call.builder.permuted(call.operand(0), call.integers(1))]


def _padded(call: Call) -> list[Value]:
    pairs = call.integers(1)
    pads = [n for i in range(len(pairs) - 2, -1, -2) for n in pairs[i : i + 2]]
    made = call.builder.call(
        _ATEN.constant_pad_nd.default, [call.value()], lambda x: torch.constant_pad_nd(x, pads)
    )
    made.node.args = (made.node.args[0], pads)
    return [made]


def _sliced(call: Call, x: Tensor) -> Tensor:
    pairs = zip(call.integers(1), call.integers(2), strict=True)
    for axis, (start, size) in enumerate(pairs):
        x = x.narrow(axis, start, x.shape[axis] - start if size < 0 else size)
    return x


def _strided(call: Call, x: Tensor) -> Tensor:
    begin, end, strides = (call.integers(i) for i in (1, 2, 3))
    masks = [call.option(i) for i in range(5)]
    if masks[2] or masks[3] or min(strides, default=1) < 1:
        raise ArtifactError("a slice has a form that is not known")
    index: list[Any] = []
    for axis in range(len(begin)):
        first = None if masks[0] >> axis & 1 else begin[axis]
        last = None if masks[1] >> axis & 1 else end[axis]
        single = masks[4] >> axis & 1
        index.append(begin[axis] if single else slice(first, last, strides[axis]))
    return x[tuple(index)]


def _reduced(target: Any) -> Handler:
    return _moved(
        target, lambda call, x: x.float().mean(call.integers(1), keepdim=bool(call.option(0, "u1")))
    )


def _joined(call: Call) -> list[Value]:
    operands = [call.operand(i) for i in range(len(call.inputs))]
    axis = call.option(0)
    return [call.builder.call(_ATEN.cat.default, operands, lambda *t: torch.cat(t, axis))]


def _stacked(call: Call) -> list[Value]:
    operands = [call.operand(i) for i in range(len(call.inputs))]
    axis = call.option(1)
    return [call.builder.call(_ATEN.stack.default, operands, lambda *t: torch.stack(t, axis))]


def _parts(call: Call, source: int, axis: int, count: int) -> list[Value]:
    size = call.value(source).shape[axis] // max(count, 1)
    if not 0 < count <= call.value(source).shape[axis]:
        raise ArtifactError("a tensor is split into more parts than it has")
    return [
        call.builder.call(
            _ATEN.slice.Tensor, [call.value(source)], lambda x, i=i: x.narrow(axis, i * size, size)
        )
        for i in range(count)
    ]


def _split(call: Call) -> list[Value]:
    return _parts(call, 1, call.integers(0)[0], call.option(0))


def _gathered(call: Call) -> list[Value]:
    """Rows of a table, or of a tensor."""
    axis = call.option(0)
    source, places = call.operand(0), call.operand(1)
    target = _ATEN.embedding.default if isinstance(source, Constant) else _ATEN.index_select.default
    shape = places.values.shape if isinstance(places, Constant) else places.shape

    def rule(x: Tensor, *_: Tensor) -> Tensor:
        return x.new_empty((*x.shape[:axis], *shape, *x.shape[axis + 1 :]))

    table = call.builder.weight(source, axis) if isinstance(source, Constant) else source
    given = [table] if isinstance(places, Constant) else [table, places]
    return [call.builder.call(target, given, rule)]


def _looked_up(call: Call) -> list[Value]:
    """Rows of a table: the places come first."""
    return [
        call.builder.call(
            _ATEN.embedding.default,
            [_table(call), call.operand(0)],
            lambda table, places: table.new_empty((*places.shape, *table.shape[1:])),
        )
    ]


def _table(call: Call) -> Operand:
    table = call.operand(1)
    return call.builder.weight(table) if isinstance(table, Constant) else table


def _resized(call: Call, x: Tensor) -> Tensor:
    """Images, with channels last, of a height and width that the file gives."""
    height, width = call.integers(1)
    return x.new_empty((x.shape[0], height, width, x.shape[3]))


def _tiled(call: Call, x: Tensor) -> Tensor:
    return x.repeat(call.integers(1))


CLAMPS: dict[int, tuple[float, float] | None] = {
    19: (0.0, math.inf),
    20: (-1.0, 1.0),
    21: (0.0, 6.0),
    152: (0.0, 1.0),
    55: None,
    57: None,
}
"""Operators that limit values: between what, or None where an input says it."""

PASSED_ON = frozenset({6, 114})
"""Operators that change how values are written."""

_UNARY = {
    8: _ATEN.floor.default,
    14: _ATEN.sigmoid.default,
    25: _ATEN.softmax.int,
    28: _ATEN.tanh.default,
    47: _ATEN.exp.default,
    50: _ATEN.log_softmax.int,
    53: _ATEN.clone.default,
    59: _ATEN.neg.default,
    66: _ATEN.sin.default,
    73: _ATEN.log.default,
    75: _ATEN.sqrt.default,
    76: _ATEN.rsqrt.default,
    92: _ATEN.square.default,
    98: _ATEN.leaky_relu.default,
    101: _ATEN.abs.default,
    104: _ATEN.ceil.default,
    108: _ATEN.cos.default,
    111: _ATEN.elu.default,
    116: _ATEN.round.default,
    117: _ATEN.hardswish.default,
    150: _ATEN.gelu.default,
}
_BINARY = {
    0: _ATEN.add.Tensor,
    18: _ATEN.mul.Tensor,
    41: _ATEN.sub.Tensor,
    42: _ATEN.div.Tensor,
    54: _ATEN.prelu.default,
    78: _ATEN.pow.Tensor_Tensor,
    99: _ATEN.sub.Tensor,
}

HANDLERS: dict[int, Handler] = {
    **{code: _alike(target, 1) for code, target in _UNARY.items()},
    **{code: _alike(target, 2) for code, target in _BINARY.items()},
    1: _pool(_ATEN.avg_pool2d.default),
    2: Handler(_joined),
    3: Handler(_convolution, pads=True),
    4: Handler(_convolution, pads=True),
    7: Handler(_looked_up),
    9: Handler(_linear),
    17: _pool(_ATEN.max_pool2d.default),
    22: _moved(_ATEN.reshape.default, _reshaped),
    34: Handler(_padded),
    36: Handler(_gathered),
    39: Handler(_transposed),
    40: _reduced(_ATEN.mean.dim),
    43: _moved(_ATEN.reshape.default, lambda call, x: x.reshape(call.stated)),
    45: _moved(_ATEN.slice.Tensor, _strided),
    49: Handler(_split),
    65: _moved(_ATEN.slice.Tensor, _sliced),
    67: Handler(_transposed_convolution),
    69: _moved(_ATEN.repeat.default, _tiled),
    70: _moved(_ATEN.reshape.default, lambda call, x: x.reshape(call.stated)),
    74: _reduced(_ATEN.sum.dim_IntList),
    82: _reduced(_ATEN.amax.default),
    83: Handler(_stacked),
    97: _moved(_ATEN.upsample_nearest2d.vec, _resized),
    126: Handler(_product),
    130: _moved(_ATEN.expand.default, lambda call, x: x.expand(call.integers(1))),
}
"""Operators by their number."""
