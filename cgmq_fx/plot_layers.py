"""Plots over the layers: bits, shares of the cost, and weights within their ranges; and sweeps."""

from __future__ import annotations

from math import ceil

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cgmq_fx.cost_models import NodeFacts
from cgmq_fx.palette import ACTIVATION, WEIGHT
from cgmq_fx.report import mean_bits, quantizer_of
from cgmq_fx.result import Result
from cgmq_fx.sweep_result import Sweep

_ROW = 0.3
_ROWS = 50
"""Layers above one another; more go into further columns."""

_BINS = 81
_REACH = 1.25
"""How far beyond a range values are shown, as a multiple of the range."""

_SAMPLES = 50_000
_LABELS = 40


def bits_figure(result: Result) -> Figure:
    """Mean bits of weight and activation of every layer by name, and its share of each cost."""
    nodes = [(i, n) for i, n in enumerate(result.cost.nodes) if n.operands]
    count = max(1, ceil(len(nodes) / _ROWS))
    size = ceil(len(nodes) / count)
    figure = Figure(figsize=(8 * count, 1.4 + _ROW * size), layout="constrained")
    axes = figure.subplots(1, 2 * count, squeeze=False)[0]
    for column in range(count):
        part = nodes[column * size : (column + 1) * size]
        left, right = axes[2 * column : 2 * column + 2]
        _bits(left, result, [n for _, n in part], named=column == 0)
        _shares(right, result, [i for i, _ in part], named=column == 0)
        for axis in (left, right):
            axis.set_ylim(size - 0.4, -0.6)
        right.set_yticks([])
    for start in (0, 1):
        same = axes[start::2]
        most = max(axis.get_xlim()[1] for axis in same)
        for axis in same:
            axis.set_xlim(0, most)
    return figure


def profile_figure(result: Result) -> Figure:
    """Bits and cost along the network, for any number of layers."""
    nodes = [(i, n) for i, n in enumerate(result.cost.nodes) if n.operands]
    at = np.arange(len(nodes) + 1) - 0.5
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for index, color, marker, label in (
        (0, WEIGHT, "s", "weights"),
        (1, ACTIVATION, "o", "activations"),
    ):
        bits = [mean_bits(result, n.operands[index]) for _, n in nodes]
        line = "none" if len(nodes) > _LABELS else "solid"
        style = {"linestyle": line, "marker": marker, "color": color, "label": label}
        above.plot(bits, markersize=4, alpha=0.8, **style)
    above.set_yscale("log", base=2)
    widths = sorted({b for q in result.cost.facts.quantizers.values() for b in q.bit_widths if b})
    above.set_yticks(widths, map(str, widths))
    above.minorticks_off()
    above.set_ylabel("bits")
    above.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    for state, costs in zip(result.cost.states, result.cost.per_node, strict=True):
        total = sum(costs) or 1.0
        shares = [100 * costs[i] / total for i, _ in nodes]
        below.stairs(shares, at, label=state.constraint.name, linewidth=1.2)
    below.set_ylabel("share of the cost, %")
    below.legend(frameon=False)
    _name_layers(below, [n for _, n in nodes], "x")
    return figure


def ranges_figure(result: Result) -> Figure:
    """A row per weight: how its values are spread over the range of its grid, 1 being the end."""
    model = dict(result.model.named_parameters())
    edges = np.linspace(-_REACH, _REACH, _BINS + 1)
    rows, nodes = [], []
    for node in result.cost.nodes:
        for stored in node.stored:
            if stored.quantizer is not None and stored.name in model:
                limit = quantizer_of(result, stored.quantizer).limit.detach()
                values = (model[stored.name].detach() / limit).reshape(-1).cpu().numpy()
                values = values[:: max(1, values.size // _SAMPLES)]
                counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
                rows.append(counts / max(1, counts.max()))
                nodes.append(node)
    height = min(9.0, 1.4 + 0.22 * max(3, len(rows)))
    figure = Figure(figsize=(8, height), layout="constrained")
    axis = figure.subplots()
    if rows:
        extent = (-_REACH, _REACH, len(rows) - 0.5, -0.5)
        axis.imshow(np.array(rows), aspect="auto", extent=extent, interpolation="nearest")
    for end in (-1, 1):
        axis.axvline(end, color="#ff5555", linewidth=1, linestyle="--")
    axis.set_xlabel("weight / range; beyond the dashed lines values are clipped")
    _name_layers(axis, nodes, "y")
    return figure


def sweep_figure(sweep: Sweep) -> Figure:
    """The measure of every point over each of its costs, and the Pareto front as a line."""
    names = list(dict.fromkeys(name for point in sweep for name in point.costs))
    figure = Figure(figsize=(4.6 * len(names), 3.8), layout="constrained")
    front = {id(point) for point in sweep.front}
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        points = sorted((p for p in sweep if name in p.costs), key=lambda p: p.shares[name])
        beaten = [p for p in points if id(p) not in front]
        best = [p for p in points if id(p) in front]
        for group, style, label in (
            (beaten, "x", "beaten by another point"),
            (best, "o-", "Pareto front"),
        ):
            shares = [100 * p.shares[name] for p in group]
            measures = [p.measure[1] for p in group]
            if group:
                color = WEIGHT if group is best else ACTIVATION
                axis.plot(shares, measures, style, color=color, label=label, markersize=5)
        axis.set_xlabel(f"{name}, % of what the bounds refer to")
        axis.set_ylabel(points[0].measure[0])
        axis.legend(frameon=False)
    return figure


def _bits(axis: Axes, result: Result, nodes: list[NodeFacts], named: bool) -> None:
    for offset, index, color, label in (
        (-0.2, 0, WEIGHT, "weights"),
        (0.2, 1, ACTIVATION, "activations"),
    ):
        bits = [mean_bits(result, n.operands[index]) for n in nodes]
        bars = axis.barh(np.arange(len(nodes)) + offset, bits, 0.38, color=color, label=label)
        axis.bar_label(bars, [f"{b:.3g}" for b in bits], padding=2, fontsize=7)
    axis.set_yticks(range(len(nodes)), [n.title for n in nodes])
    axis.set_xlabel("bits (mean over gates)")
    axis.margins(x=0.12)
    if named:
        axis.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, frameon=False)


def _shares(axis: Axes, result: Result, indices: list[int], named: bool) -> None:
    count = len(result.cost.states)
    height = 0.76 / count
    for position, state in enumerate(result.cost.states):
        costs = result.cost.per_node[position]
        total = sum(costs) or 1.0
        shares = [100 * costs[i] / total for i in indices]
        rows = np.arange(len(indices)) - 0.38 + (position + 0.5) * height
        bars = axis.barh(rows, shares, height, label=state.constraint.name)
        if count <= 2:
            axis.bar_label(bars, [f"{s:.1f}" for s in shares], padding=2, fontsize=7)
    axis.set_xlabel("share of the cost, %")
    axis.margins(x=0.12)
    if named:
        axis.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, frameon=False)


def _name_layers(axis: Axes, nodes: list[NodeFacts], side: str) -> None:
    """The names of as many layers as there is room for."""
    every = ceil(max(1, len(nodes)) / _LABELS)
    at = range(0, len(nodes), every)
    names = [nodes[i].module or nodes[i].name for i in at]
    if side == "x":
        axis.set_xticks(at, names, rotation=90, fontsize=7)
    else:
        axis.set_yticks(at, names, fontsize=7)
    axis.tick_params(colors=rcParams["text.color"])
