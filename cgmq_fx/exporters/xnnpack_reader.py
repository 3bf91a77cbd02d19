"""What ExecuTorch hands to XNNPACK: a graph in a FlatBuffer of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from cgmq_fx.cost_models.errors import ArtifactError
from cgmq_fx.exporters.byte_graph import ByteGraph, Constant, Grid, Operand, Value
from cgmq_fx.exporters.code_bits import Array
from cgmq_fx.exporters.flat import Buffer, Table
from cgmq_fx.exporters.xnnpack_ops import read_node

_MAGIC = b"XH00"
_HEADER = slice(4, 8)
_IDENTIFIERS = (b"XN00", b"XN01")
_BYTE = (-128, 127)
_KINDS = {1: "f4", 2: "f2", 3: "i1", 5: "i4", 6: "i1", 7: "i4", 12: "i4"}
"""XNNPACK's numbers of datatypes: floats, then integers with one step or a step per channel."""

_TENSOR, _QUANTIZED = 1, 2
_PER_CHANNEL, _PER_TENSOR = 1, 2

Data: TypeAlias = Callable[[str], bytes]
"""Gives the data of a constant by its key."""


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
        if len(given) != self.inputs:
            raise ArtifactError("XNNPACK is given another number of tensors than it takes")
        for number, operand in zip(self._external(4), given, strict=True):
            self._made[number] = self._rounded(number, operand)
        for node in self._root.tables(1):
            self._node(node)
        return [self.operand(number) for number in self._external(5)]

    @property
    def inputs(self) -> int:
        """How many tensors it takes."""
        return len(self._external(4))

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
        output, made = read_node(self, kind, table)
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
        """What is written into a tensor: rounded to its grid, if it has one; codes get its step."""
        scales = self._scales.get(number)
        if scales is None or (isinstance(operand, Constant) and operand.values.dtype.kind != "i"):
            return operand
        kind, grid = scales.union(1)
        if kind != _PER_TENSOR or grid is None:
            raise ArtifactError(f"tensor {number} of XNNPACK has a grid that is not known")
        step, zero = float(grid.number(0, "f4")), int(grid.number(1))
        if not 0 < step < float("inf"):
            raise ArtifactError(f"the step of tensor {number} of XNNPACK is no positive number")
        if isinstance(operand, Constant):
            codes = operand.values.astype(np.int64) - zero
            return Constant(codes, np.array([step])) if codes.size else operand
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
