"""The least cost that an error names is a bound that can be met."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgmq_fx.cost_models import BOPs, Bound, Constraint, ConstraintState, check_feasible
from cgmq_fx.cost_models.errors import InfeasibleBudgetError
from cgmq_fx.cost_models.parse import parse_budget
from cgmq_fx.cost_models.preflight import least
from tests.cost_helpers import graph, linear

LAYER = graph(linear("fc", "w", "x", shape=(3, 7)))
# 84 BOPs: 0.390625 % of those at 32 bits, 6.25 % of those at 8.
BELOW = ["0.390624%", "0.39%", "0.3906249999999999%", "6.2499% of 8 bits", "83.9999 bop", "3 bop"]


@pytest.mark.parametrize("bound", BELOW)
def test_what_is_asked_and_what_is_least_can_be_typed_again(bound: str) -> None:
    with pytest.raises(InfeasibleBudgetError) as caught:
        check_feasible(LAYER, parse_budget(f"bops <= {bound}"))
    message = str(caught.value)
    assert f": bops <= {bound} is asked for" in message
    found = message.partition("it is still ")[2].partition(", most")[0]
    assert found.partition("%")[2] == bound.partition("%")[2]
    check_feasible(LAYER, parse_budget(f"bops <= {found}"))


@given(st.integers(1, 10**15), st.integers(0, 10**15), st.sampled_from([1, 7, 1e9]))
def test_it_holds_and_is_near(cost: int, more: int, unit: float) -> None:
    value, reference = cost / unit, (cost + more) / unit
    for relative in (False, True):
        state = ConstraintState(
            Constraint(BOPs(), Bound(0.1, relative)), value, value / 2, reference
        )
        found = parse_budget(f"bops <= {least(state)}").constraints[0].bound.limit(reference)
        assert value <= found <= 1.0011 * value + 1.0


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.02441, "2.441%"),
        (0.0244140625, "2.4415%"),
        (0.00390625, "0.3907%"),
        (4.321e-7, "0.00004321%"),
    ],
)
def test_shares_are_rounded_up(share: float, text: str) -> None:
    constraint = Constraint(BOPs(), Bound(share / 2, relative=True))
    assert least(ConstraintState(constraint, share * 2**30, 0.0, 2.0**30)) == text
