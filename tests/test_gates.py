"""The flat vector of gates, and what directions make of it: exact numbers by hand."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cgmq_fx import OptionError
from cgmq_fx.calibrate import RangeTable
from cgmq_fx.cost_models import QuantizerFacts, Role
from cgmq_fx.directions import DIRECTIONS, Direction, GateView, direction_of, speeds
from cgmq_fx.gates import GateLayout, Levels, level_of

FACTS = {
    "a": QuantizerFacts("a", Role.WEIGHT, 1, (2, 4, 8), 12),
    "b": QuantizerFacts("b", Role.WEIGHT, 3, (0, 4, 8, 32), 12),
    "c": QuantizerFacts("c", Role.ACTIVATION, 2, (8,), 7),
}
# A row of noise for all gates, for each of three gates, and for two that share the second of two.
NOISE = {
    "a": torch.tensor([9.0, 1.0, 0.5]),
    "b": torch.tensor([[80.0, 60.0, 40.0], [8.0, 6.0, 4.0], [2.0, 3.0, 1.0], [0.0, 0.0, 0.0]]),
    "c": torch.tensor([[5.0, 7.0]]),
}
ROWS = {
    "b": torch.tensor([0, 1, 2], dtype=torch.int32),
    "c": torch.tensor([1, 1], dtype=torch.int32),
}
DISTORTION = {
    "a": torch.tensor([0.9, 0.3, 0.1]),
    "b": torch.tensor([1.0, 0.2, 0.1, 0.0]),
    "c": torch.tensor([0.4]),
}


def layout(measured: bool = False, without: str = "") -> GateLayout:
    tables = {}
    for name, noise in NOISE.items():
        distortion = DISTORTION[name] if measured and name != without else None
        tables[name] = RangeTable(torch.zeros(len(noise)), noise, 1.0, ROWS.get(name), distortion)
    return GateLayout.of(FACTS, tables)


def test_a_layout_by_hand() -> None:
    found = layout()
    assert found.quantizers == tuple(FACTS.values())
    assert found.starts == (0, 1, 4, 6)
    assert found.owner.tolist() == [0, 1, 1, 1, 2, 2]
    assert found.count.tolist() == [3, 4, 4, 4, 1, 1]
    assert found.widths.tolist() == [[2, 4, 8, 8], [0, 4, 8, 32], [8, 8, 8, 8]]
    assert found.row.tolist() == [0, 1, 2, 3, 5, 5]
    assert found.elements.tolist() == [12, 4, 4, 4, 3.5, 3.5]
    assert found.noise.tolist() == [
        [9, 1, 0.5, 0.5],
        [80, 8, 2, 0],
        [60, 6, 3, 0],
        [40, 4, 1, 0],
        [5, 5, 5, 5],
        [7, 7, 7, 7],
    ]
    assert found.harm is found.noise or torch.equal(found.harm, found.noise)
    assert found.share is None
    assert [(i, q.name, part) for i, q, part in found] == [
        (0, "a", slice(0, 1)),
        (1, "b", slice(1, 4)),
        (2, "c", slice(4, 6)),
    ]


LEVELS: Levels = np.array([1, 0, 2, 3, 0, 0])


def test_levels_are_bits() -> None:
    found = layout()
    assert found.bits_of(1, np.array([3, 0, 1])).tolist() == [32, 0, 4]
    bits = {"a": [4], "b": [0, 8, 32], "c": [8, 8]}
    assert {n: b.tolist() for n, b in found.assignment(LEVELS).items()} == bits
    assert found.widths_at(torch.from_numpy(LEVELS)).tolist() == [4, 0, 8, 32, 8, 8]


def test_slopes_by_hand() -> None:
    found = layout().slopes(torch.from_numpy(LEVELS))
    # gates at 1 of (9, 1, 0.5), 0 of (80, 8, ..), 2 of (60, 6, 3, 0), 3 of (40, 4, 1, 0), 5, 5
    assert found.down.tolist() == [8, 0, 3, 1, 0, 0]
    assert found.up.tolist() == [0.5, 72, 3, 0, 0, 0]
    assert found.change.tolist() == [8, 72, 3, 1, 0, 0]


def test_noise_that_grows_with_the_bits_counts_as_none() -> None:
    table = RangeTable(torch.zeros(3), torch.tensor([1.0, 4.0, 2.0]), 1.0)
    found = GateLayout.of({"a": FACTS["a"]}, {"a": table})
    for level, expected in enumerate([(0, 0, 0), (0, 2, 0), (2, 0, 2)]):
        slopes = found.slopes(torch.tensor([level]))
        assert (float(slopes.down), float(slopes.up), float(slopes.change)) == expected


def test_quantizers_with_a_single_width_have_no_slopes() -> None:
    table = RangeTable(torch.zeros(1), torch.tensor([3.0]), 1.0)
    found = GateLayout.of({"c": FACTS["c"]}, {"c": table})
    slopes = found.slopes(torch.zeros(2, dtype=torch.int64))
    assert [t.tolist() for t in (slopes.down, slopes.up, slopes.change)] == [[0, 0]] * 3


def test_the_loss_is_worth_times_harm() -> None:
    worth = torch.tensor([1.0, 10.0, 100.0, 1000.0, 2.0, 3.0])
    # 1 x 1 + 10 x 80 + 100 x 3 + 1000 x 0 + 2 x 7 + 3 x 7
    assert layout().loss(torch.from_numpy(LEVELS), worth) == 1136
    assert layout().worth(worth) is worth


def test_measured_harm_is_shared_by_the_noise_of_each_row() -> None:
    found = layout(measured=True)
    # of b at 0, 4 and 8 bits: 80, 60, 40 by 60; 8, 6, 4 by 6; 2, 3, 1 by 2; none at 32 bits
    expected = [
        [0.9, 0.3, 0.1, 0.1],
        [4 / 3, 0.2 * 4 / 3, 0.1, 0],
        [1, 0.2, 0.15, 0],
        [2 / 3, 0.2 * 2 / 3, 0.05, 0],
        [0.4 * 5 / 6] * 4,
        [0.4 * 7 / 6] * 4,
    ]
    assert found.harm.tolist() == [pytest.approx(row) for row in expected]
    assert found.share is not None
    # of the lowest width that is not 0
    assert found.share.tolist() == pytest.approx([1, 4 / 3, 1, 2 / 3, 5 / 6, 7 / 6])
    assert torch.equal(found.noise, layout().noise)


def test_rows_share_alike_where_there_is_no_noise() -> None:
    facts = {"b": QuantizerFacts("b", Role.WEIGHT, 2, (0, 8), 2)}
    rows = torch.tensor([0, 1], dtype=torch.int32)
    noise = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    table = RangeTable(torch.zeros(2), noise, 1.0, rows, torch.tensor([0.5, 0.25]))
    found = GateLayout.of(facts, {"b": table})
    assert found.harm.tolist() == [[0.5, 0.25], [0.5, 0.25]]
    assert found.share is not None
    assert found.share.tolist() == [1, 1]


def test_a_pruned_width_alone_is_the_lowest() -> None:
    facts = {"b": QuantizerFacts("b", Role.WEIGHT, 2, (0,), 2)}
    rows = torch.tensor([0, 1], dtype=torch.int32)
    table = RangeTable(torch.zeros(1), torch.tensor([[1.0, 3.0]]), 1.0, rows, torch.tensor([1.0]))
    share = GateLayout.of(facts, {"b": table}).share
    assert share is not None
    assert share.tolist() == [0.5, 1.5]


def test_what_a_quantizer_is_worth_is_shared_by_sensitivity() -> None:
    found = layout(measured=True)
    worth = found.worth(torch.tensor([7.0, 1.0, 2.0, 3.0, 1.0, 3.0]))
    # of b: 1 x 4/3 + 2 x 1 + 3 x 2/3 = 16/3; of c, where both have the row of 7/6: 4 x 7/6
    whole = [1, *(n / (16 / 3) for n in (1, 2, 3)), *(n / (4 * 7 / 6) for n in (1, 3))]
    assert worth.tolist() == pytest.approx(whole)
    assert worth.dtype == torch.float32
    nothing = found.worth(torch.zeros(6))
    assert nothing.tolist() == pytest.approx([1, *[1 / 3] * 3, *[3 / 7] * 2])


@pytest.mark.parametrize("without", FACTS)
def test_where_one_was_not_measured_noise_counts_for_all(without: str) -> None:
    found = layout(measured=True, without=without)
    assert found.share is None
    assert torch.equal(found.harm, found.noise)


def test_levels_of_gates() -> None:
    gates = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.0001, 3.0, 3.5, 9.0, 0.0, 0.5])
    count = torch.tensor([3, 3, 3, 3, 3, 3, 3, 3, 3, 1])
    assert level_of(gates, count).tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 0, 0]


def view(**changes: Tensor) -> GateView:
    """Two gates: the second one matters more, and costs more."""
    given = {
        "rows": torch.tensor([[2.0, 6.0], [1.0, 4.0], [5.0, 3.0]]),
        "sensitivity": torch.tensor([1.0, 2.0]),
        "loss_down": torch.tensor([4.0, 5.0]),
        "loss_up": torch.tensor([6.0, 1.0]),
        "cost_down": torch.tensor([0.5, 0.25]),
        "cost_up": torch.tensor([0.125, 2.0]),
        "change": torch.tensor([8.0, 3.0]),
        "elements": torch.tensor([10.0, 20.0]),
    }
    return GateView(**(given | changes))


EAGERNESS: dict[str, tuple[list[float], list[float], list[float]]] = {
    # 0.5 / 4, 0.25 / 5; 6 / 0.125, 1 / 2; 2 / 8, 6 / 3
    "marginal": ([0.125, 0.05], [48, 0.5], [0.25, 2]),
    # 2 and 6; 4 x 10, 36 x 20
    "gradient": ([1 / 2, 1 / 6], [2, 6], [40, 720]),
    # 2 + 1, 6 + 4
    "gradient+magnitude": ([1 / 3, 1 / 10], [3, 10], [40, 720]),
    "gradient*magnitude": ([1 / 5, 1 / 3], [5, 3], [40, 720]),
}


@pytest.mark.parametrize(("name", "expected"), EAGERNESS.items())
def test_directions_by_hand(
    name: str, expected: tuple[list[float], list[float], list[float]]
) -> None:
    own = DIRECTIONS[name]()
    fall, rise, sensitivity = expected
    assert own.fall(view()).tolist() == pytest.approx(fall)
    assert own.rise(view()).tolist() == pytest.approx(rise)
    assert own.sensitivity(view()).tolist() == pytest.approx(sensitivity)
    assert own.measured == (name == "marginal")


@pytest.mark.parametrize("name", DIRECTIONS)
def test_directions_are_finite_where_nothing_is_lost_or_taken(name: str) -> None:
    none = torch.zeros(2)
    empty = view(
        rows=torch.zeros(3, 2), loss_down=none, cost_up=none, change=none, cost_down=torch.ones(2)
    )
    own = DIRECTIONS[name]()
    for found in (own.fall(empty), own.rise(empty), own.sensitivity(empty)):
        assert bool(found.isfinite().all())
    assert float(own.fall(empty).min()) > 1e29
    assert own.sensitivity(empty).tolist() == [0, 0]


@pytest.mark.parametrize("missing", ["fall", "rise", "sensitivity"])
def test_a_direction_of_ones_own_has_three_rules(missing: str) -> None:
    rules = {n: lambda self, view: view.rows[0] for n in ("fall", "rise", "sensitivity")}
    whole: type[Direction] = type("Whole", (Direction,), {"name": "whole", **rules})
    assert whole().fall(view()).tolist() == [2, 6]
    assert not whole.measured
    del rules[missing]
    part = type("Part", (Direction,), {"name": "part", **rules})
    with pytest.raises(TypeError, match=f"abstract method '?{missing}"):
        part()


def test_an_unknown_direction_is_refused() -> None:
    message = "there is no direction 'up'; known are marginal, gradient, gradient"
    with pytest.raises(OptionError, match=message):
        direction_of("up")


@pytest.mark.parametrize(
    ("eagerness", "slowest", "expected"),
    [
        ([], 0.25, []),
        ([5.0], 0.0, [0.5]),
        ([-3.0, 1.0, 1.0], 0.0, [0.0, 0.5, 0.5]),
        ([1.0, 2.0, 6.0], 0.0, [1 / 3, 1 / 2, 3 / 4]),
        ([0.0, 0.0, 6.0], 0.5, [0.5, 0.5, 1.0]),
    ],
)
def test_speeds_around_the_median(
    eagerness: list[float], slowest: float, expected: list[float]
) -> None:
    assert speeds(torch.tensor(eagerness), slowest).tolist() == pytest.approx(expected)
