"""Where the layers of a graph stand in a picture of it.

Only layers that compute, nodes where branches join, inputs and outputs are drawn; what lies between
is contracted. Generations run from left to right and wrap like the lines of a text.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any, Literal, TypeAlias

import networkx as nx
from torch.fx import Node

from cgmq_fx.cost_models import NodeFacts
from cgmq_fx.report import mean_bits
from cgmq_fx.result import Result

Kind: TypeAlias = Literal["layer", "join", "end"]

_WIDTH = 1200.0
_CELL = (46.0, 130.0)
_LANE = 50.0
_MARGIN = 26.0
_RADIUS = (6.0, 22.0)
_SMALL = 4.0
_LETTER = 0.7
"""Width of a letter as a share of its height."""


@dataclass(frozen=True, slots=True)
class DrawnNode:
    """A node in the picture.

    Attributes:
        name: The node's name in the graph.
        kind: A layer that computes, a join of branches, or an input or output.
        label: The end of the layer's name, as much as there is room for.
        about: Everything about it, for a tooltip.
        x: Centre.
        y: Centre.
        radius: The area grows with the share of the cost.
        weight_bits: Mean bits of its weight, None where it has none.
        activation_bits: Mean bits of its activation.
    """

    name: str
    kind: Kind
    label: str
    about: str
    x: float
    y: float
    radius: float
    weight_bits: float | None = None
    activation_bits: float | None = None


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture of a graph: nodes, and the paths of its edges in the notation of SVG."""

    width: float
    height: float
    font: float
    nodes: tuple[DrawnNode, ...]
    edges: tuple[str, ...]


def draw(result: Result) -> Drawing:
    """Lay out the graph of a result."""
    graph = _contracted(result)
    lanes = _lanes(graph)
    cell = min(max(_WIDTH / max(len(lanes), 1), _CELL[0]), _CELL[1])
    per_line = max(1, int(_WIDTH // cell))
    places, height = _places(lanes, cell, per_line)
    font = min(11.0, cell / 6)
    radii = _radii(result, cell)
    facts = {node.name: node for node in result.cost.nodes if node.operands}
    nodes = tuple(
        _drawn(result, name, graph.nodes[name]["kind"], facts.get(name), places, radii, cell / font)
        for name in graph
    )
    edges = tuple(
        path
        for source, target in graph.edges
        for path in _paths(places[source], places[target], cell)
    )
    width = min(len(lanes), per_line) * cell + 2 * _MARGIN
    return Drawing(width, height, font, nodes, edges)


def _contracted(result: Result) -> nx.DiGraph[str]:
    """The graph of what is drawn; an edge stands for any way between two of its nodes."""
    computing = {node.name for node in result.cost.nodes if node.operands}
    graph: nx.DiGraph[str] = nx.DiGraph()
    sources: dict[Node, tuple[str, ...]] = {}
    for node in result.model.graph.nodes:
        before = dict.fromkeys(s for n in node.all_input_nodes for s in sources[n])
        kind: Kind | None = None
        if node.name in computing:
            kind = "layer"
        elif node.op in ("placeholder", "output"):
            kind = "end"
        elif len(before) > 1:
            kind = "join"
        if kind is None:
            sources[node] = tuple(before)
            continue
        graph.add_node(node.name, kind=kind)
        graph.add_edges_from((source, node.name) for source in before)
        sources[node] = (node.name,)
    return graph


def _lanes(graph: nx.DiGraph[str]) -> list[list[str]]:
    """The nodes by generation; within one, ordered by where their sources stand."""
    lanes: list[list[str]] = []
    height: dict[str, float] = {}
    for generation in nx.topological_generations(graph):
        middles = {}
        for name in generation:
            above = [height[source] for source in graph.predecessors(name)]
            middles[name] = sum(above) / len(above) if above else 0.0
        lane = sorted(generation, key=lambda name: middles[name])
        height.update({name: i - (len(lane) - 1) / 2 for i, name in enumerate(lane)})
        lanes.append(lane)
    return lanes


@dataclass(frozen=True, slots=True)
class _Place:
    line: int
    x: float
    y: float


def _places(lanes: list[list[str]], cell: float, per_line: int) -> tuple[dict[str, _Place], float]:
    """The centre of every node, and the height of the picture."""
    places = {}
    top = _MARGIN
    for line in range(ceil(len(lanes) / per_line)):
        row = lanes[line * per_line : (line + 1) * per_line]
        tall = max(len(lane) for lane in row) * _LANE
        for column, lane in enumerate(row):
            x = _MARGIN + (column + 0.5) * cell
            for i, name in enumerate(lane):
                places[name] = _Place(line, x, top + tall / 2 + (i - (len(lane) - 1) / 2) * _LANE)
        top += tall + _LANE / 2
    return places, top


def _paths(source: _Place, target: _Place, cell: float) -> list[str]:
    """One path within a line; where an edge goes to another line, its end and its beginning."""
    if source.line == target.line:
        bend = (target.x - source.x) / 2
        lift = 0.0 if target.x - source.x < 1.5 * cell or source.y != target.y else _LANE * 0.45
        return [
            f"M{source.x:.1f},{source.y:.1f}C{source.x + bend:.1f},{source.y - lift:.1f} "
            f"{target.x - bend:.1f},{target.y - lift:.1f} {target.x:.1f},{target.y:.1f}"
        ]
    return [
        f"M{source.x:.1f},{source.y:.1f}h{cell * 0.55:.1f}",
        f"M{target.x - cell * 0.55:.1f},{target.y:.1f}h{cell * 0.55:.1f}",
    ]


def _radii(result: Result, cell: float) -> dict[str, float]:
    """The radius of every layer: the area of its circle grows with its share of the first cost."""
    costs = result.cost.per_node[0]
    if not any(costs):
        costs = tuple(float(node.macs) for node in result.cost.nodes)
    most = max(costs, default=0.0) or 1.0
    low, high = _RADIUS[0], min(_RADIUS[1], 0.44 * cell)
    return {
        node.name: low + (high - low) * sqrt(cost / most)
        for node, cost in zip(result.cost.nodes, costs, strict=True)
    }


def _drawn(
    result: Result,
    name: str,
    kind: Kind,
    facts: NodeFacts | None,
    places: dict[str, _Place],
    radii: dict[str, float],
    letters: float,
) -> DrawnNode:
    place = places[name]
    if facts is None:
        label = name if kind == "end" else ""
        shown = _shortened(label, int(letters / _LETTER))
        return DrawnNode(name, kind, shown, name, place.x, place.y, _SMALL)
    weight, activation = (mean_bits(result, operand) for operand in facts.operands)
    layer = facts.module or name
    about: dict[str, Any] = {
        layer: facts.op_text,
        "weight bits": f"{weight:.3g}",
        "activation bits": f"{activation:.3g}",
        "MACs": f"{facts.macs:,}",
    }
    index = result.cost.nodes.index(facts)
    for state, costs in zip(result.cost.states, result.cost.per_node, strict=True):
        total = sum(costs) or 1.0
        about[state.constraint.name] = f"{costs[index] / total:.1%} of its cost"
    return DrawnNode(
        name,
        kind,
        _shortened(layer, int(letters / _LETTER)),
        "\n".join(f"{key}: {value}" for key, value in about.items()),
        place.x,
        place.y,
        radii[name],
        weight,
        activation,
    )


def _shortened(label: str, letters: int) -> str:
    """The end of a label, which tells layers apart better than its beginning."""
    return label if len(label) <= letters else f"…{label[1 - letters :]}"
