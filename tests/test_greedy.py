"""The moves of the projection, one by one: by hand, and against a plain greedy search."""

import random
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cgmq_fx import Budget, Scheme, projection
from cgmq_fx.calibrate import RangeTable
from cgmq_fx.cost_models import (
    ActivationMemory,
    GraphFacts,
    Ledger,
    NodeFacts,
    QuantizerFacts,
    Role,
    Stored,
    TensorFacts,
    parse_budget,
)
from cgmq_fx.gates import GateLayout, Levels
from cgmq_fx.projection import Projection, _Falls
from tests.cost_helpers import graph, linear
from tests.random_nets import constraint, ends, facts
from tests.test_projection import layout_of

WIDTHS = (2, 4, 8)
NOISE = (9.0, 1.0, 0.0)

Floats = npt.NDArray[np.float64]


def stored(*sizes: int) -> GraphFacts:
    """Weights that take so many bytes per bit."""
    names = {f"w{i}": size for i, size in enumerate(sizes)}
    nodes = (
        NodeFacts(n, "aten.linear.default", stored=(Stored(n, 8 * size, n),))
        for n, size in names.items()
    )
    own = {n: QuantizerFacts(n, Role.WEIGHT, 1, WIDTHS, 8 * s) for n, s in names.items()}
    return GraphFacts(tuple(nodes), own)


def begun(graph: GraphFacts, budget: Budget, levels: list[int], worth: list[float]) -> Projection:
    """A projection from these levels; the noise at 2, 4 and 8 bits is 9, 1 and 0."""
    table = RangeTable(torch.zeros(3), torch.tensor(NOISE), 1.0)
    layout = GateLayout.of(graph.quantizers, dict.fromkeys(graph.quantizers, table))
    start = np.array(levels, dtype=np.int64)
    ledger = Ledger(graph, budget, layout.assignment(start))
    return Projection(layout, ledger, start, np.array(worth))


# One byte per bit and two: 8 and 16 bytes at the top.
LOWERED = [
    ("weights <= 24", [1.0, 1.5], [2, 2]),
    # 8 to 4 bits loses 1 for 4 bytes, or 1.5 for 8
    ("weights <= 23", [1.0, 1.5], [2, 1]),
    ("weights <= 16", [1.0, 1.5], [2, 1]),
    # then the other 1 for 4 bytes; the same again would lose 12 for 4
    ("weights <= 15", [1.0, 1.5], [1, 1]),
    ("weights <= 12", [1.0, 1.5], [1, 1]),
    # 8 for 2 bytes before 12 for 4
    ("weights <= 11", [1.0, 1.5], [1, 0]),
    ("weights <= 11", [1.0, 3.0], [0, 1]),
    ("weights <= 6", [1.0, 1.5], [0, 0]),
    # 2.5 for 8 bytes is more than 1 for 4
    ("weights <= 20", [1.0, 2.5], [1, 2]),
    # only what is violated counts, here a bound on the second alone
    ("weights <= 24, weights[w1] <= 8", [0.01, 1.5], [2, 1]),
    # 1 for 4 of 12 and 4 of 8 bytes, or 1.1 for 8 of 12
    ("weights <= 12, weights[w0] <= 7", [1.0, 1.1], [1, 1]),
]


@pytest.mark.parametrize(("text", "worth", "expected"), LOWERED)
def test_what_falls_by_hand(text: str, worth: list[float], expected: list[int]) -> None:
    found = begun(stored(1, 2), parse_budget(text), [2, 2], worth)
    found.lower()
    assert found.levels.tolist() == expected
    assert found.ledger.satisfied


FILLED = [
    (6, [1.0, 1.5], [0, 0]),
    # 2 to 4 bits saves 8 for 2 bytes, or 12 for 4
    (8, [1.0, 1.5], [1, 0]),
    (11, [1.0, 1.5], [1, 0]),
    (10, [1.0, 2.5], [0, 1]),
    (12, [1.0, 1.5], [1, 1]),
    # then 1 for 4 bytes, or 1.5 for 8
    (16, [1.0, 1.5], [2, 1]),
    (16, [1.0, 2.5], [2, 1]),
    (20, [1.0, 2.5], [1, 2]),
    (24, [1.0, 1.5], [2, 2]),
]


@pytest.mark.parametrize(("limit", "worth", "expected"), FILLED)
def test_what_rises_by_hand(limit: int, worth: list[float], expected: list[int]) -> None:
    found = begun(stored(1, 2), parse_budget(f"weights <= {limit}"), [0, 0], worth)
    found.fill()
    assert found.levels.tolist() == expected


def test_only_the_moves_that_are_named_rise() -> None:
    found = begun(stored(1, 2, 1), parse_budget("weights <= 100"), [0, 0, 1], [1.0] * 3)
    found.fill([(1, 0), (2, 0)])
    assert found.levels.tolist() == [0, 2, 1]


EXCHANGED = [
    # both at 4 bits take as much, and lose 2.5 instead of 13.5
    ((1, 2), [2, 0], 12, [1.0, 1.5], [1, 1]),
    ((1, 2), [2, 0], 12, [100.0, 1.5], [2, 0]),
    # of 13.5, 11.9 for 12 saves 0.7 %, 11.99 for 12 saves less than 0.1 %
    ((1, 2), [2, 0], 12, [11.9, 1.5], [1, 1]),
    ((1, 2), [2, 0], 12, [11.99, 1.5], [2, 0]),
    # 8 is saved by 4 bits and 9 by 8, at the price of 8.4: two levels at once
    ((6, 1), [1, 0], 26, [1.05, 1.0], [0, 2]),
    # where two have to fall for one: 8 x 1.5 for 1 + 2, and 4 bytes for 4
    ((1, 1, 4), [2, 2, 0], 24, [1.0, 2.0, 1.5], [1, 1, 1]),
    # of the two that could, the one that loses less: 2 is left of 20 bytes
    ((1, 1, 2), [2, 2, 0], 20, [2.0, 1.0, 1.5], [2, 1, 1]),
    # 0.9 is lost for 12 bytes, which are worth 9 + 1
    ((1, 2, 1), [0, 2, 1], 22, [1.0, 0.1, 1.0], [2, 0, 2]),
    # 8 bytes are missing: the second falls for 4, then the third for 16, and the second may rise
    ((2, 1, 4), [1, 2, 2], 48, [5.0, 0.1, 1.0], [2, 2, 1]),
    # 0.7 + 2.9 for 3.602 would save too little, but 0.7 is given back
    ((2, 1, 4), [1, 2, 2], 48, [3.602, 0.7, 2.9], [2, 2, 1]),
]


@pytest.mark.parametrize(("sizes", "levels", "limit", "worth", "expected"), EXCHANGED)
def test_what_is_exchanged_by_hand(
    sizes: tuple[int, ...],
    levels: list[int],
    limit: int,
    worth: list[float],
    expected: list[int],
) -> None:
    found = begun(stored(*sizes), parse_budget(f"weights <= {limit}"), levels, worth)
    found.exchange()
    assert found.levels.tolist() == expected
    whole = Ledger(found.ledger.graph, found.ledger.budget, found.layout.assignment(found.levels))
    assert found.ledger.totals == whole.totals


def test_exchanges_end_with_the_work_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "_WORK", 0)
    found = begun(stored(1, 2), parse_budget("weights <= 12"), [2, 0], [1.0, 1.5])
    found.exchange()
    assert found.levels.tolist() == [2, 0]


# Two tensors of 46 bytes at 8 bits, each alone at the peak, and one that has no part in it. Bound,
# worth, and where gates are when the bound holds and when what fell too far has risen again.
PEAKS = [
    (46.0, [0.3, 0.3, 0.5], [2, 2, 2], [2, 2, 2]),
    (23.0, [0.3, 0.3, 0.5], [1, 1, 2], [1, 1, 2]),
    # neither frees anything alone, so the one that is worth much comes last
    (23.0, [0.3, 7.0, 0.5], [0, 1, 0], [1, 1, 2]),
    (23.0, [7.0, 0.3, 0.5], [1, 0, 0], [1, 1, 2]),
]


@pytest.mark.parametrize(("limit", "worth", "lowered", "filled"), PEAKS)
def test_tensors_that_set_a_peak_together_fall_together(
    limit: float, worth: list[float], lowered: list[int], filled: list[int]
) -> None:
    rows = {"first": (46, 1, 1), "second": (46, 2, 2), "other": (10, 0, 0)}
    tensors = tuple(TensorFacts(n, *row, n) for n, row in rows.items())
    own = {n: QuantizerFacts(n, Role.ACTIVATION, 1, WIDTHS, row[0]) for n, row in rows.items()}
    graph = GraphFacts((), own, tensors=tensors)
    found = begun(graph, Budget((ActivationMemory() <= limit,)), [2, 2, 2], worth)
    found.lower()
    assert found.levels.tolist() == lowered
    found.fill()
    assert found.levels.tolist() == filled


MANY = 256
"""Gates that move in portions of 4, of one element each."""

RISING = [float(g) for g in range(1, MANY + 1)]


@pytest.mark.parametrize("order", [1, -1])
def test_portions_of_many_gates_fall_the_least_valuable_first(order: int) -> None:
    size = 4 * MANY  # half a byte per bit and gate, 8 for a portion that goes from 8 to 4 bits
    for freed, fallen in ((0, 0), (0.1, 4), (8, 4), (8.1, 8), (80, 40)):
        budget = parse_budget(f"weights <= {size - freed}")
        found = begun(many(), budget, [2] * MANY, RISING[::order])
        found.lower()
        assert found.levels[::order].tolist() == [1] * fallen + [2] * (MANY - fallen)


@pytest.mark.parametrize("order", [1, -1])
def test_of_many_gates_the_most_valuable_rise_as_many_as_fit(order: int) -> None:
    for more in (0, 1, 2, 3, 5, 11):
        budget = parse_budget(f"weights <= {2 * MANY + 2 * more + 1}")
        found = begun(many(), budget, [1] * MANY, RISING[::order])
        found.fill()
        assert found.levels[::order].tolist() == [1] * (MANY - more) + [2] * more


def many() -> GraphFacts:
    node = NodeFacts("fc", "aten.linear.default", stored=(Stored("w", 4 * MANY, "w"),))
    return GraphFacts((node,), {"w": QuantizerFacts("w", Role.WEIGHT, MANY, WIDTHS, 4 * MANY)})


def test_a_gate_that_is_cheaper_than_the_best_rises_instead() -> None:
    """A column of 2 bits meets 2-bit inputs, the other one 8-bit inputs."""
    node = linear("fc", "w", "x", shape=(1, 2), meets=((1, 2, 1), (1, 2, 1)))
    layer = graph(node, gates={"w": 2, "x": 2}, widths=WIDTHS)
    worth = [1.0, 9.0, 0.0, 0.0]  # the second column is worth more
    for limit, expected in ((20, [0, 0]), (24, [1, 0]), (36, [0, 1]), (40, [1, 1])):
        found = begun(layer, parse_budget(f"bops <= {limit}"), [0, 0, 0, 2], worth)
        found.fill([(0, 0)])
        assert found.levels.tolist() == [*expected, 0, 2]


@pytest.mark.parametrize("order", [1, -1])
def test_many_gates_are_exchanged_for_one(order: int) -> None:
    """A portion of four frees 8 bytes; the other weight takes 16 from 4 to 8 bits."""
    more = NodeFacts("more", "aten.linear.default", stored=(Stored("v", 32, "v"),))
    own = {**many().quantizers, "v": QuantizerFacts("v", Role.WEIGHT, 1, WIDTHS, 32)}
    layers = GraphFacts((*many().nodes, more), own)
    budget = parse_budget(f"weights <= {4 * MANY + 16}")
    # the least valuable eight lose 1 + 2 + ... + 8 = 36
    for worth, fallen, level in ((35.0, 0, 1), (100.0, 8, 2)):
        found = begun(layers, budget, [2] * MANY + [1], [*RISING[::order], worth])
        found.exchange()
        assert found.levels[:MANY][::order].tolist() == [1] * fallen + [2] * (MANY - fallen)
        assert found.levels[MANY] == level
        whole = Ledger(layers, budget, found.layout.assignment(found.levels))
        assert found.ledger.totals == whole.totals


@pytest.mark.parametrize(("gates", "cheap"), [(100, 37), (256, 255), (512, 300), (5000, 4700)])
def test_some_gate_that_fits_is_found_among_many(gates: int, cheap: int) -> None:
    """Gates from number `cheap` on meet 2-bit inputs, all others, which are worth more, 8 bits."""
    meets = (1, gates, 1)
    node = linear("fc", "w", "x", shape=(1, gates), meets=(meets, meets))
    layer = graph(node, gates={"w": gates, "x": gates}, widths=WIDTHS)
    inputs = [2] * cheap + [0] * (gates - cheap)
    size = 2 * (8 * cheap + 2 * (gates - cheap))
    worth = np.arange(gates, 0, -1.0).tolist() + [0.0] * gates
    # from 2 to 4 bits a gate takes 2 x 2 more, or 2 x 8
    found = begun(layer, parse_budget(f"bops <= {size + 4}"), [0] * gates + inputs, worth)
    found.fill([(0, 0)])
    raised = np.flatnonzero(found.levels[:gates]).tolist()
    assert len(raised) == 1
    assert raised[0] >= cheap


def test_what_each_fall_loses_and_frees() -> None:
    """From 8 to 4 bits, and from 4 to 2; what is freed is a share of the bounds."""
    budget = parse_budget("weights <= 16, weights[w0] <= 5")
    found = begun(stored(1, 2, 1), budget, [2, 1, 0], [3.0, 5.0, 7.0])._falls()
    assert found.moves == [(0, 2), (1, 1)]
    assert found.owner.tolist() == [0, 1]
    assert found.loss.tolist() == [3 * 1, 5 * 8]
    assert found.freed.tolist() == [[4 / 16, 4 / 5], [4 / 16, 0]]


def test_the_estimate_of_what_has_to_fall() -> None:
    """A floor: the last of the moves that are needed, perhaps for a part, does not count."""
    moves = [(0, 1), (1, 2), (1, 1), (2, 2)]
    falls = _Falls(
        moves,
        np.array([0, 1, 1, 2]),
        np.array([6.0, 1.0, 8.0, 2.0]),
        np.array([[3.0, 1.0], [1.0, 0.0], [4.0, 0.0], [0.0, 5.0]]),
    )
    # of the first constraint: 1 for 1, 6 for 3 and 8 for 4
    entries = [(1.0, (1, 2)), (2.0, (0, 1)), (2.0, (1, 1))]
    for missing, loss in ((0.5, 0), (1, 0), (2, 1), (4, 1), (4.5, 7), (8.5, 15)):
        assert falls.cheapest(np.array([missing, 0.0]), without=2) == (entries, loss)
    assert falls.cheapest(np.array([9.0, -1.0]), without=1) == ([(2.0, (0, 1))], 6.0)
    # of both: 2 for 5, 1 for 1, 6 for 4 and 8 for 4; the second is freed by the first and third
    entries = [(0.4, (2, 2)), (1.0, (1, 2)), (1.5, (0, 1)), (2.0, (1, 1))]
    for missing, loss in ((5.0, 2), (5.5, 3), (7.0, 17)):
        assert falls.cheapest(np.array([1.0, missing]), without=9) == (entries, loss)
    assert falls.cheapest(np.array([-1.0, 0.0]), without=9) == ([], 0.0)


def moved(levels: Levels, gates: Levels, step: int) -> Levels:
    found = levels.copy()
    found[gates] += step
    return found


class Plain:
    """The greedy search with nothing remembered: every step looks at every move."""

    def __init__(
        self, graph: GraphFacts, budget: Budget, layout: GateLayout, worth: Floats
    ) -> None:
        self.layout, self.worth = layout, worth
        self.ledger = Ledger(graph, budget, layout.assignment(layout.count.numpy() - 1))
        self.limits = np.array(self.ledger.limits)
        self.harm = layout.harm.double().numpy()[layout.row.numpy()]

    def totals(self, levels: Levels) -> Floats:
        self.ledger.update(self.layout.assignment(levels))
        return np.array(self.ledger.totals)

    def moves(self, levels: Levels, step: int) -> Iterator[tuple[tuple[int, int], Levels, float]]:
        """Quantizer and level, the portion that moves, and its loss."""
        for i, q, part in self.layout:
            for level in range(len(q.bit_widths)):
                at = part.start + np.flatnonzero(levels[part] == level)
                if not at.size or not 0 <= level + step < len(q.bit_widths):
                    continue
                loss = self.worth[at] * abs(self.harm[at, level + step] - self.harm[at, level])
                order = np.argsort(-step * loss)[: max(1, q.gates // 64)]
                yield (i, level), at[order], float(loss[order].sum())

    def lower(self, levels: Levels) -> Levels:
        while (over := (now := self.totals(levels)) > self.limits).any():
            ranked = []
            for move, gates, loss in self.moves(levels, -1):
                after = self.totals(moved(levels, gates, -1))
                freed = float(((now - after) / self.limits)[over].sum())
                key = (False, loss / freed) if freed > 0 else (True, loss)
                ranked.append((key, move, gates))
            levels = moved(levels, min(ranked, key=lambda r: r[:2])[2], -1)
        return levels

    def fill(self, levels: Levels) -> Levels:
        full: set[tuple[int, int]] = set()
        while True:
            now, ranked = self.totals(levels), []
            for move, gates, loss in self.moves(levels, 1):
                if move not in full:
                    taken = float(
                        ((self.totals(moved(levels, gates, 1)) - now) / self.limits).sum()
                    )
                    ranked.append((-loss / max(taken, 1e-300), move, gates))
            if not ranked:
                return levels
            _, (i, level), gates = min(ranked, key=lambda r: r[:2])
            full.add((i, level))
            start = self.layout.starts[i]
            at = start + np.flatnonzero(levels[start : self.layout.starts[i + 1]] == level)
            portions = [gates[: gates.size >> k] for k in range(10) if gates.size >> k]
            for portion in [*portions, *at[:, None]]:
                more = moved(levels, portion, 1)
                if (self.totals(more) <= self.limits).all():
                    levels, full = more, full - {(i, level), (i, level + 1)}
                    break


SCHEMES = (
    Scheme(),
    Scheme((2, 3, 5, 8), weights="channel", activations="channel"),
    Scheme((0, 2, 4, 8), weights="channel"),
)


@pytest.mark.parametrize("scheme", SCHEMES, ids=["tensor", "channel", "pruned"])
@pytest.mark.parametrize("seed", [4, 5, 7])
def test_greedy_moves_are_those_of_a_plain_search(seed: int, scheme: Scheme) -> None:
    graph, rng = facts(seed, scheme), random.Random(seed)
    layout = layout_of(graph, rng, own=True)
    for shares in ((0.1, 0.6), (0.5, 0.2), (0.02, 0.9)):
        limits = []
        for name, share in zip(("bops", "weights"), shares, strict=True):
            low, high, reference = ends(graph, name)
            limits.append(constraint(name, low + share * (high - low), reference, False))
        worth = np.array([10 ** rng.gauss(0, 2) for _ in layout.count])
        plain, top = Plain(graph, Budget(tuple(limits)), layout, worth), layout.count.numpy() - 1
        ledger = Ledger(graph, Budget(tuple(limits)), layout.assignment(top))
        found = Projection(layout, ledger, top.copy(), worth)
        found.lower()
        lowered = plain.lower(top)
        assert found.levels.tolist() == lowered.tolist()
        found.fill()
        assert found.levels.tolist() == plain.fill(lowered).tolist()
