"""The interface of a cost model, and the table of those that budgets can name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from difflib import get_close_matches
from math import fsum
from typing import TYPE_CHECKING, ClassVar, TypeVar

from cgmq_fx.cost_models.bits import GraphBits, NodeBits
from cgmq_fx.cost_models.errors import CostModelError, UnknownCostError
from cgmq_fx.cost_models.facts import GraphFacts, NodeFacts

if TYPE_CHECKING:
    from cgmq_fx.cost_models.constraint import Bound, Constraint
    from cgmq_fx.cost_models.target import Target


class CostModel(ABC):
    """Maps graph facts and bit-widths to a number with a unit.

    A subclass sets `name` and `unit` and writes `node_cost`. The cost must be finite, not negative,
    and never lower for more bits; this is tested on every model that is prepared or explained.

    A model whose total is not the sum over the nodes (a peak, say) sets `additive = False` and
    overrides `graph_cost` as well; `node_cost` is then what reports show per node.

    Attributes:
        name: What a budget string calls it.
        unit: Its unit, as `pint` spells it ("byte", "second"), or a word of its own ("bop").
        additive: Whether the total is the sum of `node_cost` over the nodes.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    additive: ClassVar[bool] = True

    @classmethod
    def make(cls, target: Target | None) -> CostModel:
        """An instance for a budget string; models that depend on a chip use `target`."""
        return cls()

    @abstractmethod
    def node_cost(self, node: NodeFacts, bits: NodeBits) -> float:
        """The cost of one node, per sample.

        Args:
            node: Its facts.
            bits: Its bits, as a distribution over the elements that meet.

        Returns:
            The cost in `unit`.
        """

    def graph_cost(self, graph: GraphFacts, bits: GraphBits) -> float:
        """The cost of the whole graph.

        Args:
            graph: The facts of the graph.
            bits: `bits.nodes`, the bits of each of `graph.nodes`, and `bits.tensors`, the total
                bits of each of `graph.tensors`.

        Returns:
            The cost in `unit`; the sum over the nodes unless overridden.
        """
        return fsum(self.node_cost(n, b) for n, b in zip(graph.nodes, bits.nodes, strict=True))

    def parts(self, graph: GraphFacts, bits: GraphBits) -> dict[str, float]:
        """What the total is made of, by name: what dominates it is named to the user.

        Args:
            graph: The facts of the graph.
            bits: Its bits.

        Returns:
            The cost of every module of the user's, or node outside of one, unless overridden.
        """
        parts: dict[str, float] = {}
        for node, b in zip(graph.nodes, bits.nodes, strict=True):
            name = node.title
            parts[name] = parts.get(name, 0.0) + self.node_cost(node, b)
        return parts

    def __le__(self, bound: float | str | Bound) -> Constraint:
        """`BOPs() <= 2e6` and `BOPs() <= "0.4%"` are constraints.

        Raises:
            BudgetError: If `bound` cannot be read as a bound.
        """
        from cgmq_fx.cost_models.constraint import Constraint
        from cgmq_fx.cost_models.parse import parse_bound

        return Constraint(self, parse_bound(bound, self))


_REGISTRY: dict[str, type[CostModel]] = {}

Model = TypeVar("Model", bound=CostModel)


def register_cost_model(model: type[Model]) -> type[Model]:
    """Make a cost model usable by its name in budget strings; usable as a class decorator.

    Raises:
        CostModelError: If it has no unit, no name that is an identifier, or the name of another
            model.
    """
    name = getattr(model, "name", "")
    if not isinstance(name, str) or not name.isidentifier():
        raise CostModelError(
            f"{model.__qualname__} needs a `name` that is an identifier, such as 'wires'; "
            f"it has {name!r}"
        )
    if not isinstance(getattr(model, "unit", None), str):
        raise CostModelError(f"{model.__qualname__} needs a `unit`, a string such as 'byte'")
    if name in _REGISTRY and _REGISTRY[name] is not model:
        raise CostModelError(
            f"a cost model named {name!r} is registered already ({_REGISTRY[name].__qualname__}); "
            "give the new one another name"
        )
    _REGISTRY[name] = model
    return model


def cost_model(name: str, target: Target | None = None) -> CostModel:
    """A registered cost model by name.

    Raises:
        UnknownCostError: If no model has that name.
        BudgetError: If the model depends on a chip and `target` is None.
    """
    if name not in _REGISTRY:
        known = ", ".join(sorted(_REGISTRY))
        close = get_close_matches(name.lower(), _REGISTRY, 1)
        hint = f"did you mean {close[0]!r}? Known" if close else "known"
        raise UnknownCostError(
            f"there is no cost model named {name!r}; {hint} are {known}. "
            "Register your own with cgmq_fx.register_cost_model"
        )
    try:
        return _REGISTRY[name].make(target)
    except TypeError as error:  # an abstract class, or one whose constructor needs arguments
        raise CostModelError(
            f"the cost model {name!r} cannot be made from its name alone ({error}); define "
            "`node_cost`, and give models with arguments as a constraint: Wires(0.1) <= 2e6"
        ) from error
