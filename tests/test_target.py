"""Targets: what is shipped, what is rounded up or split; latency and energy."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.lenet5 import LeNet5
from benchmarks.measure_target import CLOCK, PATTERNS, WIDTHS, as_target, fit
from cgmq_fx.cost_models import (
    Energy,
    Latency,
    NodeBits,
    NodeFacts,
    Operand,
    Role,
    Stored,
    Target,
    load_target,
    parse_budget,
    target_names,
    uniform_bits,
)
from cgmq_fx.cost_models.errors import BudgetError, TargetError
from cgmq_fx.cost_models.target import Row
from cgmq_fx.passes.scheme import Scheme
from tests.cost_helpers import bits, cost, graph, linear, quantized

SHIPPED = ["aie-ml", "bismo", "cortex-m7", "horowitz-45nm", "mpic"]
KINDS = [
    NodeFacts("conv", "aten.conv2d.default", 1),
    NodeFacts("depthwise", "aten.conv2d.default", 1, groups=8),
    NodeFacts("fc", "aten.linear.default", 1),
    NodeFacts("scores", "aten.matmul.default", 1),
]


def test_these_targets_are_shipped() -> None:
    assert target_names() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_target_says_where_its_figures_come_from(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert len(target.source) > 200
    assert target.description


def figure(row: Row) -> float | None:
    return row.picojoules if row.cycles is None else row.cycles


def price(target: Target, weight: int, activation: int, node: NodeFacts = KINDS[0]) -> float:
    found = target.price(node, weight, activation, figure)
    return 0.0 if found is None else found[0]


def falls(target: Target, node: NodeFacts) -> list[tuple[int, int]]:
    """The pairs that cost less than a narrower one."""
    prices = np.array([[price(target, w, a, node) for a in range(33)] for w in range(33)])
    lower = (prices[1:, 1:] < prices[:-1, 1:]) | (prices[1:, 1:] < prices[1:, :-1])
    return [(int(w) + 1, int(a) + 1) for w, a in np.argwhere(lower)]


@pytest.mark.parametrize("node", KINDS, ids=lambda n: n.name)
@pytest.mark.parametrize("name", SHIPPED)
def test_more_bits_never_cost_less(name: str, node: NodeFacts) -> None:
    assert falls(load_target(name), node) == []


PUBLISHED = [
    # 99.1 ms x 216 MHz / (24.7 MOps / 2) = 1.733 cycles; fewer bits are no faster
    ("cortex-m7", 8, 8, 1.73),
    ("cortex-m7", 2, 4, 1.73),
    ("cortex-m7", 16, 8, 2 * 1.73),
    # 6.5, 2.5 and 2.1 MACs per cycle; 3 bits run as 4
    ("mpic", 2, 2, 0.1538),
    ("mpic", 2, 8, 0.4),
    ("mpic", 8, 8, 0.4762),
    ("mpic", 3, 4, 0.2857),
    # bits x bits / 16384, also where a product is split: 32 x 32 is 16 products of 8 x 8
    ("bismo", 1, 1, 1 / 16384),
    ("bismo", 3, 5, 15 / 16384),
    ("bismo", 32, 32, 1024 / 16384),
    # 256 MACs per cycle, 512 with 4-bit weights, whatever the activations
    ("aie-ml", 8, 4, 1 / 256),
    ("aie-ml", 4, 4, 1 / 512),
    ("aie-ml", 2, 8, 1 / 512),
    ("aie-ml", 16, 16, 4 / 256),
    # 0.2 + 0.1, 1.1 + 0.4, 3.7 + 0.9 pJ
    ("horowitz-45nm", 2, 8, 0.3),
    ("horowitz-45nm", 8, 16, 1.5),
    ("horowitz-45nm", 32, 8, 4.6),
]


@pytest.mark.parametrize(("name", "weight", "activation", "expected"), PUBLISHED)
def test_published_figures(name: str, weight: int, activation: int, expected: float) -> None:
    assert price(load_target(name), weight, activation) == pytest.approx(expected)


def target_of(rows: dict[tuple[int, int], float], **options: Any) -> Target:
    """A target with cycles, and as many picojoules, for every kind of op."""
    table = tuple(Row(w, a, c, c) for (w, a), c in rows.items())
    return Target("toy", "A toy.", "Made up.", {"*": table}, **options)


SMALL = target_of({(8, 8): 2.0, (4, 8): 1.5, (4, 4): 1.0})
SLOW_NARROW = target_of({(8, 8): 1.0, (4, 4): 3.0})
EQUAL = target_of(dict.fromkeys([(8, 8), (4, 4), (4, 8), (8, 4)], 1.0))
THIN = target_of({(8, 2): 7.0, (4, 4): 3.5})
CORNERS = target_of({(8, 8): 1.0, (4, 16): 10.0})

RUNS_AS = [
    (SMALL, 8, 8, 2.0, (8, 8)),
    (SMALL, 4, 4, 1.0, (4, 4)),
    (SMALL, 2, 3, 1.0, (4, 4)),
    (SMALL, 4, 5, 1.5, (4, 8)),
    (SMALL, 5, 4, 2.0, (8, 8)),
    # 16 x 8 is 2 products of 8 x 8, 16 x 16 is 4, 9 x 2 is 2 of 8 x 2, which run as 8 x 8
    (SMALL, 16, 8, 2 * 2.0, (8, 8)),
    (SMALL, 16, 16, 4 * 2.0, (8, 8)),
    (SMALL, 9, 2, 2 * 2.0, (8, 8)),
    # 4 x 9 is 2 products of 4 x 8
    (SMALL, 4, 9, 2 * 1.5, (4, 8)),
    # 32 x 32 is 4 x 4 products
    (SMALL, 32, 32, 16 * 2.0, (8, 8)),
    # 8-bit kernels take 4 bits too, and are faster
    (SLOW_NARROW, 4, 4, 1.0, (8, 8)),
    # a pair that the chip can run is not split, although it is wider than 8 x 8
    (CORNERS, 4, 16, 10.0, (4, 16)),
    (CORNERS, 4, 8, 1.0, (8, 8)),
    # 2 products of 8 x 8 would be 2, less than the 10 of 4 x 16, which is narrower
    (CORNERS, 8, 16, 10.0, (8, 8)),
    (CORNERS, 16, 64, 16 * 1.0, (8, 8)),
    # of equal figures the narrowest pair
    (EQUAL, 2, 2, 1.0, (4, 4)),
    (EQUAL, 5, 4, 1.0, (8, 4)),
    (EQUAL, 4, 5, 1.0, (4, 8)),
    (EQUAL, 8, 8, 1.0, (8, 8)),
    (EQUAL, 9, 8, 2.0, (8, 8)),
    # two of 4 x 4 are cheaper than two of 8 x 2
    (THIN, 8, 2, 7.0, (8, 2)),
    (THIN, 8, 4, 7.0, (4, 4)),
    (THIN, 4, 4, 3.5, (4, 4)),
    (THIN, 16, 4, 14.0, (4, 4)),
]


@pytest.mark.parametrize(("target", "weight", "activation", "expected", "pair"), RUNS_AS)
def test_what_a_pair_runs_as(
    target: Target, weight: int, activation: int, expected: float, pair: tuple[int, int]
) -> None:
    found = target.price(KINDS[0], weight, activation, figure)
    assert found is not None
    assert (found[0], (found[1].weight, found[1].activation)) == (expected, pair)


@pytest.mark.parametrize(("weight", "activation"), [(0, 8), (8, 0), (0, 0)])
def test_a_pruned_operand_leaves_nothing_to_do(weight: int, activation: int) -> None:
    assert SMALL.price(KINDS[0], weight, activation, figure) is None


PAIRS = st.tuples(st.integers(1, 32), st.integers(1, 32))
FIGURES = st.floats(1e-6, 1e6)


@given(st.dictionaries(PAIRS, FIGURES, min_size=1, max_size=6))
def test_no_table_makes_more_bits_cheaper(rows: dict[tuple[int, int], float]) -> None:
    assert falls(target_of(rows), KINDS[0]) == []


WIDEST = [
    ([(8, 8), (4, 4)], (8, 8)),
    ([(8, 8), (4, 16)], (8, 8)),  # 8 x 16 would be split
    ([(4, 8)], (4, 8)),
    ([(4, 16), (8, 16)], (8, 16)),
]


@pytest.mark.parametrize(("pairs", "widest"), WIDEST)
def test_the_widest_operands(pairs: list[tuple[int, int]], widest: tuple[int, int]) -> None:
    assert target_of(dict.fromkeys(pairs, 1.0)).widest == widest


def test_the_widest_operands_that_all_kinds_of_ops_take() -> None:
    tables = {"*conv*": (Row(4, 16, 1.0, None),), "*": (Row(8, 8, 1.0, None),)}
    assert replace(SMALL, tables=tables).widest == (4, 8)


def test_grouped_convolutions_and_ops_have_tables_of_their_own() -> None:
    one, two, three = ((Row(8, 8, c, None),) for c in (1.0, 2.0, 3.0))
    target = replace(SMALL, tables={"depthwise.*": three, "*conv*": one, "*linear*": two})
    assert [price(target, 8, 8, node) for node in KINDS[:3]] == [1.0, 3.0, 2.0]
    with pytest.raises(TargetError, match=r"toy has no figures for aten.matmul.default \(scores\)"):
        price(target, 8, 8, KINDS[3])


LAYER = graph(linear("fc", "w", "x"))  # 12 MACs, 12 weights, 3 biases, 4 inputs
TWO_SPEEDS = {(8, 8): 0.5, (2, 8): 0.1}
PER_CHANNEL = graph(linear("fc", "w", "x", meets=((3, 1, 1), (1, 1, 1))), gates={"w": 3})

COSTS = {
    # 12 x 0.5 = 6 cycles of 1 ms; 6 bytes of weights, 12 of biases, 4 of inputs: 22 / 4 = 5.5
    "compute and move": (LAYER, dict(clock=1e3, bytes_per_cycle=4.0), bits(4), 0.0115),
    "compute": (LAYER, dict(clock=1e3), bits(4), 0.006),
    # 12 x 0.1; 3 + 12 + 4 = 19 bytes
    "fewer bits": (LAYER, dict(clock=1e3, bytes_per_cycle=4.0), bits(2), 0.00595),
    # nothing to multiply; 12 + 4 bytes are still moved
    "pruned": (LAYER, dict(clock=1e3, bytes_per_cycle=4.0), bits(0), 0.004),
    # a third of the products runs at 0.1, the rest at 0.5: 12 x 1.1 / 3 = 4.4
    "channels": (PER_CHANNEL, dict(clock=1e3), bits(2, 4, 8), 0.0044),
}


@pytest.mark.parametrize(("layer", "chip", "weight", "expected"), COSTS.values(), ids=COSTS)
def test_latency_by_hand(layer: Any, chip: Any, weight: Any, expected: float) -> None:
    assignment = {"w": weight, "x": bits(8)}
    found = cost(Latency(target_of(TWO_SPEEDS, **chip)), layer, assignment)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("per_byte", "expected"),
    [
        (None, 6.0e-12),  # 12 x 0.5 pJ
        (10.0, 226.0e-12),  # and 10 pJ for each of 22 bytes
    ],
)
def test_energy_by_hand(per_byte: float | None, expected: float) -> None:
    target = target_of(TWO_SPEEDS, picojoules_per_byte=per_byte)
    found = cost(Energy(target), LAYER, {"w": bits(4), "x": bits(8)})
    assert found == pytest.approx(expected, rel=1e-12)


TABLES = {"depthwise.*": 3.0, "*conv*": 1.0, "*linear*": 2.0}
KIND_OF_ITS_OWN = Target(
    "kinds", "", "", {p: (Row(8, 8, c, c),) for p, c in TABLES.items()}, clock=1.0
)


@pytest.mark.parametrize("model", [Latency(KIND_OF_ITS_OWN), Energy(KIND_OF_ITS_OWN)])
def test_every_kind_of_node_is_looked_up_for_itself(model: Latency | Energy) -> None:
    """Of the same model, one after the other: what is remembered of one is not taken for others."""
    found = NodeBits(((1, 8, 8),), 0)
    kinds = [replace(node, macs=10) for node in KINDS[:3]]
    pico = 1e-12 if isinstance(model, Energy) else 1
    costs = [model.node_cost(node, found) for node in (*kinds, *kinds)]
    assert costs == pytest.approx([10 * pico, 30 * pico, 20 * pico] * 2)


# Products by bits; 12 MACs at 0.5, or at 0.1 with 2-bit weights, and none where one is 0.
MIXTURES = [
    (((1, 2, 8), (1, 4, 8)), 12 * (0.1 + 0.5) / 2),
    (((1, 2, 8), (3, 4, 8)), 12 * (0.1 + 3 * 0.5) / 4),
    (((1, 2, 8), (1, 2, 2), (2, 4, 8)), 12 * (2 * 0.1 + 2 * 0.5) / 4),
    (((1, 0, 8), (1, 4, 0), (2, 4, 8)), 12 * 2 * 0.5 / 4),
    (((5, 0, 8),), 0.0),
    ((), 0.0),
    # 16 by 8 bits are two products of 8 by 8
    (((1, 16, 8),), 12 * 2 * 0.5),
]


@pytest.mark.parametrize(("pairs", "cycles"), MIXTURES)
def test_what_a_mixture_of_bits_costs(
    pairs: tuple[tuple[int, int, int], ...], cycles: float
) -> None:
    (node,) = LAYER.nodes
    model = Latency(target_of(TWO_SPEEDS, clock=2.0))
    assert model.node_cost(node, NodeBits(pairs, 0)) == pytest.approx(cycles / 2)


def test_the_mean_of_equals_is_exact() -> None:
    """0.1 x 3 / 3 is rounded to more than 0.1."""
    node = replace(LAYER.nodes[0], macs=1)
    model = Latency(target_of({(4, 8): 0.1}, clock=1.0))
    found = [model.node_cost(node, NodeBits(((n, 4, 8),), 0)) for n in range(1, 50)]
    assert found == [0.1] * 49


def test_products_of_activations_move_both_factors() -> None:
    operands = (Operand(Role.ACTIVATION, 6, "q"), Operand(Role.ACTIVATION, 8, "k"))
    node = NodeFacts("scores", "aten.matmul.default", 24, operands)
    chip = target_of({(8, 8): 1.0}, clock=1.0, bytes_per_cycle=2.0, picojoules_per_byte=3.0)
    found = NodeBits(((1, 4, 8),), 0)
    # 24 products; 6 elements of 4 bits and 8 of 8 are 3 + 8 bytes
    assert Latency(chip).node_cost(node, found) == 24 + 11 / 2
    assert Energy(chip).node_cost(node, found) == pytest.approx((24 + 11 * 3) * 1e-12)


def test_what_only_stores_something_is_moved_and_not_multiplied() -> None:
    node = NodeFacts("table", "aten.embedding.default", stored=(Stored("t", 4, None),))
    chip = target_of({}, clock=2.0, bytes_per_cycle=4.0, picojoules_per_byte=10.0)
    found = NodeBits((), 4 * 32)
    assert Latency(chip).node_cost(node, found) == 16 / 4 / 2
    assert Energy(chip).node_cost(node, found) == pytest.approx(160e-12)
    assert Latency(target_of({}, clock=2.0)).node_cost(node, found) == 0
    assert Energy(target_of({})).node_cost(node, found) == 0


def test_a_table_without_rows_has_no_figures() -> None:
    (node,) = LAYER.nodes
    with pytest.raises(TargetError, match=r"toy has no figure for aten.linear.default \(fc\)"):
        target_of({}).price(node, 8, 8, figure)


def test_shipped_targets_are_read_once() -> None:
    assert load_target("mpic") is load_target("mpic")


LENET_MACS = 4_267_008
LENET = [
    (Latency, "cortex-m7", 8, LENET_MACS * 1.73 / 216e6),  # 34 ms
    (Latency, "cortex-m7", 2, LENET_MACS * 1.73 / 216e6),
    (Latency, "mpic", 2, LENET_MACS * 0.1538 / 250e6),  # 2.6 ms
    (Latency, "bismo", 4, LENET_MACS * 16 / 16384 / 200e6),  # 21 us
    # 582,026 - 618 = 581,408 weights in a byte each, 618 biases in 4; inputs 784, 4608, 1024, 512
    (Latency, "aie-ml", 8, (LENET_MACS / 256 + (581_408 + 2_472 + 6_928) / 64) / 1e9),
    (Energy, "mpic", 8, LENET_MACS * 10.25e-12),  # 44 uJ
    (Energy, "horowitz-45nm", 8, (LENET_MACS * 0.3 + (581_408 + 2_472 + 6_928) * 12.5) * 1e-12),
]


@pytest.mark.parametrize(("model", "name", "width", "expected"), LENET)
def test_lenet5_on_the_shipped_targets(
    model: type[Latency] | type[Energy], name: str, width: int, expected: float
) -> None:
    _, facts = quantized(LeNet5(), torch.zeros(2, 1, 28, 28), Scheme())
    found = cost(model(load_target(name)), facts, uniform_bits(facts, width))
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_mixture_never_costs_more_than_its_widest() -> None:
    # (0.1 + 0.2) / 3 rounds to more than 0.1, which would make 4, 4, 4 cheaper than 2, 4, 4
    model = Latency(target_of({(4, 8): 0.1}, clock=1.0))
    mixed, widest = (
        cost(model, PER_CHANNEL, {"w": w, "x": bits(8)}) for w in (bits(2, 4, 4), bits(4, 4, 4))
    )
    assert mixed == widest


@pytest.mark.parametrize("name", ["latency", "energy"])
def test_without_a_target_the_user_is_told_to_name_one(name: str) -> None:
    with pytest.raises(BudgetError, match=rf"'{name}' is looked up for a chip; pass target="):
        parse_budget(f"bops <= 1%, {name} <= 5%")


def test_bounds_have_units() -> None:
    budget = parse_budget("latency <= 12 ms, energy <= 3 mJ", load_target("mpic"))
    assert [c.bound.value for c in budget] == pytest.approx([0.012, 0.003])


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        (Latency, "horowitz-45nm", "horowitz-45nm has no clock, so latency is not known"),
        (
            Energy,
            "cortex-m7",
            r"cortex-m7 has no picojoules per MAC.* for aten.linear",
        ),
    ],
)
def test_a_figure_that_a_target_lacks(
    model: type[Latency] | type[Energy], name: str, message: str
) -> None:
    with pytest.raises((BudgetError, TargetError), match=message):
        cost(model(load_target(name)), LAYER, {"w": bits(8), "x": bits(8)})


def test_a_target_object_is_taken_as_it_is() -> None:
    assert load_target(SMALL) is SMALL


def test_a_table_fitted_to_exact_times_gives_its_figures() -> None:
    figures = np.array([3e-11, 2e-11, 3e-12, 9e-12, 2e-12, 7e-12, 1e-11])
    loads = np.random.default_rng(0).uniform(1e3, 1e6, (20, len(figures)))
    found = as_target("fit", fit(loads, loads @ figures), "Made up.")
    cycles = [row.cycles for pattern in PATTERNS for row in found.tables[pattern]]
    assert cycles == pytest.approx(figures[:-1] * CLOCK)
    assert found.bytes_per_cycle == pytest.approx(1 / (1e-11 * CLOCK))


def test_moving_is_free_where_the_times_do_not_show_it() -> None:
    kinds = np.eye(len(PATTERNS) * len(WIDTHS))
    loads = np.array([[*row, size] for row, size in product(kinds, (1.0, 2.0))])
    found = as_target("fit", fit(loads, 1.0 / loads[:, -1]), "Made up.")
    assert found.bytes_per_cycle is None
    assert all(row.cycles for rows in found.tables.values() for row in rows)
