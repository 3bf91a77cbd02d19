"""What an ExecuTorch file costs, read from the file alone.

ExecuTorch need not be installed: the file is a FlatBuffer, and so is what it hands to XNNPACK.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cgmq_fx.cost_models.errors import ArtifactError
from cgmq_fx.exporters.byte_graph import ByteGraph, Constant, Grid, Operand, Value, read_counted
from cgmq_fx.exporters.cost_graph import Counted, Manifest
from cgmq_fx.exporters.flat import Buffer, Table
from cgmq_fx.exporters.xnnpack_reader import XnnpackReader
from cgmq_fx.passes.guard import WorkGuard
from cgmq_fx.passes.optable import compute_op
from cgmq_fx.untrusted import check_arguments, check_overload

MANIFEST = "cgmq_fx"
"""The constant method of the file that holds the manifest."""

_ATEN = torch.ops.aten
_HEADER = slice(8, 12)
_FORWARD = "forward"
_DTYPES = {
    0: ("u1", torch.uint8),
    1: ("i1", torch.int8),
    2: ("i2", torch.int16),
    3: ("i4", torch.int32),
    4: ("i8", torch.int64),
    6: ("f4", torch.float32),
    7: ("f8", torch.float64),
    11: ("?", torch.bool),
}
_KERNEL, _DELEGATE = 1, 2
_TENSOR = 5
_INTS = 7
_LISTS = frozenset({10, 11})
"""Kinds of values that are other values: numbers, tensors, tensors or nothing."""

_PLAIN: dict[int, Callable[[Table], Any]] = {
    1: lambda entry: None,
    2: lambda entry: int(entry.number(0, "i8")),
    3: lambda entry: bool(entry.number(0, "u1")),
    4: lambda entry: float(entry.number(0, "f8")),
    6: lambda entry: entry.text(0),
    8: lambda entry: entry.numbers(0, "f8").tolist(),
    9: lambda entry: [bool(n) for n in entry.numbers(0, "u1")],
}
_INLINE = 0
_CONVOLUTIONS = {1: _ATEN.conv1d.default, 2: _ATEN.conv2d.default, 3: _ATEN.conv3d.default}


def read_pte(path: Path) -> Counted:
    """Read a file; nothing in it is executed.

    Raises:
        ArtifactError: If it is not a file that this library exported, is damaged, or holds
            something that cannot be counted.
    """

    def read(buffer: Buffer) -> tuple[Manifest, ByteGraph, list[Operand]]:
        program = _Program(buffer)
        manifest = program.manifest(path)
        builder = ByteGraph(manifest)
        return manifest, builder, _Plan(program, builder).read()

    return read_counted(path, read)


class _Program:
    """The file, its segments and its methods."""

    def __init__(self, buffer: Buffer) -> None:
        self._content = content = buffer.data
        self._root = buffer.root(b"ET12")
        self._segments = self._root.tables(4)
        base = content[24:32] if content[_HEADER] == b"eh00" else b""
        self._base = int.from_bytes(base, "little")
        self._named = {entry.text(0): int(entry.number(1, "u4")) for entry in self._root.tables(7)}
        for index in range(len(self._segments)):
            self.segment(index)  # a file that ends too early is refused whatever is missing
        self._plans = {plan.text(0): plan for plan in self._root.tables(1)}

    def manifest(self, path: Path) -> Manifest:
        """What the file says about itself."""
        if MANIFEST not in self._plans:
            raise ArtifactError("it is an ExecuTorch file, but not one that cgmq_fx exported")
        _, text = self._plans[MANIFEST].tables(2)[0].union(0)
        return Manifest.from_text(text.text(0) if text is not None else "", str(path))

    @property
    def forward(self) -> Table:
        """The method that computes."""
        if _FORWARD not in self._plans:
            raise ArtifactError("it has no method forward")
        return self._plans[_FORWARD]

    def payload(self, delegate: Table) -> bytes:
        """What a delegate is given."""
        place = delegate.table(1)
        if delegate.text(0) != "XnnpackBackend" or place is None:
            raise ArtifactError(f"what {delegate.text(0)[:40]!r} executes is not counted")
        index = int(place.number(1, "u4"))
        if int(place.number(0, "i1")) != _INLINE:
            return self.segment(index)
        inline = self._root.tables(3)
        return bytes(_at(inline, index).numbers(0, "u1"))

    def named(self, key: str) -> bytes:
        """Data by its name."""
        if key not in self._named:
            raise ArtifactError(f"the file has no data {key[:40]!r}")
        return self.segment(self._named[key])

    def segment(self, index: int) -> bytes:
        """The bytes of a segment."""
        entry = _at(self._segments, index)
        start, size = self._base + int(entry.number(0, "u8")), int(entry.number(1, "u8"))
        if start + size > len(self._content):
            raise ArtifactError("a segment ends behind the end of the file")
        return self._content[start : start + size]

    def constant(self, index: int, size: int) -> bytes:
        """The data of a constant tensor."""
        inline, place = self._root.tables(2), self._root.table(5)
        if inline:
            return bytes(_at(inline, index).numbers(0, "u1"))
        if place is None:
            raise ArtifactError("a constant is not in the file")
        start = int(_at(place.numbers(1, "u8").tolist(), index))
        found = self.segment(int(place.number(0, "u4")))[start : start + size]
        if len(found) != size:
            raise ArtifactError("a constant has fewer bytes than its shape says")
        return found


class _Plan:
    """Walks through the instructions of a method."""

    def __init__(self, program: _Program, builder: ByteGraph) -> None:
        self._program = program
        self._builder = builder
        plan = program.forward
        self._entries = plan.tables(2)
        self._inputs, self._outputs = (plan.numbers(i).tolist() for i in (3, 4))
        self._chains = plan.tables(5)
        self._operators = [(op.text(0), op.text(1)) for op in plan.tables(6)]
        self._delegates = plan.tables(7)
        self._values: dict[int, Operand] = {}

    def read(self) -> list[Operand]:
        """Add all ops; what the method returns."""
        for index in self._inputs:
            kind, entry = _at(self._entries, index).union(0)
            if kind != _TENSOR or entry is None:
                raise ArtifactError("an input is no tensor")
            shape, (_, dtype) = _shape(entry), self._dtype(entry)
            self._values[index] = self._builder.input(shape, dtype)
        instructions = [call for chain in self._chains for call in chain.tables(2)]
        with WorkGuard(len(instructions)):
            for instruction in instructions:
                self._instruction(instruction)
        return [self._operand(index) for index in self._outputs]

    def _instruction(self, instruction: Table) -> None:
        kind, call = instruction.union(0)
        if call is None or kind not in (_KERNEL, _DELEGATE):
            raise ArtifactError("a method jumps or moves, which is not counted")
        index, places = int(call.number(0)), call.numbers(1).tolist()
        if kind == _DELEGATE:
            self._delegated(_at(self._delegates, index), places)
        else:
            name, overload = _at(self._operators, index)
            self._called(name, overload, places)

    def _delegated(self, delegate: Table, places: list[int]) -> None:
        payload = self._program.payload(delegate)
        reader = XnnpackReader(payload, self._builder, self._program.named)
        given, targets = places[: reader.inputs], places[reader.inputs :]
        outputs = reader.read([self._operand(place) for place in given])
        if len(outputs) != len(targets):
            raise ArtifactError("XNNPACK gives another number of tensors than are taken")
        self._values.update(zip(targets, outputs, strict=True))

    def _called(self, name: str, overload: str, places: list[int]) -> None:
        """A kernel: counted as the op that returns what it writes."""
        namespace, _, short = name.partition("::")
        if namespace == "quantized_decomposed":
            self._requantized(short, places)
            return
        op = _functional(namespace, short, overload)
        given = places[: len(op._schema.arguments)]
        written = places[len(given) : len(given) + len(op._schema.returns)]
        outputs = [own for place in written for own in self._parts(place)]
        arguments = [self._argument(place) for place in given]
        check_arguments(op, [_plain(a) for a in arguments], {})
        made = self._result(op, arguments, len(outputs))
        self._values.update(zip(outputs, made, strict=True))

    def _parts(self, place: int) -> list[int]:
        """The places of the tensors that a kernel writes to: several where it writes to a list."""
        kind, entry = _at(self._entries, place).union(0)
        listed = kind in _LISTS and entry is not None
        return [int(own) for own in entry.numbers(0)] if listed else [place]

    def _result(self, op: Any, arguments: list[Any], count: int) -> list[Operand]:
        if op is _ATEN.permute.default and isinstance(arguments[0], Constant):
            return [arguments[0].permuted(arguments[1])]
        leaves, spec = pytree.tree_flatten(arguments, is_leaf=_is_operand)
        operands = [leaf for leaf in leaves if _is_operand(leaf)]

        def rule(*tensors: Tensor) -> Any:
            supply = iter(tensors)
            filled = [next(supply) if _is_operand(leaf) else leaf for leaf in leaves]
            given = zip(op._schema.arguments, pytree.tree_unflatten(filled, spec), strict=True)
            return op(**{argument.name: value for argument, value in given})

        if count > 1 or str(op._schema.returns[0].type) == "List[Tensor]":
            parts = [
                self._builder.call(op, operands, lambda *t, i=i: rule(*t)[i]) for i in range(count)
            ]
            return list(parts)
        target, options = op, {}
        if op is _ATEN.convolution.default:
            target = _CONVOLUTIONS[len(arguments[1].values.shape) - 2]
            options = {"groups": int(arguments[8])}
        multiplies = compute_op(_Called(target)) is not None  # type: ignore[arg-type]
        call = self._builder.multiplied if multiplies else self._builder.call
        return [call(target, operands, rule, **options)]

    def _requantized(self, name: str, places: list[int]) -> None:
        """Codes of values and values of codes, outside of XNNPACK."""
        source = self._operand(places[0])
        if not isinstance(source, Value):
            found = self._table(name, source, places[1:4])
            self._values[places[-1]] = self._builder.weight(found, found.axis)
            return
        if name == "dequantize_per_tensor":
            self._values[places[-1]] = source
            return
        if name != "quantize_per_tensor":
            raise ArtifactError(f"{name[:40]!r} is not counted")
        step, zero, low, high = (self._argument(place) for place in places[1:5])
        grid = Grid(float(step), int(low) - int(zero), int(high) - int(zero))
        self._values[places[-1]] = self._builder.rounded(source, grid)

    def _table(self, name: str, codes: Constant, places: list[int]) -> Constant:
        """A constant that the file keeps as codes, and multiplies with its steps when it runs."""
        if name not in ("dequantize_per_tensor", "dequantize_per_channel"):
            raise ArtifactError("a constant is quantized when the file runs")
        step, zero, axis = (self._argument(place) for place in places)
        whole = name == "dequantize_per_tensor"
        steps = np.array([step]) if whole or not isinstance(step, Constant) else step.values
        zeros = zero.values if isinstance(zero, Constant) else np.array(zero)
        if codes.values.dtype.kind not in "iu" or zeros.any() or not (steps > 0).all():
            raise ArtifactError("a table has no codes around zero, or no steps")
        return Constant(codes.values, steps.ravel(), 0 if whole else int(axis))

    def _operand(self, place: int) -> Operand:
        found = self._argument(place)
        if not _is_operand(found):
            raise ArtifactError("a number stands where a tensor is read")
        return found  # type: ignore[no-any-return]

    def _argument(self, place: int) -> Any:
        if place in self._values:
            return self._values[place]
        kind, entry = _at(self._entries, place).union(0)
        if entry is None:
            return None
        if kind == _TENSOR:
            self._values[place] = self._constant(entry)
            return self._values[place]
        if kind == _INTS:
            return [self._argument(int(p)) for p in entry.numbers(0, "i8")]
        if kind in _LISTS:
            return [None if p < 0 else self._argument(int(p)) for p in entry.numbers(0)]
        if kind not in _PLAIN:
            raise ArtifactError(f"values of kind {kind} are not known")
        return _PLAIN[kind](entry)

    def _constant(self, entry: Table) -> Constant:
        index = int(entry.number(5, "u4"))
        kind, _ = self._dtype(entry)
        shape = _shape(entry)
        if not index or entry.table(6) is not None:
            raise ArtifactError("a tensor is read before it is made")
        size = int(np.prod(shape, dtype=object)) * np.dtype(kind).itemsize
        content = self._program.constant(index, size)
        order = entry.numbers(3, "u1").tolist() or list(range(len(shape)))
        values = np.frombuffer(content, f"<{kind}").reshape([shape[axis] for axis in order])
        return Constant(values.transpose(np.argsort(order)))

    def _dtype(self, entry: Table) -> tuple[str, torch.dtype]:
        number = int(entry.number(0, "i1"))
        if number not in _DTYPES:
            raise ArtifactError(f"tensors of type {number} are not known")
        return _DTYPES[number]


class _Called:
    """Enough of a node for the op table."""

    op = "call_function"

    def __init__(self, target: Any) -> None:
        self.target = target


def _functional(namespace: str, name: str, overload: str) -> Any:
    """The op that returns what a kernel writes into its last arguments; a view for its copy."""
    written = _overloads(name).get(overload) if namespace == "aten" else None
    if written is None:
        raise ArtifactError(f"{namespace[:40]}::{name[:40]}.{overload[:40]} is not counted")
    wanted = [(a.name, str(a.type)) for a in written._schema.arguments if not a.is_out]
    for short in (name.removesuffix("_copy"), name):
        for found in _overloads(short).values():
            if [(a.name, str(a.type)) for a in found._schema.arguments] == wanted:
                check_overload(found)
                return found
    raise ArtifactError(f"{name[:40]}.{overload[:40]} is not counted")


def _overloads(name: str) -> dict[str, Any]:
    packet = getattr(_ATEN, name, None) if name.isidentifier() else None
    return {} if packet is None else {o: getattr(packet, o) for o in packet.overloads()}


def _is_operand(value: Any) -> bool:
    return isinstance(value, Value | Constant)


def _plain(value: Any) -> Any:
    """An argument as the checks of arguments see it: a tensor is no number."""
    return None if _is_operand(value) else value


def _shape(entry: Table) -> tuple[int, ...]:
    return tuple(int(size) for size in entry.numbers(2))


def _at(rows: Sequence[Any], index: int) -> Any:
    if not 0 <= index < len(rows):
        raise ArtifactError("the file refers to something that it does not have")
    return rows[index]
