"""Plots over time: costs against their bounds, accuracy, gates."""

from __future__ import annotations

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cgmq_fx.cost_models import QuantizerFacts, Role
from cgmq_fx.palette import ACTIVATION, WEIGHT
from cgmq_fx.result import Result

_POINTS = 500
_NAMED = 10


def history_figure(result: Result) -> Figure:
    """The cost of every constraint as a share of its bound over the steps, and the metrics."""
    history = result.history
    panels = 2 if history.epochs else 1
    figure = Figure(figsize=(8, 2.9 * panels), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    shown = history.steps[:: max(1, len(history.steps) // _POINTS)]
    steps = [s.step + 1 for s in shown]
    for index, constraint in enumerate(result.budget):
        axes[0].plot(steps, [s.costs[index] for s in shown], label=str(constraint))
    axes[0].axhline(1.0, color=rcParams["text.color"], linestyle="--", linewidth=1, label="bound")
    axes[0].set_yscale("log")
    axes[0].set_ylabel("cost / bound")
    axes[0].legend(frameon=False)
    searched = sum(s.phase == "search" for s in history.steps)
    for axis in axes:
        axis.axvspan(0, searched, color="#808080", alpha=0.15, linewidth=0)
    axes[0].set_title("shaded: search, gates move; after it: bit-widths frozen", fontsize=9)
    if history.epochs:
        _metrics(axes[1], result, len(history.steps))
    axes[-1].set_xlabel("step")
    axes[-1].locator_params(axis="x", integer=True)
    return figure


def gates_figure(result: Result) -> Figure:
    """The mean gate of every quantizer over the search, weights and activations apart."""
    history = result.history
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    facts = result.cost.facts.quantizers
    known = {name: facts[name] for name in history.quantizers if name in facts}
    steps = [record.step + 1 for record in history.gates]
    axes = figure.subplots(1, 2, sharey=True)
    sides = ((Role.WEIGHT, WEIGHT, "weights"), (Role.ACTIVATION, ACTIVATION, "activations"))
    for axis, (role, color, title) in zip(axes, sides, strict=True):
        own = [i for i, name in enumerate(history.quantizers) if _role(known.get(name)) is role]
        few = len(own) <= _NAMED
        for i in own:
            gates = [record.gates[i] for record in history.gates]
            name = history.quantizers[i] if few else None
            plain = {} if few else {"color": color, "alpha": 0.35}
            axis.plot(steps, gates, linewidth=1.2, label=name, **plain)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step")
        axis.locator_params(axis="x", integer=True)
        if few and own:
            axis.legend(
                frameon=False, fontsize=7, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.18)
            )
    _levels(axes[0], known)
    return figure


def _role(facts: QuantizerFacts | None) -> Role | None:
    return None if facts is None else facts.role


def _levels(axis: Axes, known: dict[str, QuantizerFacts]) -> None:
    """Name the heights of a gate by the bits that they stand for, where that is the same for all.

    The k-th bit-width is meant by gates above k - 1, up to k.
    """
    widths = {facts.bit_widths for facts in known.values()}
    longest = max(widths, key=len, default=())
    if not all(longest[: len(one)] == one for one in widths):
        axis.set_ylabel("mean gate")
        return
    for level in range(len(longest)):
        axis.axhline(level, color="#808080", linewidth=0.5)
        axis.figure.axes[1].axhline(level, color="#808080", linewidth=0.5)
    axis.set_yticks([k + 0.5 for k in range(len(longest))], [f"{bits} bits" for bits in longest])
    axis.set_ylim(0, len(longest) + 0.6)


def _metrics(axis: Axes, result: Result, steps: int) -> None:
    epochs = result.history.epochs
    ends = [steps * e.epoch / len(epochs) for e in epochs]
    shown = [name for name in epochs[0].metrics if name != "loss"] or ["loss"]
    for name in shown:
        values = [e.metrics.get(name, e.loss) for e in epochs]
        label = f"validation {name}" if epochs[0].metrics else name
        axis.plot(ends, values, marker="o", markersize=4, label=label)
    axis.set_ylabel(", ".join(shown))
    axis.legend(frameon=False)
