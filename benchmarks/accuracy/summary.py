"""The rows of many runs as a table and a plot: mean and standard error over seeds."""

import json
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

from benchmarks.accuracy.methods import Row

PENALTY = "penalty"


@dataclass(frozen=True)
class Cell:
    """One method under one bound.

    Attributes:
        method: The method.
        bound: The bound.
        epochs: Epochs of each run.
        seeds: Number of runs.
        accuracy: Mean over them.
        error: Standard error of the mean; 0 for a single run.
        cost: Mean of the first constraint.
        satisfied: Whether all of them hold the bound.
    """

    method: str
    bound: str
    epochs: int
    seeds: int
    accuracy: float
    error: float
    cost: float
    satisfied: bool


def read(path: Path) -> list[Row]:
    """The rows of a file of results; none if there is no file."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [Row(**{**row, "costs": tuple(row["costs"])}) for row in rows]


def cells(rows: list[Row]) -> list[Cell]:
    """The rows by method, bound and epochs, sorted by bound."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.bound, row.method, row.epochs), []).append(row)
    found = []
    for (bound, method, epochs), group in groups.items():
        values = [row.accuracy for row in group]
        error = stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0
        cost = mean(row.costs[0] for row in group)
        held = all(row.satisfied for row in group)
        found.append(Cell(method, bound, epochs, len(group), mean(values), error, cost, held))
    return sorted(found, key=lambda cell: (cell.method == PENALTY, cell.cost, cell.method))


def table(rows: list[Row]) -> str:
    """A table in Markdown."""
    if not rows:
        return "no results\n"
    lines = [
        f"float: {rows[0].float_accuracy:.2%}",
        "",
        "| bound | method | accuracy | cost | epochs | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for cell in cells(rows):
        bound = "none, " + cell.bound if cell.method == PENALTY else cell.bound
        accuracy = f"{cell.accuracy:.2%}" + (f" ± {cell.error:.2%}" if cell.seeds > 1 else "")
        cost = f"{cell.cost:.3%}" if cell.cost < 1 else f"{cell.cost:.0f}"
        lines.append(
            f"| {bound} | {cell.method} | {accuracy} | {cost} | {cell.epochs} | {cell.seeds} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    """Accuracy over cost, one line per method, error bars over seeds."""
    import matplotlib.pyplot as plt

    shown = [cell for cell in cells(rows) if cell.cost < 1]
    if not shown:
        return
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method in dict.fromkeys(cell.method for cell in shown):
        own = [cell for cell in shown if cell.method == method]
        axes.errorbar(
            [100 * cell.cost for cell in own],
            [100 * cell.accuracy for cell in own],
            [100 * cell.error for cell in own],
            marker="o",
            capsize=3,
            label="cgmq (ours)" if method == "marginal" else method,
            linestyle="-" if method == "marginal" else ":",
        )
    axes.axhline(100 * rows[0].float_accuracy, color="grey", linewidth=1, label="float")
    axes.set(xscale="log", xlabel="relative BOPs, %", ylabel="test accuracy, %")
    axes.set_title(rows[0].case)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
