"""The projection: it satisfies, it leaves nothing unused, and it is close to the best there is."""

import random
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cgmq_fx import BOPs, Budget, Scheme
from cgmq_fx.calibrate import RangeTable
from cgmq_fx.cost_models import (
    GraphFacts,
    Ledger,
    NodeFacts,
    Operand,
    QuantizerFacts,
    Role,
    lowest_bits,
)
from cgmq_fx.gates import GateLayout, Levels
from cgmq_fx.projection import Projection
from tests.random_nets import constraint, ends, facts

SCHEMES = (
    Scheme(),
    Scheme((2, 3, 5, 8), weights="channel", activations="channel"),
    Scheme((0, 2, 4, 8), activations="channel"),
)


def layout_of(graph: GraphFacts, rng: random.Random, own: bool = False) -> GateLayout:
    """The gates of a graph, with noise that quarters and more with every level.

    Args:
        graph: Whose gates.
        rng: What the noise is drawn from.
        own: Whether it is another one for every gate.
    """
    tables = {}
    for name, q in graph.quantizers.items():
        power = 10 ** rng.uniform(-2, 1)
        noise = [12 * power if b == 0 else power / (2**b - 1) ** 2 for b in q.bit_widths]
        noise = [0.0 if b == 32 else n for b, n in zip(q.bit_widths, noise, strict=True)]
        rows = torch.arange(q.gates, dtype=torch.int32) if own else None
        each = [[n * rng.uniform(0.7, 1.4) for _ in range(q.gates)] for n in noise]
        table = torch.tensor(each if own else noise)
        tables[name] = RangeTable(torch.zeros(len(noise)), table, power, rows)
    return GateLayout.of(graph.quantizers, tables)


def project(
    layout: GateLayout,
    budget: Budget,
    start: Levels,
    weight: np.ndarray[tuple[int], np.dtype[np.float64]],
    graph: GraphFacts,
) -> Levels:
    ledger = Ledger(graph, budget, layout.assignment(start))
    return Projection(layout, ledger, start.copy(), weight).run()


def raised(layout: GateLayout, levels: Levels) -> Iterator[Levels]:
    """The levels with one gate one level higher, gate by gate."""
    for gate in np.flatnonzero(levels < layout.count.numpy() - 1):
        more = levels.copy()
        more[gate] += 1
        yield more


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 19),
    st.sampled_from(SCHEMES),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.sampled_from(["top", "bottom", "random"]),
    st.integers(0, 2**32 - 1),
)
def test_result_satisfies_and_no_gate_can_be_raised(
    seed: int, scheme: Scheme, shares: tuple[float, float], start: str, noise: int
) -> None:
    graph, rng = facts(seed, scheme), random.Random(noise)
    limits = []
    for name, share in zip(("bops", "weights"), shares, strict=True):
        low, high, reference = ends(graph, name)
        limits.append(constraint(name, max(low + share * (high - low), 1.0), reference, False))
    budget, layout = Budget(tuple(limits)), layout_of(graph, rng, own=True)
    count = layout.count.numpy()
    starts = {"top": count - 1, "bottom": count * 0, "random": count * rng.random()}
    weight = np.array([10 ** rng.gauss(0, 2) for _ in count])
    first = starts[start].astype(np.int64)
    projection = Projection(layout, Ledger(graph, budget, layout.assignment(first)), first, weight)
    levels = projection.run()
    whole = Ledger(graph, budget, layout.assignment(levels))
    assert whole.satisfied
    assert projection.ledger.totals == whole.totals
    for more in raised(layout, levels):
        assert not Ledger(graph, budget, layout.assignment(more)).satisfied


WIDTHS = (2, 3, 4, 6)
LAYERS = 4


def chain(rng: random.Random) -> tuple[GraphFacts, list[int]]:
    """Layers whose weight and activation have a gate each, and their MACs."""
    macs = [round(10 ** rng.uniform(1, 4)) for _ in range(LAYERS)]
    nodes, own = [], {}
    for i, count in enumerate(macs):
        weight, activation = f"w{i}", f"a{i}"
        operands = (
            Operand(Role.WEIGHT, count, weight),
            Operand(Role.ACTIVATION, count, activation),
        )
        nodes.append(NodeFacts(f"n{i}", "aten.linear.default", count, operands))
        own[weight] = QuantizerFacts(weight, Role.WEIGHT, 1, WIDTHS, count)
        own[activation] = QuantizerFacts(activation, Role.ACTIVATION, 1, WIDTHS, count)
    return GraphFacts(tuple(nodes), own), macs


ALL = np.array(list(product(range(len(WIDTHS)), repeat=2 * LAYERS)))


@pytest.mark.parametrize("start", [len(WIDTHS) - 1, 0])
def test_loss_is_close_to_that_of_the_best_of_all_choices(start: int) -> None:
    gaps = []
    for seed in range(40):
        rng = random.Random(seed)
        graph, macs = chain(rng)
        bits = np.array(WIDTHS)[ALL]
        cost = (bits[:, ::2] * bits[:, 1::2] * np.array(macs)).sum(1)
        limit = float(rng.uniform(cost.min() * 1.2, cost.max() / 2))
        layout, weight = layout_of(graph, rng), np.array([10 ** rng.gauss(0, 1) for _ in bits[0]])
        noise = layout.noise.double().numpy()
        losses = (noise[np.arange(2 * LAYERS), ALL] * weight).sum(1)
        first = np.full(2 * LAYERS, start)
        levels = project(layout, Budget((BOPs() <= limit,)), first, weight, graph)
        reached = losses[(levels == ALL).all(1)][0]
        assert cost[(levels == ALL).all(1)][0] <= limit
        assert reached <= losses[0]
        gaps.append(reached / losses[cost <= limit].min() - 1)
    assert min(gaps) >= 0
    assert np.mean(gaps) < 0.03
    assert np.mean(np.array(gaps) < 1e-9) > 0.95


@pytest.mark.parametrize("scheme", SCHEMES)
def test_at_the_floor_everything_is_at_its_lowest(scheme: Scheme) -> None:
    graph = facts(3, scheme)
    low, _, reference = ends(graph, "weights")
    budget = Budget((constraint("weights", low, reference, relative=False),))
    layout = layout_of(graph, random.Random(0))
    weight = np.ones(len(layout.count))
    levels = project(layout, budget, layout.count.numpy() - 1, weight, graph)
    found = layout.assignment(levels)
    lowest = lowest_bits(graph)
    stored = {n for n, q in graph.quantizers.items() if q.role is Role.WEIGHT}
    assert all((found[n] == lowest[n]).all() for n in stored)
    assert any((found[n] > lowest[n]).all() for n in graph.quantizers.keys() - stored)


def test_gates_that_matter_keep_more_bits() -> None:
    graph = facts(1, Scheme(weights="element"))
    layout = layout_of(graph, random.Random(0))
    low, high, reference = ends(graph, "weights")
    budget = Budget((constraint("weights", low + 0.3 * (high - low), reference, False),))
    weight = np.array([10 ** random.Random(i).uniform(-6, 6) for i in range(len(layout.count))])
    levels = project(layout, budget, layout.count.numpy() - 1, weight, graph)
    for _, facts_of, part in layout:
        if facts_of.gates >= 9:
            order = levels[part][np.argsort(weight[part])]
            assert (np.diff(order) >= 0).mean() > 0.9
            assert order[0] < order[-1]
