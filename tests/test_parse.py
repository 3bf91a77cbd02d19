"""Every form of a budget that is read, and every one that is refused."""

import re
from contextlib import suppress
from math import inf, nan
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cgmq_fx.cost_models import (
    BOPs,
    Bound,
    Budget,
    Constraint,
    CostModel,
    MACs,
    NodeBits,
    NodeFacts,
    WeightMemory,
    parse_bound,
    parse_budget,
)
from cgmq_fx.cost_models.errors import BudgetError, UnknownCostError


class Energy(CostModel):
    """A user's model in a unit that pint knows."""

    name = "energy"
    unit = "joule"

    def node_cost(self, node: NodeFacts, bits: NodeBits) -> float:
        return 0.0


class Area(Energy):
    """A user's model in a unit of its own."""

    name = "area"
    unit = "slice"


BOUNDS: list[tuple[float | str | Bound, CostModel, float, bool]] = [
    ("0.4%", BOPs(), 0.004, True),
    ("0.7 %", BOPs(), 0.007, True),  # 0.7 / 100 is another float than 0.007
    ("250%", BOPs(), 2.5, True),
    (2e6, BOPs(), 2e6, False),
    (2_000_000, BOPs(), 2e6, False),
    ("2e6", BOPs(), 2e6, False),
    (" .5E+3 ", BOPs(), 500, False),
    ("+7.", BOPs(), 7, False),
    ("2k", BOPs(), 2e3, False),
    ("2K", BOPs(), 2e3, False),
    ("2M", BOPs(), 2e6, False),
    ("1.5 G", BOPs(), 1.5e9, False),
    ("1T", BOPs(), 1e12, False),
    ("3 bop", BOPs(), 3, False),
    ("3 bops", BOPs(), 3, False),
    ("2 GBOPs", BOPs(), 2e9, False),
    ("2 Mbop", BOPs(), 2e6, False),
    ("4 MMAC", MACs(), 4e6, False),
    ("64 KiB", WeightMemory(), 64 * 1024, False),
    ("1 MiB", WeightMemory(), 1024 * 1024, False),
    ("64 kB", WeightMemory(), 64_000, False),
    ("1.5MB", WeightMemory(), 1.5e6, False),
    ("8 kbit", WeightMemory(), 8000 / 8, False),
    ("3 bytes", WeightMemory(), 3, False),
    ("2M", WeightMemory(), 2e6, False),
    ("2 mJ", Energy(), 0.002, False),
    ("1 kWh", Energy(), 3.6e6, False),
    ("5 kslice", Area(), 5000, False),
    ("5 slices", Area(), 5, False),
    (Bound(0.5, relative=True), BOPs(), 0.5, True),
]


@pytest.mark.parametrize(("text", "model", "value", "relative"), BOUNDS)
def test_a_bound_is_read(
    text: float | str | Bound, model: CostModel, value: float, relative: bool
) -> None:
    found = parse_bound(text, model)
    assert found.relative == relative
    assert found.value == pytest.approx(value, rel=1e-15)


def test_shares_are_the_nearest_floats() -> None:
    found = [parse_bound(f"{n / 10}%", BOPs()).value for n in range(1, 1000)]
    assert found == [float(f"{n}e-3") for n in range(1, 1000)]


ONE = [("bops", 0.004, True)]
TWO = [("bops", 0.004, True), ("weights", 65536, False)]
BUDGETS: list[tuple[Any, list[tuple[str, float, bool]]]] = [
    ("bops <= 0.4%", ONE),
    ("bops<=0.4%", ONE),
    ("  bops \n<=\t0.4 % ", ONE),
    ("bops ≤ 0.4%", ONE),
    ("bops <= 0.4%, weights <= 64 KiB", TWO),
    ("bops <= 0.4%; weights <= 64KiB", TWO),
    ("bops <= 0.4% and weights <= 64 KiB", TWO),
    ("bops <= 0.4% & weights <= 65536", TWO),
    ("bops <= 0.4%, bops <= 2M", [*ONE, ("bops", 2e6, False)]),
    ({"bops": "0.4%"}, ONE),
    ({"bops": "0.4%", "weights": 65536}, TWO),
    ({"bops": Bound(0.004, relative=True)}, ONE),
    (BOPs() <= "0.4%", ONE),
    (Constraint(BOPs(), Bound(0.004, relative=True)), ONE),
    ([BOPs() <= "0.4%", WeightMemory() <= "64 KiB"], TWO),
    ((BOPs() <= "0.4%") & (WeightMemory() <= 65536), TWO),
    ((c for c in [BOPs() <= "0.4%"]), ONE),
    (Budget((BOPs() <= "0.4%",)), ONE),
    (Budget((BOPs() <= "0.4%",)) & (WeightMemory() <= 65536), TWO),
    (Budget((BOPs() <= "0.4%",)) & Budget((WeightMemory() <= 65536,)), TWO),
]


def _label(value: Any) -> str:
    """The same in every process: without addresses of objects."""
    return re.sub(r" (object )?at 0x\w+", "", str(value))


@pytest.mark.parametrize(("budget", "expected"), BUDGETS, ids=_label)
def test_a_budget_is_read(budget: Any, expected: list[tuple[str, float, bool]]) -> None:
    found = parse_budget(budget)
    assert [(c.model.name, c.bound.value, c.bound.relative) for c in found] == expected
    assert len(found) == len(expected)


def test_a_limit_is_absolute_or_a_share_of_the_reference() -> None:
    relative, absolute = parse_budget("bops <= 0.4%, weights <= 10").constraints
    assert relative.bound.limit(1000) == 4
    assert absolute.bound.limit(1000) == 10


POSITIVE = "a bound must be a positive, finite number, not "
REFUSED: list[tuple[Any, str]] = [
    (
        "bopz <= 1%",
        r"no cost model named 'bopz'; did you mean 'bops'\? Known are .*bops.*register_cost_model",
    ),
    ({"bopz": 1}, "no cost model named 'bopz'"),
    ({3: 1}, "no cost model named '3'"),
    ("", "cannot read '' in the budget ''; each part is a cost"),
    ("bops", "cannot read 'bops' in the budget"),
    ("0.4%", "cannot read '0.4%' in the budget"),
    ("bops <= 1%,", "cannot read '' in the budget 'bops <= 1%,'"),
    ("bops >= 1%", "cannot read 'bops >= 1%'"),
    ("bops == 1%", "cannot read 'bops == 1%'"),
    ("bops <= 1% <= 2%", "cannot read"),
    ("1% >= bops", "cannot read"),
    ("bops < 1%", 'write "<=" instead of "<" in \'bops < 1%\''),
    ("bops <= much", "cannot read 'much' as the bound of 'bops'; expected a quantity such as \"0"),
    ("bops <= 1 2", "cannot read '1 2' as the bound of 'bops'"),
    ("bops <= 1..2", "cannot read '1..2' as the bound"),
    ("bops <= 1,5%", "cannot read '5%' in the budget"),
    ({"bops": ""}, "cannot read '' as the bound of 'bops'"),
    ("weights <= 1 /", "cannot read '1 /' as the bound"),
    ("weights <= 1 %%", "cannot read '1 %%' as the bound"),
    ("bops <= 0", POSITIVE + "0;"),
    ("bops <= 0%", POSITIVE + "0;"),
    ("bops <= -1%", POSITIVE + "-0.01"),
    ("bops <= 1e-999", POSITIVE + "0;"),
    ("bops <= nan", POSITIVE + "nan"),
    ("bops <= nan%", POSITIVE + "nan"),
    ("bops <= inf", POSITIVE + "inf"),
    ("bops <= -inf%", POSITIVE + "-inf"),
    ("bops <= 1e999", POSITIVE + "inf"),
    ("bops <= 1e99999999%", POSITIVE + "inf"),
    ({"bops": nan}, POSITIVE + "nan"),
    ({"bops": inf}, POSITIVE + "inf"),
    ({"bops": -3}, POSITIVE + "-3"),
    ({"bops": 0}, POSITIVE + "0"),
    ({"bops": 10**400}, POSITIVE + "inf"),
    (
        "bops <= 64 KiB",
        "'KiB' does not fit 'bops', which is measured in bop; give the bound in bop",
    ),
    ("weights <= 2 GBOPs", "the unit 'GBOPs' does not fit 'weights', which is measured in byte"),
    ("weights <= 20 KB", r"'KB' does not fit .* byte; write KiB for powers of 1024 or kB for"),
    ("weights <= 2 mib", "write MiB for powers of 1024 or MB for powers of 1000, or give"),
    ("weights <= 5 parrots", "the unit 'parrots' does not fit"),
    ("weights <= 3 kg", "the unit 'kg' does not fit"),
    ("weights <= 3 degC", "the unit 'degC' does not fit"),
    ("weights <= 3 radian", "the unit 'radian' does not fit"),  # pint: 1 rad = 1 bit
    ("weights <= 3 ppm", "the unit 'ppm' does not fit"),
    ("weights <= 1 byte/byte", "the unit 'byte/byte' does not fit"),
    ({"bops": True}, "the bound of 'bops' must be a number or a string, not True"),
    ({"bops": None}, "must be a number or a string, not None"),
    ({"bops": [1]}, r"must be a number or a string, not \[1\]"),
    ("bops <= 1%, bops <= 2%", "the budget bounds 'bops' twice; keep the smaller bound"),
    ([BOPs() <= 1, BOPs() <= 2], "bounds 'bops' twice"),
    ({}, 'the budget is empty; give at least one bound, such as "bops <= 1%"'),
    ([], "the budget is empty"),
    (["bops <= 1%"], "cannot read a budget from list; give a string such as"),
    (3, "cannot read a budget from int"),
    (None, "cannot read a budget from NoneType"),
    (b"bops <= 1%", "cannot read a budget from bytes"),
    (BOPs(), "cannot read a budget from BOPs"),
    ("bops <= 1" + "0" * 10_000, "at most 10000 characters, not 10009"),
    ({"bops": "1" * 10_001}, "cannot read '1111"),
]


@pytest.mark.parametrize(("budget", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_a_budget_is_refused(budget: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        parse_budget(budget)


def test_only_an_unknown_name_is_an_unknown_cost() -> None:
    with pytest.raises(UnknownCostError):
        parse_budget("bopz <= 1%")
    with pytest.raises(BudgetError) as malformed:
        parse_budget("bops <= x")
    assert not isinstance(malformed.value, UnknownCostError)


NUMBERS = st.one_of(
    st.floats().map(str), st.decimals().map(str), st.integers().map(str), st.text(max_size=5)
)
UNITS = st.one_of(
    st.sampled_from(
        ["%", "KiB", "MB", "kbit", "G", "bop", "µs", "byte/s", "in", "% of 8 bits", "%%", "/"]
    ),
    st.text("kMGTBbity%/µ ", max_size=6),
)
CLAUSES = st.builds(
    "{} {} {}{}".format,
    st.sampled_from(["bops", "macs[a*]", "weights", "x", ""]),
    st.sampled_from(["<=", "≤", "<", ">", ""]),
    NUMBERS,
    UNITS,
)
TEXTS = st.one_of(st.text(), st.lists(CLAUSES, max_size=3).map(", ".join))


@pytest.mark.parametrize("value", ["1%", None, [1]])
def test_a_bound_is_a_number(value: Any) -> None:
    with pytest.raises(BudgetError, match="a bound is a number"):
        Bound(value)


@settings(deadline=None)
@given(TEXTS)
def test_no_text_raises_anything_but_a_budget_error(text: str) -> None:
    with suppress(BudgetError):
        assert all(0 < c.bound.value < inf for c in parse_budget(text))


POSITIVES = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)


@settings(deadline=None)
@given(value=POSITIVES, relative=st.booleans(), model=st.sampled_from([BOPs(), WeightMemory()]))
def test_the_string_form_reads_back_as_the_same_bound(
    value: float, relative: bool, model: CostModel
) -> None:
    budget = Budget((Constraint(model, Bound(value, relative)),))
    again = parse_budget(str(budget))
    assert [c.bound for c in again] == [Bound(value, relative)]


@pytest.mark.parametrize(
    "text", ["bops <= 0.4%", "bops <= 0.390625%, weights <= 65536 byte", "macs <= 2000000 mac"]
)
def test_a_plain_string_form_is_stable(text: str) -> None:
    assert str(parse_budget(text)) == text
