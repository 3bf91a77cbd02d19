"""What a LiteRT file costs, read from the file alone; LiteRT need not be installed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cgmq_fx.cost_models.errors import ArtifactError
from cgmq_fx.exporters.byte_graph import ByteGraph, Constant, Grid, Operand, Value, read_counted
from cgmq_fx.exporters.code_bits import Array
from cgmq_fx.exporters.cost_graph import Counted, Manifest
from cgmq_fx.exporters.flat import Buffer, Table
from cgmq_fx.exporters.litert_ops import CLAMPS, HANDLERS, PASSED_ON, Call

MANIFEST = "cgmq_fx"
"""The metadata of the file that holds the manifest."""

_KINDS = {
    0: ("f4", torch.float32),
    1: ("f2", torch.float16),
    2: ("i4", torch.int32),
    3: ("u1", torch.uint8),
    4: ("i8", torch.int64),
    6: ("?", torch.bool),
    7: ("i2", torch.int16),
    9: ("i1", torch.int8),
    10: ("f8", torch.float64),
    12: ("u8", torch.uint64),
    15: ("u4", torch.uint32),
    16: ("u2", torch.uint16),
}
_LIMITS = {3: (0, 255), 7: (-32768, 32767), 9: (-128, 127)}
_PLACEHOLDER = 127
"""The operator's number in the old field, where it is in the new one."""


def read_tflite(path: Path) -> Counted:
    """Read a file; nothing in it is executed.

    Raises:
        ArtifactError: If it is not a file that this library exported, is damaged, or holds
            something that cannot be counted.
    """

    def read(buffer: Buffer) -> tuple[Manifest, ByteGraph, list[Operand]]:
        root = buffer.root(b"TFL3")
        manifest = _manifest(root, path)
        builder = ByteGraph(manifest)
        return manifest, builder, _Model(root, builder).read()

    return read_counted(path, read)


def _manifest(root: Table, path: Path) -> Manifest:
    buffers = root.tables(4)
    places = [int(entry.number(1, "u4")) for entry in root.tables(6) if entry.text(0) == MANIFEST]
    if len(places) != 1 or places[0] >= len(buffers):
        raise ArtifactError("it is a LiteRT file, but not one that cgmq_fx exported")
    return Manifest.from_text(bytes(buffers[places[0]].numbers(0, "u1")), str(path))


class _Model:
    """Walks through the operators of the one graph."""

    def __init__(self, root: Table, builder: ByteGraph) -> None:
        graphs = root.tables(2)
        if len(graphs) != 1:
            raise ArtifactError("it has several graphs")
        graph = graphs[0]
        self._builder = builder
        self._buffers = root.tables(4)
        self._codes = [_code(entry) for entry in root.tables(1)]
        self._tensors = graph.tables(0)
        self._inputs, self._outputs = (graph.numbers(i).tolist() for i in (1, 2))
        self._operators = graph.tables(3)
        self._values: dict[int, Operand] = {}
        self._readers = Counter(n for op in self._operators for n in op.numbers(1).tolist())
        self._padded: dict[int, tuple[int, Array]] = {}

    def read(self) -> list[Operand]:
        """Add all operators; what the graph returns."""
        for index in self._inputs:
            shape, kind = self._shape(index), int(self._tensor(index).number(1, "i1"))
            grid = self._grid(index)
            dtype = _KINDS[kind][1] if grid is None and kind in _KINDS else torch.float32
            self._values[index] = self._builder.input(shape, dtype, grid)
        for operator in self._operators:
            self._operator(operator)
        return [self._operand(index) for index in self._outputs]

    def _operator(self, operator: Table) -> None:
        inputs, outputs = (operator.numbers(i).tolist() for i in (1, 2))
        code = _at(self._codes, int(operator.number(0, "u4")))
        _, options = operator.union(3)
        call = Call(self._builder, code, options, self._shape(outputs[0]))
        if code in CLAMPS:
            made: list[Value] = [self._clamped(code, inputs)]
        elif code in PASSED_ON:
            given = self._operand(inputs[0])
            if isinstance(given, Constant):  # a weight of a layer that runs in float
                self._values[outputs[0]] = given
                return
            made = [given]
        elif code in HANDLERS:
            handler = HANDLERS[code]
            call.inputs = [self._input(i) for i in inputs]
            call.pads = self._pads(inputs[0]) if handler.pads else None
            if call.pads is not None:
                call.inputs[0] = self._operand(self._padded[inputs[0]][0])
            made = handler.read(call)
            self._note_pads(code, inputs, outputs)
        else:
            self._builder.graph.unknown.append(f"operator {code}")
            shapes = [self._shape(index) for index in outputs]
            read = [self._operand(i) for i in inputs[:1] if i >= 0]
            made = [call.unknown(read, shape) for shape in shapes]
        fused = call.fused
        for index, value in zip(outputs, made, strict=True):
            limited = self._builder.clamped(value, *fused) if fused is not None else value
            self._values[index] = self._rounded(index, limited)

    def _note_pads(self, code: int, inputs: list[int], outputs: list[int]) -> None:
        """Zeros around images are part of the convolution that alone reads them, as in XNNPACK."""
        if code == _PAD and self._readers[outputs[0]] == 1:
            amounts = self._operand(inputs[1])
            if isinstance(amounts, Constant) and amounts.values.shape == (4, 2):
                self._padded[outputs[0]] = inputs[0], amounts.values

    def _pads(self, index: int) -> tuple[int, int, int, int] | None:
        if index not in self._padded:
            return None
        _, (top, bottom), (left, right), _ = self._padded[index][1].tolist()
        return left, right, top, bottom

    def _clamped(self, code: int, inputs: list[int]) -> Value:
        """ReLU and others, maximum and minimum with a number."""
        ends = CLAMPS[code]
        value = self._value(inputs[0])
        if ends is not None:
            return self._builder.clamped(value, *ends)
        other = self._input(inputs[1])
        if isinstance(other, Constant) and other.values.size == 1:
            number = float(other.values.reshape(-1)[0])
            grid = self._grid(inputs[1])
            if grid is not None:
                number = (number - self._zero(inputs[1])) * grid.step
            low, high = (number, math.inf) if code == _MAXIMUM else (-math.inf, number)
            return self._builder.clamped(value, low, high)
        target = torch.ops.aten.maximum if code == _MAXIMUM else torch.ops.aten.minimum
        assert other is not None
        return self._builder.same(target.default, [value, other])

    def _input(self, index: int) -> Operand | None:
        return None if index < 0 else self._operand(index)

    def _value(self, index: int) -> Value:
        found = self._operand(index)
        if isinstance(found, Constant):
            raise ArtifactError(f"tensor {index} is a constant where none can be")
        return found

    def _operand(self, index: int) -> Operand:
        if index not in self._values:
            self._values[index] = self._constant(index)
        return self._values[index]

    def _tensor(self, index: int) -> Table:
        found: Table = _at(self._tensors, index)
        return found

    def _shape(self, index: int) -> tuple[int, ...]:
        return tuple(int(size) for size in self._tensor(index).numbers(0))

    def _zero(self, index: int) -> int:
        quantization = self._tensor(index).table(4)
        zeros = quantization.numbers(3, "i8") if quantization is not None else np.zeros(0)
        return int(zeros[0]) if zeros.size else 0

    def _steps(self, index: int) -> Array:
        quantization = self._tensor(index).table(4)
        found = quantization.numbers(2, "f4") if quantization is not None else np.zeros(0)
        if found.size and not ((found > 0) & np.isfinite(found)).all():
            raise ArtifactError(f"the steps of tensor {index} are no positive numbers")
        return found

    def _grid(self, index: int) -> Grid | None:
        """The grid of a tensor, with the codes that its type has."""
        limits = _LIMITS.get(int(self._tensor(index).number(1, "i1")))
        steps = self._steps(index)
        if limits is None or steps.size != 1:
            return None
        zero = self._zero(index)
        return Grid(float(steps[0]), limits[0] - zero, limits[1] - zero)

    def _rounded(self, index: int, value: Value) -> Value:
        grid = self._grid(index)
        if grid is None and int(self._tensor(index).number(1, "i1")) in _LIMITS:
            raise ArtifactError(f"tensor {index} has no grid of its own")
        return value if grid is None else self._builder.rounded(value, grid)

    def _constant(self, index: int) -> Constant:
        tensor = self._tensor(index)
        kind = int(tensor.number(1, "i1"))
        buffer = _at(self._buffers, int(tensor.number(2, "u4")))
        content = buffer.numbers(0, "u1")
        if kind not in _KINDS or (not content.size and 0 not in self._shape(index)):
            raise ArtifactError(f"tensor {index} is read before it is made, or of a type unknown")
        shape, letters = self._shape(index), _KINDS[kind][0]
        if content.size != int(np.prod(shape, dtype=object)) * np.dtype(letters).itemsize:
            raise ArtifactError(f"tensor {index} has other bytes than its shape says")
        values = np.frombuffer(content.tobytes(), f"<{letters}").reshape(shape)
        steps = self._steps(index)
        if kind != _INT8 or not steps.size:
            return Constant(values)  # a bias in int32 counts as it is
        quantization = tensor.table(4)
        assert quantization is not None
        return Constant(values, steps, int(quantization.number(6)))


_PAD, _MAXIMUM = 34, 55
_INT8 = 9


def _code(entry: Table) -> int:
    """The number of an operator; that of a custom one is in no table."""
    old, new = int(entry.number(0, "i1")), int(entry.number(3))
    return new if old == _PLACEHOLDER else max(old, new)


def _at(rows: Sequence[Any], index: int) -> Any:
    if not 0 <= index < len(rows):
        raise ArtifactError("the file refers to something that it does not have")
    return rows[index]
