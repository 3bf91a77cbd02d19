"""XNNPACK's nodes, as ExecuTorch writes them, as the ATen ops that cost the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from cgmq_fx.cost_models.errors import ArtifactError
from cgmq_fx.exporters.byte_graph import Constant, Operand, Value
from cgmq_fx.exporters.flat import Table

if TYPE_CHECKING:
    from cgmq_fx.exporters.xnnpack_reader import XnnpackReader

_ATEN = torch.ops.aten
_NO_INPUT = 0xFFFFFFFF
_TRANSPOSED = 1

_ALIKE = {
    1: _ATEN.add.Tensor,
    3: _ATEN.softmax.int,
    4: _ATEN.sigmoid.default,
    8: _ATEN.div.Tensor,
    12: _ATEN.minimum.default,
    15: _ATEN.mul.Tensor,
    16: _ATEN.sub.Tensor,
    17: _ATEN.floor.default,
    22: _ATEN.sqrt.default,
    23: _ATEN.ceil.default,
    24: _ATEN.hardswish.default,
    26: _ATEN.maximum.default,
    27: _ATEN.neg.default,
    28: _ATEN.square.default,
    30: _ATEN.abs.default,
    31: _ATEN.prelu.default,
    40: _ATEN.rsqrt.default,
    41: _ATEN.log.default,
    42: _ATEN.gelu.default,
    43: _ATEN.tanh.default,
    44: _ATEN.exp.default,
    45: _ATEN.sin.default,
    46: _ATEN.clone.default,
    47: _ATEN.cos.default,
}
"""Nodes whose output has the shape of their operands: number of the kind -> the ATen op."""

_TWO = frozenset({1, 8, 12, 15, 16, 26, 31})
"""Those of them that have two operands."""

_CLAMP, _CONVERT = 6, 18
_JOINS = {32: 2, 33: 3, 34: 4, 38: 5}
"""Nodes that join tensors, and how many."""

Handler: TypeAlias = "Callable[[XnnpackReader, Table], tuple[int, Value]]"


def read_node(reader: XnnpackReader, kind: int, table: Table) -> tuple[int, Operand]:
    """The number of the tensor that a node writes, and its value."""
    if kind in _ALIKE:
        count = 2 if kind in _TWO else 1
        operands = [reader.operand(_id(table, i)) for i in range(count)]
        return _id(table, count), reader.builder.same(_ALIKE[kind], operands)
    if kind == _CONVERT and isinstance(codes := reader.operand(_id(table, 0)), Constant):
        return _id(table, 1), reader.builder.weight(codes, codes.axis)  # of a table
    if kind in (_CLAMP, _CONVERT):
        return _id(table, 1), reader.value(_id(table, 0))
    if kind in _JOINS:
        parts = [reader.operand(_id(table, i)) for i in (1, 2, 3, 4, 7)[: _JOINS[kind]]]
        axis = int(table.number(0, "u4"))
        return _id(table, 5), reader.builder.call(
            _ATEN.cat.default, parts, lambda *given: torch.cat(given, axis)
        )
    handler = _HANDLERS.get(kind)
    if handler is None:
        raise ArtifactError(f"nodes of kind {kind} in what is delegated to XNNPACK are not known")
    return handler(reader, table)


def _id(table: Table, field: int) -> int:
    return int(table.number(field, "u4"))


def _sizes(table: Table, *fields: int) -> tuple[int, ...]:
    return tuple(_id(table, field) for field in fields)


def _linear(reader: XnnpackReader, table: Table) -> tuple[int, Value]:
    if _id(table, 4) & _TRANSPOSED:
        raise ArtifactError("XNNPACK has a linear layer whose weight is transposed")
    x, weight, *bias = _layer(reader, table, 0)
    made = reader.builder.multiplied(_ATEN.linear.default, [x, weight, *bias], _linear_rule)
    return _id(table, 3), made


def _linear_rule(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
    return torch.nn.functional.linear(x.float(), weight.float())


def _layer(reader: XnnpackReader, table: Table, first: int) -> list[Operand]:
    """Input, weight and bias."""
    numbers = _sizes(table, first, first + 1, first + 2)
    return [reader.operand(n) for n in numbers if n != _NO_INPUT]


def _convolution(reader: XnnpackReader, table: Table, order: tuple[int, ...]) -> tuple[int, Value]:
    operands = _layer(reader, table, 15)
    if not isinstance(operands[1], Constant):
        raise ArtifactError("XNNPACK has a convolution whose weight is computed")
    operands[1] = operands[1].permuted(order)
    top, right, bottom, left = _sizes(table, 0, 1, 2, 3)
    made = reader.builder.convolution(
        operands,
        strides=(_id(table, 6), _id(table, 7)),
        dilations=(_id(table, 8), _id(table, 9)),
        pads=(left, right, top, bottom),
        groups=_id(table, 12),
    )
    return _id(table, 18), made


def _dense(reader: XnnpackReader, table: Table) -> tuple[int, Value]:
    return _convolution(reader, table, (0, 3, 1, 2))


def _depthwise(reader: XnnpackReader, table: Table) -> tuple[int, Value]:
    return _convolution(reader, table, (3, 0, 1, 2))


def _transposed(reader: XnnpackReader, table: Table) -> tuple[int, Value]:
    operands = _layer(reader, table, 15)
    if not isinstance(operands[1], Constant) or _id(table, 12) != 1:
        raise ArtifactError("XNNPACK has a transposed convolution of a form that is not counted")
    operands[1] = operands[1].permuted((3, 0, 1, 2))
    top, right, bottom, left = _sizes(table, 0, 1, 2, 3)
    made = reader.builder.transposed_convolution(
        operands,
        strides=(_id(table, 6), _id(table, 7)),
        dilations=(_id(table, 8), _id(table, 9)),
        size=None,
        pads=(left, right - _id(table, 14), top, bottom - _id(table, 13)),
    )
    return _id(table, 18), made


def _pool(reader: XnnpackReader, table: Table, target: Any) -> tuple[int, Value]:
    top, right, bottom, left = _sizes(table, 0, 1, 2, 3)
    made = reader.builder.pooled(
        target,
        reader.value(_id(table, 10)),
        sizes=(_id(table, 4), _id(table, 5)),
        strides=(_id(table, 6), _id(table, 7)),
        dilations=(_id(table, 8) or 1, _id(table, 9) or 1),
        pads=(left, right, top, bottom),
    )
    return _id(table, 11), made


def _global_pool(reader: XnnpackReader, table: Table) -> tuple[int, Value]:
    images = reader.value(_id(table, 0))
    made = reader.builder.call(_ATEN.mean.dim, [images], lambda x: x.mean((1, 2), keepdim=True))
    return _id(table, 1), made


def _transpose(reader: XnnpackReader, table: Table) -> tuple[int, Value]:
    order = [int(n) for n in table.numbers(1, "u4")]
    source = reader.operand(_id(table, 2))
    return _id(table, 3), reader.builder.permuted(source, order)


def _reshape(reader: XnnpackReader, table: Table) -> tuple[int, Value]:
    shape = [int(n) for n in table.numbers(1, "u4")]
    source = reader.operand(_id(table, 2))
    return _id(table, 3), reader.builder.call(
        _ATEN.reshape.default, [source], lambda x: x.reshape(_free(shape))
    )


def _free(shape: list[int]) -> list[int]:
    """A size of 0 is what is left."""
    return [size or -1 for size in shape]


def _pad(reader: XnnpackReader, table: Table) -> tuple[int, Value]:
    before, after = (table.numbers(i, "u4").tolist() for i in (0, 1))
    pads = [int(n) for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    value = float(table.number(2, "f4"))
    source = reader.value(_id(table, 3))
    made = reader.builder.call(
        _ATEN.constant_pad_nd.default,
        [source],
        lambda x: torch.constant_pad_nd(x, pads, value),
        value=value,
    )
    made.node.args = (made.node.args[0], pads)
    return _id(table, 4), made


def _slice(reader: XnnpackReader, table: Table) -> tuple[int, Value]:
    starts, sizes = (table.numbers(i, "u4").tolist() for i in (1, 2))

    def rule(x: Tensor) -> Tensor:
        for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            x = x.narrow(axis, start, size or x.shape[axis] - start)
        return x

    made = reader.builder.call(_ATEN.slice.Tensor, [reader.value(_id(table, 3))], rule)
    return _id(table, 4), made


def _product(reader: XnnpackReader, table: Table) -> tuple[int, Value]:
    operands = [reader.operand(n) for n in _sizes(table, 0, 1)]
    made = reader.builder.multiplied(
        _ATEN.matmul.default, operands, lambda x, y: x.float() @ y.float()
    )
    return _id(table, 2), made


def _alike(reader: XnnpackReader, table: Table, target: Any) -> tuple[int, Value]:
    """An element-wise op with a number before its input."""
    return _id(table, 2), reader.builder.same(target, [reader.value(_id(table, 1))])


_HANDLERS: Mapping[int, Handler] = {
    2: _linear,
    5: _transpose,
    7: _dense,
    10: _pad,
    11: lambda reader, table: _pool(reader, table, _ATEN.avg_pool2d.default),
    13: _depthwise,
    14: lambda reader, table: _pool(reader, table, _ATEN.max_pool2d.default),
    19: _global_pool,
    20: _reshape,
    25: lambda reader, table: _alike(reader, table, _ATEN.leaky_relu.default),
    29: lambda reader, table: _alike(reader, table, _ATEN.elu.default),
    35: _slice,
    37: _product,
    39: _transposed,
}
"""Nodes by the number of their kind."""
