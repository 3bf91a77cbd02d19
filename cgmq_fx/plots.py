"""Plots of a result: bits per layer, and cost and accuracy over time with the bound drawn in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cgmq_fx.cost_models import FLOAT_BITS
from cgmq_fx.cost_models.errors import OptionError
from cgmq_fx.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cgmq_fx.sweep_result import Sweep

_WEIGHT, _ACTIVATION, _BOUND = "#4477aa", "#ee6677", "#222222"
_ROW = 0.32


def save_plots(result: Result, folder: Path) -> list[Path]:
    """Write `bits.png` and, if anything was recorded, `history.png`.

    Args:
        result: What to show.
        folder: Where to; made if it does not exist.

    Returns:
        The files.

    Raises:
        OptionError: If matplotlib is not installed, or the folder cannot be written to.
    """
    figures = {"bits.png": bits_figure(result)}
    if result.history.steps:
        figures["history.png"] = history_figure(result)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(folder / name, dpi=120)
    except OSError as error:
        raise OptionError(f"plots cannot be written to {folder}: {error}") from error
    return [folder / name for name in figures]


def save_figure(figure: Figure, path: Path) -> Path:
    """Write one figure.

    Raises:
        OptionError: If the file cannot be written, or its ending is of no format.
    """
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be written: {error}") from error
    return path


def sweep_figure(sweep: Sweep) -> Figure:
    """The measure of every point over each of its costs, and the Pareto front as a line."""
    names = list(dict.fromkeys(name for point in sweep for name in point.costs))
    figure = _figure(4.6 * len(names), 4)
    front = {id(point) for point in sweep.front}
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        points = sorted((p for p in sweep if name in p.costs), key=lambda p: p.shares[name])
        beaten = [p for p in points if id(p) not in front]
        best = [p for p in points if id(p) in front]
        for group, color, style in ((beaten, _BOUND, "o"), (best, _WEIGHT, "o-")):
            shares = [100 * p.shares[name] for p in group]
            measures = [p.measure[1] for p in group]
            label = "Pareto front" if group is best else "beaten by another point"
            if group:
                axis.plot(shares, measures, style, color=color, label=label, markersize=5)
        axis.set_xscale("log")
        axis.set_xlabel(f"{name}, % of 32 bits")
        axis.set_ylabel(points[0].measure[0])
        axis.legend(frameon=False)
    return figure


def bits_figure(result: Result) -> Figure:
    """Mean bits of weight and activation of every compute node, and its share of the cost."""
    nodes = [(i, n) for i, n in enumerate(result.cost.nodes) if n.operands]
    figure = _figure(11, 1.6 + _ROW * len(nodes))
    left, right = figure.subplots(1, 2, sharey=True)
    for offset, index, color, label in (
        (-0.2, 0, _WEIGHT, "weights"),
        (0.2, 1, _ACTIVATION, "activations"),
    ):
        bits = [_mean_bits(result, n.operands[index].quantizer) for _, n in nodes]
        rows = [row + offset for row in range(len(nodes))]
        bars = left.barh(rows, bits, 0.38, color=color, label=label)
        left.bar_label(bars, [f"{b:.3g}" for b in bits], padding=2, fontsize=8)
    left.set_yticks(range(len(nodes)), [n.module or n.name for _, n in nodes])
    left.invert_yaxis()
    left.set_xlabel("bits (mean over gates)")
    left.margins(x=0.12)
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    _cost_shares(right, result, [i for i, _ in nodes])
    return figure


def history_figure(result: Result) -> Figure:
    """The cost of every constraint as a share of its bound over the steps, and the metrics."""
    history = result.history
    panels = 2 if history.epochs else 1
    figure = _figure(9, 3.2 * panels)
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    steps = [s.step + 1 for s in history.steps]
    for index, constraint in enumerate(result.budget):
        axes[0].plot(steps, [s.costs[index] for s in history.steps], label=str(constraint))
    axes[0].axhline(1.0, color=_BOUND, linestyle="--", linewidth=1, label="bound")
    axes[0].set_yscale("log")
    axes[0].set_ylabel("cost / bound")
    axes[0].legend(frameon=False)
    searched = sum(s.phase == "search" for s in history.steps)
    for axis in axes:
        axis.axvspan(0, searched, color="#000000", alpha=0.05)
    axes[0].set_title("shaded: search, gates move; after it: bit-widths frozen", fontsize=9)
    if history.epochs:
        _metrics(axes[1], result, steps[-1])
    axes[-1].set_xlabel("step")
    return figure


def _metrics(axis: Axes, result: Result, steps: int) -> None:
    epochs = result.history.epochs
    ends = [steps * e.epoch / len(epochs) for e in epochs]
    shown = [name for name in epochs[0].metrics if name != "loss"] or ["loss"]
    for name in shown:
        values = [e.metrics.get(name, e.loss) for e in epochs]
        axis.plot(
            ends, values, marker="o", label=f"validation {name}" if epochs[0].metrics else name
        )
    axis.set_ylabel(", ".join(shown))
    axis.legend(frameon=False)


def _cost_shares(axis: Axes, result: Result, indices: list[int]) -> None:
    count = len(result.cost.states)
    height = 0.76 / count
    for position, state in enumerate(result.cost.states):
        costs = result.cost.per_node[position]
        total = sum(costs) or 1.0
        shares = [100 * costs[i] / total for i in indices]
        rows = [row - 0.38 + (position + 0.5) * height for row in range(len(indices))]
        bars = axis.barh(rows, shares, height, label=state.constraint.model.name)
        axis.bar_label(bars, [f"{s:.1f}" for s in shares], padding=2, fontsize=8)
    axis.set_xlabel("share of the cost, %")
    axis.margins(x=0.12)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)


def _mean_bits(result: Result, quantizer: str | None) -> float:
    if quantizer is None:
        return float(FLOAT_BITS)
    return float(result.cost.assignment[quantizer].mean())


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError(
            'plots need matplotlib, which is not installed: pip install "cgmq-fx[plot]"'
        ) from error
    return Figure(figsize=(width, height), layout="constrained")
