"""Which layer of the model a node of a file is: for bounds on a part of a model.

Files keep no paths of modules, so the manifest lists what costs something, in order, with its path.
The paths are the file's word; what they are given to is not: the lists must agree in every count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cgmq_fx.cost_models import GraphFacts, NodeFacts
from cgmq_fx.cost_models.errors import ArtifactError


@dataclass(frozen=True)
class LayerName:
    """A node that costs something.

    Attributes:
        module: Path of its module in the model.
        name: Its name in the graph.
        macs: Its multiply-accumulates per sample.
        stored: Elements that it keeps.
    """

    module: str
    name: str
    macs: int
    stored: int

    def to_json(self) -> list[Any]:
        """As plain values."""
        return [self.module, self.name, self.macs, self.stored]

    @staticmethod
    def from_json(row: Sequence[Any]) -> LayerName:
        """Read it."""
        module, name, macs, stored = row
        return LayerName(str(module), str(name), int(macs), int(stored))


def layer_names(facts: GraphFacts) -> tuple[LayerName, ...]:
    """The names of a graph's nodes."""
    return tuple(LayerName(n.module, n.name, n.macs, _stored(n)) for n in facts.nodes)


def named(facts: GraphFacts, names: Sequence[LayerName]) -> GraphFacts:
    """The facts of a file with the names of the layers that its nodes are.

    Raises:
        ArtifactError: If the file has other layers than its names say.
    """
    if not names:
        raise ArtifactError("its layers have no names: its own budget bounds no part of the model")
    nodes: list[NodeFacts] = list(facts.nodes)
    for multiplies in (True, False):
        places = [i for i, node in enumerate(nodes) if bool(node.macs) is multiplies]
        rows = [name for name in names if bool(name.macs) is multiplies]
        if len(places) != len(rows):
            raise ArtifactError("its layers are others than their names say")
        for place, row in zip(places, rows, strict=True):
            if (nodes[place].macs, _stored(nodes[place])) != (row.macs, row.stored):
                raise ArtifactError(f"{row.name[:40]} costs something else than its name says")
            nodes[place] = replace(nodes[place], module=row.module, name=row.name)
    return replace(facts, nodes=tuple(nodes))


def _stored(node: NodeFacts) -> int:
    return sum(tensor.elements for tensor in node.stored)
