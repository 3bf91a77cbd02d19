"""Cost models that fail: the error names the model and the node, and keeps what it came from."""

from collections.abc import Callable
from typing import Any

import pytest

from cgmq_fx.cost_models import Budget, CostModel, Ledger, NodeBits, NodeFacts, lowest_bits
from cgmq_fx.cost_models.errors import BudgetError, CgmqError, CostModelError
from cgmq_fx.cost_models.preflight import dominating
from tests.cost_helpers import graph, linear

ONE_LAYER = graph(linear("fc", "w", "x"), widths=(2, 4, 8))


class Failing(CostModel):
    """Its methods are what it is made of."""

    name, unit = "failing", "point"

    def __init__(self, node: Callable[[], Any], **others: Callable[[], Any]) -> None:
        self.node, self.others = node, others
        self.additive = "graph" not in others  # type: ignore[misc]

    def node_cost(self, node: NodeFacts, bits: NodeBits) -> float:
        return self.node()  # type: ignore[no-any-return]

    def graph_cost(self, graph: Any, bits: Any) -> float:
        return self.others["graph"]()  # type: ignore[no-any-return]

    def parts(self, graph: Any, bits: Any) -> dict[str, float]:
        return self.others["parts"]()  # type: ignore[no-any-return]


def raising(error: Exception) -> Callable[[], Any]:
    def method() -> Any:
        raise error

    return method


FAILING: list[tuple[CostModel, str, type[Exception]]] = [
    (
        Failing(raising(KeyError("x"))),
        r"'failing' fails for fc \(aten\.linear\.default\): KeyError: 'x'; `node_cost` must give",
        KeyError,
    ),
    (
        Failing(lambda: None),
        "fails for fc .* not 'NoneType'; .* a number for every node",
        TypeError,
    ),
    (
        Failing(lambda: 1.0, graph=lambda: None),
        "'failing' fails in `graph_cost`: TypeError: .*NoneType",
        TypeError,
    ),
    (
        Failing(lambda: 1.0, parts=raising(ZeroDivisionError("nothing"))),
        "'failing' fails in `parts`: ZeroDivisionError: nothing",
        ZeroDivisionError,
    ),
]


@pytest.mark.parametrize(("model", "message", "cause"), FAILING)
def test_a_model_that_fails_is_named(
    model: CostModel, message: str, cause: type[Exception]
) -> None:
    with pytest.raises(CostModelError, match=message) as caught:
        dominating(Ledger(ONE_LAYER, Budget((model <= 10.0,)), lowest_bits(ONE_LAYER)), 0)
    assert isinstance(caught.value.__cause__, cause)


OWN = [Failing(raising(BudgetError("no clock"))), Failing(int, graph=raising(BudgetError("no")))]


@pytest.mark.parametrize("model", OWN)
def test_an_error_of_the_library_passes_through(model: CostModel) -> None:
    with pytest.raises(CgmqError, match=r"^no"):
        Ledger(ONE_LAYER, Budget((model <= 10.0,)), lowest_bits(ONE_LAYER))
