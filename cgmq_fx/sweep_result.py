"""What a sweep gives: points, and which of them nothing beats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cgmq_fx.given import path_of
from cgmq_fx.plain import finite
from cgmq_fx.result import Result
from cgmq_fx.terminal import columns, escape, text_of, titled

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One budget and what came of it.

    Attributes:
        budget: The budget.
        result: The quantized model, which satisfies it.
        file: Where it is kept, if the sweep keeps its points.
    """

    budget: str
    result: Result
    file: Path | None = None

    @property
    def costs(self) -> dict[str, float]:
        """What the model costs, by the names of the costs."""
        return {state.constraint.name: state.value for state in self.result.cost.states}

    @property
    def shares(self) -> dict[str, float]:
        """The same as shares of the model at 32 bits (or what the bound refers to)."""
        return {state.constraint.name: state.relative for state in self.result.cost.states}

    @property
    def measure(self) -> tuple[str, float]:
        """What points are compared by: a metric on the validation data, else a loss."""
        metrics, epochs = self.result.metrics, self.result.history.epochs
        for name in ("metric", "accuracy", "loss"):
            if name in metrics:
                return name, metrics[name]
        return "training loss", epochs[-1].loss if epochs else float("nan")

    @property
    def quality(self) -> float:
        """The measure, turned so that more is better."""
        name, value = self.measure
        return -value if name.endswith("loss") else value


@dataclass(frozen=True)
class Sweep:
    """The points of a sweep, from the loosest budget to the tightest."""

    points: tuple[SweepPoint, ...]

    def __iter__(self) -> Iterator[SweepPoint]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> SweepPoint:
        return self.points[index]

    @property
    def front(self) -> tuple[SweepPoint, ...]:
        """The points that no other beats: none is as good, as cheap, and better in one of these."""
        return tuple(p for p in self.points if not any(_beats(q, p) for q in self.points))

    def rows(self) -> list[dict[str, Any]]:
        """A row of plain values per point: budget, every cost, every metric, and the front.

        What was not measured is None.
        """
        front = {id(point) for point in self.front}
        rows = [
            {
                "budget": point.budget,
                **point.costs,
                point.measure[0]: point.measure[1],
                **point.result.metrics,
                "on_front": id(point) in front,
                "file": None if point.file is None else str(point.file),
            }
            for point in self.points
        ]
        found: list[dict[str, Any]] = finite(rows)
        return found

    def to_dataframe(self) -> DataFrame:
        """The rows as a pandas DataFrame.

        Raises:
            OptionError: If pandas is not installed.
        """
        from cgmq_fx.tabular import frame

        return frame(self.rows())

    def plot(self, path: str | Path) -> Path:
        """Write a picture of quality over cost with the Pareto front drawn in.

        Args:
            path: A PNG, SVG or PDF file.

        Raises:
            OptionError: If matplotlib is not installed, or the file cannot be written.
        """
        from cgmq_fx.plots import save_sweep

        return save_sweep(self, path_of("plot", path))

    def __str__(self) -> str:
        return text_of([self._table()], columns())

    def _table(self) -> Table:
        names = list(dict.fromkeys(name for point in self.points for name in point.costs))
        table = titled("Sweep")
        table.add_column("budget")
        for name in (*names, self.points[0].measure[0], "front"):
            table.add_column(escape(name), justify="right", no_wrap=True)
        front = {id(point) for point in self.front}
        for point in self.points:
            amounts = {s.constraint.name: s.amounts[1] for s in point.result.cost.states}
            costs = [amounts.get(name, "-") for name in names]
            mark = "*" if id(point) in front else ""
            table.add_row(escape(point.budget), *costs, f"{point.measure[1]:.4g}", mark)
        return table


def _beats(one: SweepPoint, other: SweepPoint) -> bool:
    """Whether `one` is at least as good and as cheap in all that both count, and better in some."""
    shared = [name for name in other.costs if name in one.costs]
    mine = [*(one.costs[name] for name in shared), -one.quality]
    theirs = [*(other.costs[name] for name in shared), -other.quality]
    return _all_at_most(mine, theirs) and mine != theirs


def _all_at_most(left: Sequence[float], right: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(left, right, strict=True))
