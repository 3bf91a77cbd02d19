"""Targets: what a chip can run and what that costs, as data in a JSON file.

A table gives cycles and picojoules per multiply-accumulate for pairs of bit-widths. A pair that the
chip cannot run is rounded up to the cheapest pair that holds both widths. Every number in a shipped
file has its source beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib import resources
from math import isfinite
from pathlib import Path
from typing import Any

from cgmq_fx.cost_models.errors import TargetError
from cgmq_fx.cost_models.facts import NodeFacts

_MAX_FILE = 1 << 20
_MAX_ROWS = 4096


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
        self, node: NodeFacts, weight: int, activation: int, per_mac: Callable[[Row], float | None]
    ) -> tuple[float, Row] | None:
        """What a product of two widths costs, and the pair that it runs as.

        Args:
            node: The node that multiplies.
            weight: Weight bits.
            activation: Activation bits.
            per_mac: Which figure of a row counts.

        Returns:
            The least figure of all rows that hold both widths, and that row; None if a width is 0,
            since nothing is left to do then. A width beyond the widest that the target knows is
            split into several products of the widest.

        Raises:
            TargetError: If no row for this kind of node has the figure.
        """
        if weight == 0 or activation == 0:
            return None
        rows = [(f, r) for r in self.rows_for(node) if (f := per_mac(r)) is not None]
        if not rows:
            raise TargetError(
                f"the target {self.name} has no such figure for {node.op} ({node.name})"
            )
        wide = max(r.weight for _, r in rows)
        deep = max(r.activation for _, r in rows if r.weight == wide)
        parts = -(-weight // wide) * -(-activation // deep)
        fitting = [
            (figure * parts, row.weight * row.activation, row)
            for figure, row in rows
            if row.weight >= min(weight, wide) and row.activation >= min(activation, deep)
        ]
        figure, _, row = min(fitting, key=lambda entry: entry[:2])
        return figure, row

    @property
    def widest(self) -> int:
        """The widest operands that every kind of op can have without being split."""
        return min(max(min(r.weight, r.activation) for r in rows) for rows in self.tables.values())


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
    path = Path(target)
    if not path.is_file():
        raise TargetError(
            f"there is no target {str(target)!r}; shipped are {', '.join(target_names())}, or give "
            "the path of a JSON file"
        )
    if path.stat().st_size > _MAX_FILE:
        raise TargetError(f"{path} is larger than {_MAX_FILE} bytes; that is no target")
    return parse_target(path.read_bytes(), str(path))


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
        data = json.loads(text)
        tables = {str(p): _rows(rows) for p, rows in data["tables"].items()}
        target = Target(
            name=str(data["name"]),
            description=str(data["description"]),
            source=str(data["source"]),
            tables=tables,
            clock=_positive(data, "clock_hz"),
            bytes_per_cycle=_positive(data, "bytes_per_cycle"),
            picojoules_per_byte=_positive(data, "picojoules_per_byte"),
            memories={str(k): int(v) for k, v in data.get("memories", {}).items()},
        )
    except TargetError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise TargetError(f"{where} is no target file: {type(error).__name__}: {error}") from error
    if not tables:
        raise TargetError(f"{where} has no tables")
    return target


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


def _rows(data: Any) -> tuple[Row, ...]:
    if not isinstance(data, list) or not 0 < len(data) <= _MAX_ROWS:
        raise TargetError(f"a table is a list of 1 to {_MAX_ROWS} rows")
    rows = []
    for entry in data:
        weight, activation = int(entry["weight"]), int(entry["activation"])
        if not (0 < weight <= 32 and 0 < activation <= 32):
            raise TargetError(f"bit-widths are 1 to 32, not {weight} and {activation}")
        rows.append(Row(weight, activation, _positive(entry, "cycles"), _positive(entry, "pJ")))
    return tuple(rows)


def _positive(data: Mapping[str, Any], key: str) -> float | None:
    value = data.get(key)
    if value is None:
        return None
    number = float(value)
    if not isfinite(number) or number <= 0:
        raise TargetError(f"{key} must be a positive, finite number, not {value!r}")
    return number
