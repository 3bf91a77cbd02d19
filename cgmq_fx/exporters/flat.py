"""FlatBuffers that are not trusted: tables whose fields are read by their numbers.

`.pte` and `.tflite` files are FlatBuffers. A field keeps its number through all versions of a
schema, so a table of numbers reads files of runtimes that need not be installed. What points
outside of the buffer is an error, and so is a buffer that asks for more tables than it has room
for; numbers are views of the buffer, not copies.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Final

import numpy as np

from cgmq_fx.cost_models.errors import ArtifactError
from cgmq_fx.exporters.code_bits import Array

_FIRST_SLOT = 4
_SLOT = 2
_POINTER = 4
_MOST_BYTES = 1 << 31
_IDENTIFIER = slice(4, 8)
_BROKEN = (struct.error, TypeError, ValueError, OverflowError, IndexError)


class Buffer:
    """The bytes of one FlatBuffer.

    Attributes:
        data: The bytes.
        table: The class that finds fields.
    """

    def __init__(self, data: bytes) -> None:
        from flatbuffers.table import Table as Raw

        self.data: Final = data
        self.table: Final = Raw
        self._room = len(data) // _POINTER

    def root(self, identifier: bytes) -> Table:
        """The table that everything else hangs on.

        Args:
            identifier: The four letters that files of this kind have.

        Raises:
            ArtifactError: If the letters are others.
        """
        if self.data[_IDENTIFIER] != identifier:
            raise ArtifactError(f"it is no {identifier.decode()} file")
        return Table(self, int.from_bytes(self.data[:_POINTER], "little"))

    def spend(self, count: int) -> None:
        """Take note of `count` tables or pointers that are about to be read.

        Raises:
            ArtifactError: If these are more than the buffer can hold.
        """
        self._room -= count
        if self._room < 0:
            raise ArtifactError("it refers to the same data again and again")


class Table:
    """One table. A field that is absent has its default value, as FlatBuffers have it."""

    def __init__(self, buffer: Buffer, position: int) -> None:
        buffer.spend(1)
        self._buffer = buffer
        self._raw = buffer.table(buffer.data, position)

    def number(self, field: int, kind: str = "i4", default: float = 0) -> Any:
        """A number.

        Args:
            field: Number of the field.
            kind: Its type, as NumPy names it.
            default: What an absent field stands for.
        """
        offset = self._offset(field)
        return default if offset is None else self._view(offset, 1, kind)[0].item()

    def numbers(self, field: int, kind: str = "i4") -> Array:
        """A vector of numbers, empty where the field is absent: a view of the buffer."""
        found = self._vector(field)
        return np.zeros(0, kind) if found is None else self._view(*found, kind)

    def text(self, field: int) -> str:
        """A string, empty where the field is absent."""
        return bytes(self.numbers(field, "u1")).decode("utf-8", "replace")

    def table(self, field: int) -> Table | None:
        """A table, or None."""
        offset = self._offset(field)
        return None if offset is None else Table(self._buffer, self._pointed(offset))

    def tables(self, field: int) -> list[Table]:
        """A vector of tables."""
        found = self._vector(field)
        if found is None:
            return []
        start, count = found
        self._buffer.spend(count)
        offsets = (start + _POINTER * index for index in range(count))
        return [Table(self._buffer, self._pointed(offset)) for offset in offsets]

    def union(self, field: int) -> tuple[int, Table | None]:
        """One of several kinds of table: the number of its kind, and the table.

        Args:
            field: Number of the field that says the kind; the next one is the table.
        """
        return int(self.number(field, "u1")), self.table(field + 1)

    def _offset(self, field: int) -> int | None:
        """Where a field starts, or None where it is absent."""
        try:
            offset: int = self._raw.Offset(_FIRST_SLOT + _SLOT * field)
        except _BROKEN as error:
            raise ArtifactError(f"a table of it is damaged: {error}") from error
        return self._raw.Pos + offset if offset else None

    def _pointed(self, offset: int) -> int:
        return offset + int(self._view(offset, 1, "u4")[0])

    def _vector(self, field: int) -> tuple[int, int] | None:
        """Start and length of a vector."""
        offset = self._offset(field)
        if offset is None:
            return None
        start = self._pointed(offset)
        return start + _POINTER, int(self._view(start, 1, "u4")[0])

    def _view(self, offset: int, count: int, kind: str) -> Array:
        try:
            return np.frombuffer(self._buffer.data, f"<{kind}", count, offset)
        except _BROKEN as error:
            raise ArtifactError("it ends in the middle of something, or is damaged") from error


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        ArtifactError: If it cannot be read, or is larger than FlatBuffers can be.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ArtifactError(f"{path} is too large")
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
