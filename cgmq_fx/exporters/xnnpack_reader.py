"""What ExecuTorch hands to XNNPACK: a graph in a FlatBuffer of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from cgmq_fx.cost_models.errors import ArtifactError
from cgmq_fx.exporters.byte_graph import ByteGraph, Constant, Grid, Operand, Value
from cgmq_fx.exporters.cost_graph import Array
from cgmq_fx.exporters.flat import Buffer, Table

_ATEN = torch.ops.aten
_MAGIC = b"XH00"
_HEADER = slice(4, 8)
_IDENTIFIERS = (b"XN00", b"XN01")
_NO_INPUT = 0xFFFFFFFF
_BYTE = (-128, 127)
_KINDS = {1: "f4", 2: "f2", 3: "i1", 5: "i4", 6: "i1", 7: "i4", 12: "i4"}
"""XNNPACK's numbers of datatypes: floats, then integers with one step or a step per channel."""

_TENSOR, _QUANTIZED = 1, 2
_PER_CHANNEL, _PER_TENSOR = 1, 2
_TRANSPOSED = 1

Data: TypeAlias = Callable[[str], bytes]
"""Gives the data of a constant by its key."""

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


class XnnpackReader:
    """Reads one payload.

    Attributes:
        builder: What the ops are added to.

    Args:
        payload: The bytes of the delegate.
        builder: The same.
        data: Gives constants that lie elsewhere in the file.
    """

    def __init__(self, payload: bytes, builder: ByteGraph, data: Data) -> None:
        if payload[_HEADER] != _MAGIC:
            raise ArtifactError("what is delegated to XNNPACK has no header")
        start, size, base, length = _numbers(payload[10:30])
        self._constants = payload[base : base + length]
        content = payload[start : start + size]
        letters = content[_HEADER]
        if letters not in _IDENTIFIERS:
            raise ArtifactError("what is delegated to XNNPACK is no graph of it")
        self._root = Buffer(content).root(letters)
        self.builder = builder
        self._data = data
        self._places = self._root.tables(8)
        self._tensors: dict[int, Table] = {}
        self._scales: dict[int, Table | None] = {}
        self._made: dict[int, Operand] = {}
        for entry in self._root.tables(2):
            kind, value = entry.union(0)
            outer, inner = value, value
            if kind == _QUANTIZED and value is not None:
                inner = value.table(0)
            if inner is None or outer is None or kind not in (_TENSOR, _QUANTIZED):
                raise ArtifactError("a tensor in what is delegated to XNNPACK is none")
            number = int(inner.number(6, "u4"))
            self._tensors[number] = inner
            self._scales[number] = outer if kind == _QUANTIZED else None

    def read(self, given: Sequence[Operand]) -> list[Operand]:
        """Add the ops.

        Args:
            given: The inputs, in the order of their external numbers.

        Returns:
            The outputs, in the order of theirs.
        """
        inputs = self._external(4)
        if len(inputs) != len(given):
            raise ArtifactError("XNNPACK is given another number of tensors than it takes")
        for number, operand in zip(inputs, given, strict=True):
            self._made[number] = self._rounded(number, operand)
        for node in self._root.tables(1):
            self._node(node)
        return [self.operand(number) for number in self._external(5)]

    def _external(self, field: int) -> list[int]:
        """Inputs or outputs, by their external numbers."""
        numbers = [int(n) for n in self._root.numbers(field, "u4")]
        return sorted(numbers, key=lambda n: int(self._tensor(n).number(4, "u4")))

    def _tensor(self, number: int) -> Table:
        if number not in self._tensors:
            raise ArtifactError(f"XNNPACK has no tensor {number}")
        return self._tensors[number]

    def _node(self, node: Table) -> None:
        kind, table = node.union(0)
        limits = node.table(3)
        if table is None:
            raise ArtifactError("a node of XNNPACK is empty")
        output, made = _read(self, kind, table)
        if limits is not None and isinstance(made, Value):
            low, high = (limits.number(i, "f4") for i in (0, 1))
            made = self.builder.clamped(made, low, high)
        self._made[output] = self._rounded(output, made)

    def value(self, number: int) -> Value:
        """A tensor that is computed."""
        found = self.operand(number)
        if isinstance(found, Constant):
            raise ArtifactError(f"tensor {number} of XNNPACK is a constant where none can be")
        return found

    def operand(self, number: int) -> Operand:
        """A tensor that is computed, or a constant."""
        if number not in self._made:
            self._made[number] = self._constant(number)
        return self._made[number]

    def shape(self, number: int) -> tuple[int, ...]:
        """The shape that the file states of a tensor."""
        return tuple(int(n) for n in self._tensor(number).numbers(2, "u4"))

    def _rounded(self, number: int, operand: Operand) -> Operand:
        """What is written into a tensor: rounded to its grid, if it has one."""
        scales = self._scales.get(number)
        if scales is None or not isinstance(operand, Value):
            return operand
        kind, grid = scales.union(1)
        if kind != _PER_TENSOR or grid is None:
            raise ArtifactError(f"tensor {number} of XNNPACK has a grid that is not known")
        step, zero = float(grid.number(0, "f4")), int(grid.number(1))
        if not 0 < step < float("inf"):
            raise ArtifactError(f"the step of tensor {number} of XNNPACK is no positive number")
        return self.builder.rounded(operand, Grid(step, _BYTE[0] - zero, _BYTE[1] - zero))

    def _constant(self, number: int) -> Constant:
        tensor = self._tensor(number)
        kind = _KINDS.get(int(tensor.number(0, "i2")))
        content = self._content(int(tensor.number(3, "u4")))
        if kind is None or content is None:
            raise ArtifactError(f"tensor {number} of XNNPACK is read before it is made")
        values = _array(content, kind, self.shape(number))
        scales = self._scales[number]
        if scales is None or kind != "i1":
            return Constant(values)  # a bias in int32 counts as it is
        form, grid = scales.union(1)
        if grid is None or form not in (_PER_CHANNEL, _PER_TENSOR):
            raise ArtifactError(f"tensor {number} of XNNPACK has a grid that is not known")
        if form == _PER_TENSOR:
            return Constant(values, np.array([grid.number(0, "f4")]))
        steps = grid.numbers(0, "f4")
        if not steps.size:
            found = self._content(int(grid.number(2, "u4")))
            steps = _array(found or b"", "f4", (int(grid.number(3, "u4")),))
        return Constant(values, steps, int(grid.number(1)))

    def _content(self, index: int) -> bytes | None:
        if not 0 < index < len(self._places):
            return None
        place = self._places[index]
        key = place.text(2)
        if key:
            return self._data(key)
        start, size = (int(place.number(i, "u8")) for i in (0, 1))
        return self._constants[start : start + size]


def _numbers(header: bytes) -> tuple[int, int, int, int]:
    sizes = (4, 4, 4, 8)
    ends = np.cumsum(sizes)
    found = [int.from_bytes(header[e - n : e], "little") for n, e in zip(sizes, ends, strict=True)]
    return found[0], found[1], found[2], found[3]


def _array(content: bytes, kind: str, shape: tuple[int, ...]) -> Array:
    count = int(np.prod(shape, dtype=object))
    found = np.frombuffer(content, f"<{kind}")
    if count > found.size:
        raise ArtifactError("a constant of XNNPACK has fewer bytes than its shape says")
    return found[:count].reshape(shape)


Handler: TypeAlias = Callable[[XnnpackReader, Table], tuple[int, Value]]


def _read(reader: XnnpackReader, kind: int, table: Table) -> tuple[int, Value]:
    """The number of the tensor that a node writes, and its value."""
    if kind in _ALIKE:
        count = 2 if kind in _TWO else 1
        operands = [reader.operand(_id(table, i)) for i in range(count)]
        return _id(table, count), reader.builder.same(_ALIKE[kind], operands)
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
}
"""Nodes by the number of their kind."""
