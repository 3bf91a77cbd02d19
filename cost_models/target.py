"""Targets: what a chip can run and what that costs, as data in a JSON file.

A table gives cycles and picojoules per multiply-accumulate for pairs of bit-widths. A pair that the
chip cannot run is rounded up to the cheapest pair that holds both widths, or split where none does.
Every number in a shipped file has its source beside it.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from cgmq_fx.cost_models.errors import TargetError, UnknownTargetError
from cgmq_fx.cost_models.facts import FLOAT_BITS, NodeFacts

_MAX_FILE = 1 << 20
_MAX_ROWS = FLOAT_BITS**2
_MAX_TABLES = 256
_MAX_NAME = 200
_MAX_TEXT = 10_000
_FIGURES = frozenset({"clock_hz", "bytes_per_cycle", "picojoules_per_byte"})
_KEYS = frozenset({"name", "description", "source", "tables", "memories"}) | _FIGURES
_ROW_KEYS = frozenset({"weight", "activation", "cycles", "pJ"})


@dataclass(frozen=True, slots=True)
class Row:
    """What one multiply-accumulate costs at one pair of bit-widths.

    Attributes:
        weight: Weight bits.
        activation: Activation bits.
        cycles: Cycles per MAC, or None if the target has no figures for time.
        picojoules: Energy per MAC, or None if the target has no figures for energy.
    """

    weight: int
    activation: int
    cycles: float | None
    picojoules: float | None


@dataclass(frozen=True)
class Target:
    """A chip.

    Attributes:
        name: What options call it.
        description: One sentence.
        source: Where the figures come from.
        tables: Op pattern (`"*conv*"`, `"*"`) -> rows; the first pattern that matches is used.
        clock: Cycles per second, or None.
        bytes_per_cycle: Bytes of weights and activations moved per cycle; None if that is included
            in the cycles per MAC.
        picojoules_per_byte: Energy to move a byte, or None if that is not counted.
        memories: Sizes of its memories in bytes, by name.
    """

    name: str
    description: str
    source: str
    tables: Mapping[str, tuple[Row, ...]]
    clock: float | None = None
    bytes_per_cycle: float | None = None
    picojoules_per_byte: float | None = None
    memories: Mapping[str, int] = field(default_factory=dict)

    def rows_for(self, node: NodeFacts) -> tuple[Row, ...]:
        """The rows of a node's kind: `depthwise` for grouped convolutions, else the op's name.

        Raises:
            TargetError: If no pattern matches.
        """
        kind = node.op if node.groups == 1 else f"depthwise.{node.op}"
        for pattern, rows in self.tables.items():
            if fnmatchcase(kind, pattern):
                return rows
        raise TargetError(f"the target {self.name} has no figures for {kind} ({node.name})")

    def price(
        self,
        node: NodeFacts,
        weight: int,
        activation: int,
        per_mac: Callable[[Row], float | None],
        figure: str = "figure",
    ) -> tuple[float, Row] | None:
        """What a product of two widths costs, and the pair that it runs as.

        Args:
            node: The node that multiplies.
            weight: Weight bits.
            activation: Activation bits.
            per_mac: Which figure of a row counts.
            figure: What an error calls it.

        Returns:
            The least figure of all rows that hold both widths, and that row; None if a width is 0,
            since nothing is left to do then. A pair that no row holds is split into several
            products of the widest, and costs no less than any narrower pair that a row does hold.

        Raises:
            TargetError: If no row for this kind of node has the figure.
        """
        if weight == 0 or activation == 0:
            return None
        rows = [(f, r) for r in self.rows_for(node) if (f := per_mac(r)) is not None]
        if not rows:
            raise TargetError(
                f"the target {self.name} has no {figure} for {node.op} ({node.name}); "
                "`cgmq-fx targets` shows what it has"
            )
        splits = []
        for wide, deep in _widest(rows):
            parts = -(-weight // wide) * -(-activation // deep)
            price, row = _cheapest(rows, min(weight, wide), min(activation, deep))
            splits.append((parts > 1, price * parts, price, row))
        _, total, _, row = min(splits, key=lambda split: split[:2])
        return max(total, *(price for _, _, price, _ in splits)), row

    @property
    def widest(self) -> tuple[int, int]:
        """The widest weights and activations whose products no kind of op has to split."""
        pairs = [
            max(((r.weight, r.activation) for r in rows), key=lambda pair: (min(pair), sum(pair)))
            for rows in self.tables.values()
        ]
        return min(weight for weight, _ in pairs), min(activation for _, activation in pairs)


def _widest(rows: Sequence[tuple[float, Row]]) -> list[tuple[int, int]]:
    """The pairs of widths that fit into no other pair: one, unless a table is not rectangular."""
    front: list[tuple[int, int]] = []
    for pair in sorted({(r.weight, r.activation) for _, r in rows}, reverse=True):
        if not front or pair[1] > front[-1][1]:
            front.append(pair)
    return front


def _cheapest(rows: Sequence[tuple[float, Row]], weight: int, activation: int) -> tuple[float, Row]:
    """The least figure of the rows that hold both widths, and its row, the narrowest of several."""
    fitting = [(f, r) for f, r in rows if r.weight >= weight and r.activation >= activation]
    return min(fitting, key=lambda entry: (entry[0], entry[1].weight * entry[1].activation))


def target_names() -> list[str]:
    """Names of the targets that come with the library."""
    folder = resources.files(__package__).joinpath("targets")
    return sorted(
        f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json")
    )


def load_target(target: str | Path | Target) -> Target:
    """A target by name, from a JSON file, or the object itself.

    Raises:
        TargetError: If there is no such target, or the file cannot be read as one.
    """
    if isinstance(target, Target):
        return target
    if str(target) in target_names():
        return _shipped(str(target))
    try:
        path = Path(target)
        size = path.stat().st_size if path.is_file() else None
        text = path.read_bytes() if size is not None and size <= _MAX_FILE else b""
    except (OSError, TypeError, ValueError) as error:
        raise TargetError(f"cannot read the target {str(target)[:200]!r}: {error}") from error
    if size is None:
        raise UnknownTargetError(
            f"there is no target {str(target)!r}; shipped are {', '.join(target_names())}, or give "
            "the path of a JSON file"
        )
    if size > _MAX_FILE:
        raise TargetError(f"{path} is larger than {_MAX_FILE} bytes; that is no target")
    found = parse_target(text, str(path))
    if mistake := next(_mistakes(found), None):
        raise TargetError(f"{path} is no target file: {mistake}")
    return found


def _mistakes(target: Target) -> Iterator[str]:
    """Figures of a target that are never looked up, because others come first."""
    patterns = list(target.tables)
    for index, pattern in enumerate(patterns):
        before = [first for first in patterns[:index] if _takes_all(first, pattern)]
        if before:
            yield (
                f"the pattern {_shown(pattern)} is never reached, for {_shown(before[0])} stands "
                "before it; put it first"
            )
        rows = target.tables[pattern]
        figures = {"cycles": [r for r in rows if r.cycles], "pJ": [r for r in rows if r.picojoules]}
        for name, having in figures.items():
            for pair, count in Counter((row.weight, row.activation) for row in having).items():
                if count > 1:
                    widths = f"{pair[0]} x {pair[1]} bits"
                    yield f"the table {_shown(pattern)} has {name} for {widths} twice"


def _takes_all(first: str, pattern: str) -> bool:
    """Whether an op pattern surely matches all that another one does."""
    plain = not {*"?["} & {*first} and "[" not in pattern
    return plain and fnmatchcase(pattern, first)


@lru_cache(maxsize=32)
def _shipped(name: str) -> Target:
    file = resources.files(__package__).joinpath("targets", f"{name}.json")
    return parse_target(file.read_bytes(), name)


def parse_target(text: bytes, where: str) -> Target:
    """Read a target from JSON.

    Raises:
        TargetError: Saying what is missing or wrong.
    """
    try:
        data = json.loads(text, object_pairs_hook=_object)
        _known(data, _KEYS)
        return Target(
            name=_text(data, "name"),
            description=_text(data, "description"),
            source=_text(data, "source"),
            tables=_tables(data["tables"]),
            clock=_positive(data, "clock_hz"),
            bytes_per_cycle=_positive(data, "bytes_per_cycle"),
            picojoules_per_byte=_positive(data, "picojoules_per_byte"),
            memories=_memories(data.get("memories", {})),
        )
    except KeyError as error:
        raise TargetError(f"{where} is no target file: it has no {error}") from error
    except (TargetError, TypeError, ValueError, RecursionError) as error:
        raise TargetError(f"{where} is no target file: {error}") from error


def target_to_json(target: Target) -> dict[str, Any]:
    """The plain values that `parse_target` reads."""
    return {
        "name": target.name,
        "description": target.description,
        "source": target.source,
        "clock_hz": target.clock,
        "bytes_per_cycle": target.bytes_per_cycle,
        "picojoules_per_byte": target.picojoules_per_byte,
        "memories": dict(target.memories),
        "tables": {
            pattern: [
                {
                    "weight": r.weight,
                    "activation": r.activation,
                    "cycles": r.cycles,
                    "pJ": r.picojoules,
                }
                for r in rows
            ]
            for pattern, rows in target.tables.items()
        },
    }


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What JSON calls an object; Python's reader would keep the last of several equal keys."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise TargetError(f"it has the key {_shown(key)} twice")
        found[key] = value
    return found


def _known(data: Any, keys: frozenset[str]) -> None:
    """Refuse what would be ignored: a misspelt key is a figure that silently counts nothing."""
    if not isinstance(data, dict):
        raise TargetError(f"expected an object, not {_shown(data)}")
    if unknown := sorted(data.keys() - keys):
        raise TargetError(f"it has an unknown key {_shown(unknown[0])}; known are {sorted(keys)}")


def _memories(data: Any) -> dict[str, int]:
    if not isinstance(data, dict):
        raise TargetError(f"`memories` must map names to bytes, not {_shown(data)}")
    return {_name(name): _whole(data, name) for name in data}


def _tables(data: Any) -> dict[str, tuple[Row, ...]]:
    if not isinstance(data, dict) or not 0 < len(data) <= _MAX_TABLES:
        raise TargetError(
            f"`tables` must map 1 to {_MAX_TABLES} op patterns, such as '*', to their rows"
        )
    return {_name(pattern): _rows(rows) for pattern, rows in data.items()}


def _rows(data: Any) -> tuple[Row, ...]:
    if not isinstance(data, list) or not 0 < len(data) <= _MAX_ROWS:
        raise TargetError(f"a table is a list of 1 to {_MAX_ROWS} rows")
    return tuple(map(_row, data))


def _row(data: Any) -> Row:
    _known(data, _ROW_KEYS)
    weight, activation = _whole(data, "weight"), _whole(data, "activation")
    if max(weight, activation) > FLOAT_BITS:
        raise TargetError(f"bit-widths are 1 to {FLOAT_BITS}, not {weight} and {activation}")
    row = Row(weight, activation, _positive(data, "cycles"), _positive(data, "pJ"))
    if row.cycles is None and row.picojoules is None:
        raise TargetError(f"the row of {weight} x {activation} bits has neither cycles nor pJ")
    return row


def _text(data: Mapping[str, Any], key: str) -> str:
    value = data[key]
    if not isinstance(value, str) or not value.strip() or len(value) > _MAX_TEXT:
        raise TargetError(f"{key} must be a text that is not empty, not {_shown(value)}")
    if not value.replace("\n", "").isprintable():
        raise TargetError(f"{key} has a character that cannot be printed: {_shown(value)}")
    return value


def _name(value: str) -> str:
    if not value.isprintable() or not 0 < len(value) <= _MAX_NAME:
        raise TargetError(f"{_shown(value)} is no name: 1 to {_MAX_NAME} printable characters")
    return value


def _whole(data: Mapping[str, Any], key: str) -> int:
    value = data[key]
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise TargetError(f"{key} must be a positive whole number, not {_shown(value)}")
    return value


def _positive(data: Mapping[str, Any], key: str) -> float | None:
    value = data.get(key)
    if value is None:
        return None
    valid = isinstance(value, int | float) and not isinstance(value, bool)
    if not valid or not 0 < value <= sys.float_info.max:
        raise TargetError(f"{key} must be a positive, finite number, not {_shown(value)}")
    return float(value)


def _shown(value: Any) -> str:
    return repr(value)[:80]
