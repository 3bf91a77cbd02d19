"""Bounds, constraints and facts: what they are, what they refuse, and that they never change."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from fractions import Fraction
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch

from cgmq_fx.cost_models import (
    BOPs,
    Bound,
    Budget,
    Constraint,
    ConstraintState,
    CostModel,
    GraphFacts,
    MACs,
    NodeBits,
    NodeFacts,
    Operand,
    QuantizerFacts,
    Role,
    Stored,
    Target,
    TensorFacts,
    WeightMemory,
    graph_bits,
    parse_bound,
    parse_budget,
)
from cgmq_fx.cost_models.errors import (
    BudgetError,
    CgmqError,
    CostModelError,
    DataError,
    StoppedError,
    TargetError,
    UnknownCostError,
    UnknownTargetError,
)
from cgmq_fx.cost_models.facts import Pruning
from cgmq_fx.cost_models.memory import Allocation, ArenaPlan
from cgmq_fx.cost_models.target import Row
from cgmq_fx.gates import Slopes
from tests.cost_helpers import linear, quantizer, two_layers

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"value": 0}, "a bound must be a positive, finite number, not 0; no model has a cost of zero"),
    ({"value": -1.5}, "a positive, finite number, not -1.5"),
    ({"value": nan}, "a positive, finite number, not nan"),
    ({"value": inf}, "a positive, finite number, not inf"),
    ({"value": "1%"}, "a bound is a number, not '1%'; text is read by a budget"),
    ({"value": True}, "a bound is a number, not True"),
    ({"value": 10**400}, "a positive, finite number, not inf"),
    ({"value": -(10**400)}, "a positive, finite number, not -inf"),
    ({"value": 1, "base": 16}, "a bound is relative to 32 or 8 bits, not 16"),
    ({"value": 1, "base": 9}, "a bound is relative to 32 or 8 bits, not 9"),
    ({"value": 1, "reference": -1.0}, "a bound cannot refer to a cost of -1"),
    ({"value": 1, "reference": inf}, "a bound cannot refer to a cost of inf"),
    ({"value": 1, "reference": nan}, "a bound cannot refer to a cost of nan"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_a_bound_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Bound(**options)


def test_a_bound_by_default() -> None:
    assert (Bound(3).relative, Bound(3).base, Bound(3).reference) == (False, 32, None)
    assert Bound(3).limit(7.0) == 3
    assert Bound(3, relative=True, base=8, reference=0.0).limit(7.0) == 21
    assert Bound(3) == Bound(3, reference=5.0)  # the same bound of any model


@pytest.mark.parametrize("number", [np.int64(5), np.float32(5), Fraction(5), 5])
def test_numbers_of_any_kind_are_bounds(number: Any) -> None:
    for bound in (Bound(number), (BOPs() <= number).bound):
        assert (bound, type(bound.value)) == (Bound(5.0), float)


# From the string form the same bound is read; without an exponent where that is readable.
WRITTEN = [
    (Bound(0.004, relative=True), "bops <= 0.4%"),
    (Bound(0.5, relative=True, base=8), "bops <= 50% of 8 bits"),
    (Bound(2.5e-7, relative=True), "bops <= 0.000025%"),
    (Bound(2e6), "bops <= 2000000 bop"),
    (Bound(65536), "bops <= 65536 bop"),
    (Bound(123456789012), "bops <= 123456789012 bop"),
    (Bound(999999999999.5), "bops <= 999999999999.5 bop"),
    (Bound(1e12), "bops <= 1E+12 bop"),
    (Bound(1e11), "bops <= 100000000000 bop"),
    (Bound(2e-11), "bops <= 0.00000000002 bop"),
    (Bound(2e-12), "bops <= 2E-12 bop"),
]


@pytest.mark.parametrize(("bound", "text"), WRITTEN)
def test_the_string_form_of_a_constraint(bound: Bound, text: str) -> None:
    constraint = Constraint(BOPs(), bound)
    assert str(constraint) == text
    (again,) = parse_budget(text)
    assert (again.bound, again.scope) == (bound, None)


def test_a_constraint_on_a_part_of_the_model() -> None:
    (constraint,) = parse_budget("bops[encoder.*] <= 50% of 8 bits")
    assert constraint.scope == "encoder.*"
    assert constraint.name == "bops[encoder.*]"
    assert constraint.base == "bops[encoder.*] of 8 bits"
    assert str(constraint) == "bops[encoder.*] <= 50% of 8 bits"
    (spaced,) = parse_budget("bops [ encoder.* ] <= 1 Gbop")
    assert (spaced.scope, spaced.bound) == ("encoder.*", Bound(1e9))
    assert Constraint(BOPs(), Bound(1)).base == "bops of 32 bits"


class Bare(CostModel):
    """A cost that is a mere number."""

    name, unit = "bare", ""

    def node_cost(self, node: NodeFacts, bits: NodeBits) -> float:
        return 1.0


def test_a_cost_without_a_unit_has_none_in_its_string_form() -> None:
    assert str(Constraint(Bare(), Bound(7))) == "bare <= 7"
    state = ConstraintState(Constraint(Bare(), Bound(7)), 5.0, 7.0, 10.0)
    assert str(state) == "bare 5 <= 7"


SHARES = [
    ("25% of 8 bits", 0.25, 8),
    ("25 % of 8 bit", 0.25, 8),
    ("25%of32bits", 0.25, 32),
    ("18%", 0.18, 32),
    ("88% of 32 bits", 0.88, 32),
]


@pytest.mark.parametrize(("text", "value", "base"), SHARES)
def test_shares_of_32_or_8_bits(text: str, value: float, base: int) -> None:
    assert parse_bound(text, BOPs()) == Bound(value, relative=True, base=base)


@pytest.mark.parametrize("text", ["25% of 16 bits", "25% of 8", "25% of bits", "25 of 8 bits"])
def test_shares_of_other_bits_are_refused(text: str) -> None:
    with pytest.raises(BudgetError, match=r"cannot read .* as the bound of 'bops'"):
        parse_bound(text, BOPs())


def test_amounts_are_the_nearest_numbers() -> None:
    assert parse_bound("20 mB", WeightMemory()).value == 0.02
    assert parse_bound("0.1 kB", WeightMemory()).value == 100
    assert parse_bound("1e-3 KiB", WeightMemory()).value == 1.024
    assert parse_bound("1.23456789012345678 byte", WeightMemory()).value == 1.23456789012345678


def test_long_texts_are_cut_in_messages() -> None:
    with pytest.raises(BudgetError) as error:
        parse_bound("1" + "z" * 200, BOPs())
    assert f"cannot read '1{'z' * 79}' as" in str(error.value)
    with pytest.raises(BudgetError) as error:
        parse_budget("y" * 300)
    assert f"cannot read '{'y' * 80}' in the budget '{'y' * 200}';" in str(error.value)


@pytest.mark.parametrize("length", [9_999, 10_000])
def test_texts_up_to_the_limit_are_read(length: int) -> None:
    assert len(parse_budget("bops <= 1".ljust(length))) == 1
    assert parse_bound("1".ljust(length), BOPs()) == Bound(1)
    with pytest.raises(BudgetError, match="at most 10000 characters, not 10001"):
        parse_budget("bops <= 1".ljust(10_001))
    with pytest.raises(BudgetError, match="cannot read '1' as the bound"):
        parse_bound("1".ljust(10_001), BOPs())


def test_references_are_kept_by_what_they_refer_to() -> None:
    budget = parse_budget("bops <= 1%, bops <= 50% of 8 bits, weights <= 64 B, macs <= 9%")
    assert budget.references == {}
    known = budget.referring_to((1000.0, 100.0, 7.0, 50.0))
    assert known == budget
    assert [c.bound.reference for c in known] == [1000, 100, 7, 50]
    # absolute bounds refer to nothing
    references = {"bops of 32 bits": 1000, "bops of 8 bits": 100, "macs of 32 bits": 50}
    assert known.references == references
    again = known.with_references({"bops of 8 bits": 4.0, "weights of 32 bits": 3.0})
    assert [c.bound.reference for c in again] == [None, 4.0, 3.0, None]


def test_budgets_are_joined() -> None:
    bops, weights = BOPs() <= 1, WeightMemory() <= "2 B"
    assert (bops & weights).constraints == (bops, weights)
    assert (bops & Budget((weights,))).constraints == (bops, weights)
    assert str(bops & weights) == "bops <= 1 bop, weights <= 2 byte"
    assert (len(bops & weights), list(bops & weights)) == (2, [bops, weights])
    with pytest.raises(BudgetError, match="the budget bounds 'bops' twice"):
        bops & weights & bops
    assert len(parse_budget("bops <= 1%, bops <= 5, bops <= 9% of 8 bits, bops[a] <= 1%")) == 4


def test_budgets_are_joined_with_what_a_budget_is_read_from() -> None:
    bops = BOPs() <= 1
    for more in ("weights <= 2 B", {"weights": 2}, [WeightMemory() <= 2]):
        assert str(bops & more) == "bops <= 1 bop, weights <= 2 byte"
        assert str(Budget((bops,)) & more) == str(bops & more)
        assert str(more & bops) == str(more & Budget((bops,))) == "weights <= 2 byte, bops <= 1 bop"
    with pytest.raises(BudgetError, match="cannot read a budget from int"):
        bops & 5  # type: ignore[operator]


# `a and b` is b alone: the first bound would be lost without a word.
UNTRUE: list[Callable[[], Any]] = [
    lambda: BOPs() <= 2e6 and WeightMemory() <= 3,
    lambda: (BOPs() <= 2e6) & (WeightMemory() <= 3) and MACs() <= 5,
    lambda: BOPs() <= 2e6 or WeightMemory() <= 3,
    lambda: not (BOPs() <= 2e6),
]


@pytest.mark.parametrize("joined", UNTRUE)
def test_a_bound_is_neither_true_nor_false(joined: Callable[[], Any]) -> None:
    with pytest.raises(BudgetError, match=r'join bounds with & or a comma: Python\'s "and" would'):
        joined()


# Value, limit, reference; whether it holds, the share, and the text.
STATES = [
    ("bops <= 50%", (40, 50, 100), (True, 0.4, "bops 40.0000% <= 50.0000%")),
    ("bops <= 50%", (50, 50, 100), (True, 0.5, "bops 50.0000% <= 50.0000%")),
    ("bops <= 50%", (51, 50, 100), (False, 0.51, "bops 51.0000% > (VIOLATED) 50.0000%")),
    (
        "bops <= 50% of 8 bits",
        (40, 50, 100),
        (True, 0.4, "bops 40.0000% <= 50.0000% of 8 bits"),
    ),
    ("bops <= 50%", (0, 0, 0), (True, 0.0, "bops 0.0000% <= 50.0000%")),
    (
        "bops <= 7",
        (1234567.8, 7, 0),
        (False, 0.0, "bops 1.23457e+06 > (VIOLATED) 7 bop"),
    ),
]


@pytest.mark.parametrize(("text", "numbers", "expected"), STATES)
def test_a_measurement(
    text: str, numbers: tuple[float, float, float], expected: tuple[bool, float, str]
) -> None:
    (constraint,) = parse_budget(text)
    state = ConstraintState(constraint, *numbers)
    assert (state.satisfied, state.relative, str(state)) == expected


FIXED: list[Any] = [
    Bound(1.0),
    Constraint(BOPs(), Bound(1.0)),
    parse_budget("bops <= 1"),
    ConstraintState(Constraint(BOPs(), Bound(1.0)), 1.0, 1.0, 1.0),
    Pruning("q", (1, 2, 1)),
    Operand(Role.WEIGHT, 1, None),
    Stored("w", 1),
    NodeFacts("n", "op"),
    TensorFacts("t", 1, 0, 0),
    QuantizerFacts("q", Role.WEIGHT, 1, (2,), 1),
    GraphFacts((), {}),
    NodeBits((), 0),
    graph_bits(GraphFacts((), {}), {}),
    Allocation("t", 0, 1, 0, 0),
    ArenaPlan(0, ()),
    Row(8, 8, 1.0, None),
    Target("toy", "", "", {}),
    Slopes(*torch.zeros(3, 1)),
]


@pytest.mark.parametrize("value", FIXED, ids=lambda v: type(v).__name__)
def test_facts_never_change(value: Any) -> None:
    for field in fields(value):
        with pytest.raises(FrozenInstanceError):
            setattr(value, field.name, None)


# A weight that two layers read, a bias that shortens with its layer, an activation.
def test_who_reads_which_quantizer() -> None:
    bias = Stored("bias", 3, None, 32, Pruning("m", (1, 3, 1)))
    nodes = (
        linear("a", "w", "x"),
        NodeFacts("square", "aten.mul.Tensor", 3, (Operand(Role.ACTIVATION, 3, "x"),) * 2),
        NodeFacts("b", "aten.linear.default", operands=linear("b", "w", None, tied=True).operands),
        NodeFacts("c", "aten.linear.default", stored=(bias, Stored("s", 1, "w"))),
        NodeFacts(
            "d",
            "aten.linear.default",
            operands=(Operand(Role.ACTIVATION, 3, None, pruning=Pruning("m", (1, 3, 1))),),
        ),
    )
    tensors = (
        TensorFacts("t", 1, 0, 2, "x"),
        TensorFacts("u", 1, 1, 1),
        TensorFacts("v", 1, 3, 3, "x"),
    )
    graph = GraphFacts(nodes, {n: quantizer(n) for n in ("w", "x", "m", "none")}, tensors=tensors)
    assert graph.readers == {"w": (0, 2, 3), "x": (0, 1), "m": (3, 4), "none": ()}
    assert graph.holders == {"w": (), "x": (0, 2), "m": (), "none": ()}
    assert [list(node.quantizers) for node in nodes] == [
        ["w", "x", "w"],
        ["x", "x"],
        ["w"],
        ["w", "m"],
        ["m"],
    ]
    assert [own.tolist() for own in graph.lifetimes] == [[0, 1, 3], [3, 2, 4]]
    assert graph.macs == 12 + 3
    assert graph.batch == 1


def test_what_is_not_counted_is_remarked() -> None:
    assert two_layers().remarks == ()
    graph = GraphFacts((), {}, unknown=("a", "b"), opaque=("m (M)",), assumptions=("x > 0",))
    assert graph.remarks == (
        "not counted (unknown ops): a, b",
        "not quantized (could not be captured, run as they are in float): m (M)",
        "assumed of the values of inputs, and checked whenever it runs: x > 0",
    )


def test_the_string_of_an_error_tells_of_its_result() -> None:
    error = DataError("too short")
    assert (str(error), error.result) == ("too short", None)
    error.result = 0
    assert str(error) == "too short (what training had reached is in this error's `result`)"


KINDS: list[tuple[type[CgmqError], tuple[type[BaseException], ...]]] = [
    (UnknownCostError, (BudgetError, ValueError)),
    (UnknownTargetError, (TargetError, ValueError)),
    (StoppedError, (KeyboardInterrupt,)),
    (CostModelError, (CgmqError,)),
]


@pytest.mark.parametrize(("kind", "bases"), KINDS)
def test_errors_are_what_one_would_catch(
    kind: type[CgmqError], bases: tuple[type[BaseException], ...]
) -> None:
    assert all(issubclass(kind, base) for base in (*bases, CgmqError))
