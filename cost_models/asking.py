"""Asking a cost model, which may be a user's: what goes wrong inside is told with its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cgmq_fx.cost_models.bits import GraphBits, NodeBits
from cgmq_fx.cost_models.errors import CgmqError, CostModelError
from cgmq_fx.cost_models.facts import GraphFacts, NodeFacts
from cgmq_fx.cost_models.model import CostModel


def cost_of_node(model: CostModel, node: NodeFacts, bits: NodeBits) -> float:
    """What a node costs.

    Raises:
        CostModelError: If the model raises what is no error of this library, or gives no number.
    """
    try:
        return float(model.node_cost(node, bits))
    except CgmqError:
        raise
    except Exception as error:
        raise CostModelError(
            f"the cost model {model.name!r} fails for {node.title} ({node.op}): "
            f"{type(error).__name__}: {error}; `node_cost` must give a number for every node, also "
            "where nothing is multiplied and `node.operands` is empty"
        ) from error


def cost_of_graph(model: CostModel, graph: GraphFacts, bits: GraphBits) -> float:
    """What a graph costs; raises as `cost_of_node` does."""
    with _named(model, "graph_cost"):
        return float(model.graph_cost(graph, bits))


def parts_of_graph(model: CostModel, graph: GraphFacts, bits: GraphBits) -> dict[str, float]:
    """What the cost of a graph is made of, by name; raises as `cost_of_node` does."""
    with _named(model, "parts"):
        return {name: float(cost) for name, cost in model.parts(graph, bits).items()}


@contextmanager
def _named(model: CostModel, method: str) -> Iterator[None]:
    try:
        yield
    except CgmqError:
        raise
    except Exception as error:
        raise CostModelError(
            f"the cost model {model.name!r} fails in `{method}`: {type(error).__name__}: {error}"
        ) from error
