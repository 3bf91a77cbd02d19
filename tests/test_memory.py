"""Activation memory: peaks and arenas, by hand and against brute force."""

from collections.abc import Callable, Sequence
from itertools import combinations, count, permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cgmq_fx.cost_models import (
    ActivationMemory,
    Arena,
    BitArray,
    Budget,
    GraphFacts,
    Ledger,
    NodeFacts,
    QuantizerFacts,
    Role,
    TensorFacts,
    graph_bits,
    parse_budget,
    uniform_bits,
)
from cgmq_fx.cost_models.memory import Layout, layouts, live_bytes, plan_arena
from cgmq_fx.passes.scheme import Scheme
from tests.cost_helpers import WIDTHS, bits, cost, quantized
from tests.nets import NETS

Row = tuple[int, int, int, str | None]
"""Elements, first and last step, quantizer."""


def facts(*rows: Row, gates: int = 1) -> GraphFacts:
    """A graph of tensors alone; those without a quantizer are float."""
    tensors = tuple(TensorFacts(f"t{i}", *row) for i, row in enumerate(rows))
    names = dict.fromkeys(t.quantizer for t in tensors if t.quantizer)
    made = {n: QuantizerFacts(n, Role.ACTIVATION, gates, WIDTHS, 1) for n in names}
    return GraphFacts((), made, tensors=tensors)


CHAIN = facts((100, 0, 1, "x"), (200, 1, 2, "a"), (10, 2, 2, None))
RESIDUAL = facts((40, 0, 3, "x"), (80, 1, 2, "a"), (40, 2, 3, "b"), (40, 3, 3, "c"))
CONCAT = facts((10, 0, 2, "x"), (20, 1, 3, "a"), (30, 2, 3, "a"), (50, 3, 4, "a"), (1, 4, 4, None))
PING_PONG = facts(*((10, i, i + 1, "x") for i in range(50)))
RAGGED = facts((5, 0, 0, "x"), gates=2)
CHANNELS = facts((3, 0, 0, "x"), gates=3)

PEAKS: dict[str, tuple[GraphFacts, dict[str, BitArray], int]] = {
    # bytes 100, 100 and 40; steps 100, 100 + 100 and 100 + 40
    "chain": (CHAIN, {"x": bits(8), "a": bits(4)}, 200),
    # bytes 25, 100 and 40; steps 25, 125 and 140: the float output makes the last step the worst
    "float output": (CHAIN, {"x": bits(2), "a": bits(4)}, 140),
    # the shortcut's 40 bytes are there in every step: 40, 120, 40 + 80 + 40, 40 + 40 + 40
    "residual": (RESIDUAL, {n: bits(8) for n in "xabc"}, 160),
    # 40 + 20 + 10 in step 2 against 40 + 10 + 160 in step 3, whose output has 32 bits
    "wide output": (RESIDUAL, {"x": bits(8), "a": bits(2), "b": bits(2), "c": bits(32)}, 210),
    # 10 + 20, 10 + 20 + 30, 20 + 30 + 50, 50 + 4
    "concat": (CONCAT, {"x": bits(8), "a": bits(8)}, 100),
    # any two neighbours of the chain, 10 bytes each
    "ping-pong": (PING_PONG, {"x": bits(8)}, 20),
    # 5 elements at a mean of 3 bits are 15 bits, 2 bytes
    "gates that do not divide": (RAGGED, {"x": bits(2, 4)}, 2),
    # 2 + 4 + 8 bits are 14, 2 bytes
    "channels": (CHANNELS, {"x": bits(2, 4, 8)}, 2),
    "pruned": (CHANNELS, {"x": bits(0, 0, 0)}, 0),
    "nothing": (facts(), {}, 0),
}


@pytest.mark.parametrize(("graph", "assignment", "peak"), PEAKS.values(), ids=PEAKS)
def test_the_peak_by_hand(graph: GraphFacts, assignment: dict[str, BitArray], peak: int) -> None:
    assert cost(ActivationMemory(), graph, assignment) == peak


@pytest.mark.parametrize(("graph", "assignment", "peak"), PEAKS.values(), ids=PEAKS)
def test_these_arenas_need_no_more_than_the_peak(
    graph: GraphFacts, assignment: dict[str, BitArray], peak: int
) -> None:
    assert cost(Arena(), graph, assignment) == peak


def test_a_plan_says_where_every_tensor_lies() -> None:
    assignment = {"x": bits(8), "a": bits(4)}
    plan = Arena().plan(CHAIN, graph_bits(CHAIN, assignment))
    rows = [(a.name, a.offset, a.size, a.first, a.last) for a in plan.allocations]
    # t1 meets both others and t0 has left when t2 comes, so these two share a place
    assert rows == [("t0", 100, 100, 0, 1), ("t1", 0, 100, 1, 2), ("t2", 100, 40, 2, 2)]
    assert plan.size == 200


def test_an_arena_can_need_more_than_the_peak() -> None:
    # At 8 bits c lies on b (8 + 8 bytes), and where b was, a, with d on top: 24 bytes, the peak.
    # At these bits they are 2, 8, 2 and 4 bytes. Steps 2 and 3 hold 8 + 2 and 2 + 2 + 4, but c
    # still lies on b, and d on c.
    graph = facts((8, 3, 3, "a"), (8, 0, 2, "b"), (8, 2, 3, "c"), (8, 3, 3, "d"))
    assignment = {"a": bits(2), "b": bits(8), "c": bits(2), "d": bits(4)}
    assert cost(ActivationMemory(), graph, assignment) == 10
    assert cost(Arena(), graph, assignment) == 8 + 2 + 4


@pytest.mark.parametrize("model", [ActivationMemory(), Arena()])
def test_what_dominates_is_what_is_alive_at_the_worst_step(model: ActivationMemory | Arena) -> None:
    assignment = graph_bits(RESIDUAL, uniform_bits(RESIDUAL, 8))
    assert model.parts(RESIDUAL, assignment) == {"t0": 40, "t1": 80, "t2": 40}


# Bytes at 8 bits, first and last step; what is alive at the worst step fills the whole arena.
PACKED = {
    "largest first": ([(5, 4, 7), (6, 1, 2), (3, 2, 4), (8, 3, 3)], 3 + 8),
    "earliest first": ([(8, 1, 2), (9, 4, 6), (3, 0, 2), (6, 2, 4)], 8 + 3 + 6),
    "longest first": ([(9, 0, 1), (4, 1, 4), (8, 3, 3), (4, 3, 6)], 4 + 8 + 4),
    "largest in time and space first": ([(5, 3, 3), (6, 1, 3), (3, 2, 5), (7, 1, 1)], 5 + 6 + 3),
    "latest last use first": ([(2, 4, 6), (7, 2, 5), (9, 0, 3), (8, 4, 7)], 2 + 7 + 8),
}


@pytest.mark.parametrize(("rows", "peak"), PACKED.values(), ids=PACKED)
def test_packings_that_one_order_alone_finds(rows: list[tuple[int, int, int]], peak: int) -> None:
    graph = facts(*((*row, "x") for row in rows))
    assert cost(ActivationMemory(), graph, {"x": bits(8)}) == peak
    assert cost(Arena(), graph, {"x": bits(8)}) == peak


def packed(tensors: Sequence[TensorFacts], order: Sequence[int]) -> Layout:
    """One by one at the lowest bit that is free while they live; then what lies on what."""
    placed: dict[int, range] = {}
    for i in order:
        others = [own for j, own in placed.items() if meet(tensors[i], tensors[j])]
        size = tensors[i].elements * {32: 8}.get(tensors[i].bits, tensors[i].bits)
        free = (
            low for low in count() if all(low + size <= o.start or o.stop <= low for o in others)
        )
        low = next(free)
        placed[i] = range(low, low + size)
    rows, topmost = list[tuple[int, tuple[int, ...]]](), dict[int, int]()
    for i in sorted(placed, key=lambda i: (placed[i].start, i)):
        steps = range(tensors[i].first, tensors[i].last + 1)
        rows.append((i, tuple(dict.fromkeys(topmost[s] for s in steps if s in topmost))))
        topmost |= dict.fromkeys(steps, i)
    return tuple(rows)


ORDERS: list[Callable[[TensorFacts], tuple[int, int]]] = [
    lambda t: (-t.elements, t.first),
    lambda t: (t.first, -t.elements),
    lambda t: (-(t.last - t.first), -t.elements),
    lambda t: (-t.elements * len(range(t.first, t.last + 1)), t.first),
    lambda t: (-t.last, -t.elements),
]


@pytest.mark.parametrize("seed", range(20))
def test_layouts_are_first_fits_in_five_orders(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensors = []
    for i in range(8):
        first, length, elements = rng.integers((0, 0, 1), (6, 4, 30)).tolist()
        bits = int(rng.choice([1, 8, 32, 64])) if seed % 2 else 32
        tensors.append(TensorFacts(f"t{i}", elements, first, first + length, None, bits))
    orders = [sorted(range(8), key=[key(t) for t in tensors].__getitem__) for key in ORDERS]
    assert layouts(tensors) == tuple(dict.fromkeys(packed(tensors, order) for order in orders))


LAYOUTS: list[tuple[list[Row], tuple[Layout, ...]]] = [
    ([], ((),)),
    ([(4, 0, 0, "x")], (((0, ()),),)),
    # what is never alive at once lies on the same ground
    ([(4, 0, 0, "x"), (4, 1, 1, "x")], (((0, ()), (1, ())),)),
    # the larger one, or the earlier one, is placed first
    (
        [(4, 0, 1, "x"), (8, 1, 1, "x")],
        (((1, ()), (0, (1,))), ((0, ()), (1, (0,)))),
    ),
    ([(4, 0, 0, None), (3, 0, 0, "x")], (((0, ()), (1, (0,))),)),
]


@pytest.mark.parametrize(("rows", "expected"), LAYOUTS)
def test_which_tensor_lies_on_which(rows: list[Row], expected: tuple[Layout, ...]) -> None:
    assert layouts(facts(*rows).tensors) == expected


def test_bytes_alive_in_every_step() -> None:
    found = live_bytes(RESIDUAL.tensors, np.array([1, 10, 100, 1000]))
    assert found.tolist() == [1, 11, 111, 1101]
    assert live_bytes((), np.array([], dtype=np.int64)).tolist() == [0]


def test_the_best_layout_is_taken_for_the_sizes_at_hand() -> None:
    tensors = facts((4, 0, 0, "x"), (4, 0, 1, "x"), (4, 1, 1, "x")).tensors
    choices: list[Layout] = [
        ((0, ()), (1, (0,)), (2, (1,))),  # all three on top of each other
        ((1, ()), (0, (1,)), (2, (1,))),
        ((0, ()), (2, ()), (1, (0, 2))),
    ]
    plan = plan_arena(tensors, np.array([1, 2, 3]), choices)
    assert plan.size == 5
    assert [a.offset for a in plan.allocations] == [2, 0, 2]


def test_an_arena_plans_one_graph_after_the_other() -> None:
    model = Arena()
    for graph, size in ((CHAIN, 200), (PING_PONG, 20), (CHAIN, 200)):
        assignment = graph_bits(graph, dict.fromkeys("xa", bits(8)) | {"a": bits(4)})
        assert model.graph_cost(graph, assignment) == size
        assert len(model.plan(graph, assignment).allocations) == len(graph.tensors)


@pytest.mark.parametrize("model", [ActivationMemory(), Arena()])
def test_no_node_has_a_share_of_a_peak(model: ActivationMemory | Arena) -> None:
    node = NodeFacts("fc", "aten.linear.default", 12, output_elements=3)
    graph = GraphFacts((node,), CHAIN.quantizers, tensors=CHAIN.tensors)
    ledger = Ledger(graph, Budget((model <= 1.0,)), {"x": bits(8), "a": bits(4)})
    assert ledger.node_costs(0) == (0,)
    assert ledger.totals == (200,)


NET_PEAKS = {
    # 192 + 256 elements in step 1, a byte each
    ("cnn", (3, 8, 8), 8): 448,
    ("cnn", (3, 8, 8), 4): 224,
    # 3 x 144 elements in steps 3 and 4
    ("residual", (3, 6, 6), 8): 432,
    ("residual", (3, 6, 6), 2): 108,
    # 125 bytes and 50 floats in step 4
    ("concat", (3, 5, 5), 8): 325,
    # ceil(75 x 2 / 8) = 19, 13, 19 and 32 bytes: 32 + 200 in step 4
    ("concat", (3, 5, 5), 2): 232,
}


@pytest.mark.parametrize(("net", "peak"), NET_PEAKS.items(), ids=str)
@pytest.mark.parametrize("model", [ActivationMemory(), Arena()])
def test_captured_nets_by_hand(
    net: tuple[str, tuple[int, ...], int], peak: int, model: ActivationMemory | Arena
) -> None:
    name, shape, width = net
    _, graph = quantized(NETS[name].build(), torch.randn(2, *shape), Scheme())
    assert cost(model, graph, uniform_bits(graph, width)) == peak


@pytest.mark.parametrize("text", ["activations <= 24 KiB", "arena <= 24576 bytes"])
def test_bounds_have_units(text: str) -> None:
    (constraint,) = parse_budget(text)
    assert constraint.bound.value == 24 * 1024


WIDTH = st.sampled_from((0, *WIDTHS))
NAMES = ("p", "q", "r")


@st.composite
def problems(draw: st.DrawFn, most: int = 12) -> tuple[GraphFacts, dict[str, BitArray]]:
    """Tensors with random lifetimes on three quantizers of 1 to 3 gates, and bits for these."""
    rows = [
        (draw(st.integers(1, 40)), first, first + draw(st.integers(0, 4)), name)
        for first, name in draw(
            st.lists(
                st.tuples(st.integers(0, 6), st.sampled_from((*NAMES, None))),
                min_size=1,
                max_size=most,
            )
        )
    ]
    gates = draw(st.integers(1, 3))
    spare: list[Row] = [(1, 0, 0, name) for name in NAMES]
    return facts(*rows, *spare, gates=gates), {n: draw(gate_bits(gates)) for n in NAMES}


def gate_bits(gates: int) -> st.SearchStrategy[BitArray]:
    return st.lists(WIDTH, min_size=gates, max_size=gates).map(np.array)


def sizes_of(graph: GraphFacts, assignment: dict[str, BitArray]) -> list[int]:
    """Bytes of every tensor, counted bit by bit: the mean over the gates, rounded up twice."""
    result = []
    for t in graph.tensors:
        widths = assignment[t.quantizer].tolist() if t.quantizer else [t.bits]
        total = -(-t.elements * sum(widths) // len(widths))
        result.append(-(-total // 8))
    return result


def simulated_peak(tensors: Sequence[TensorFacts], sizes: Sequence[int]) -> int:
    steps = range(1 + max(t.last for t in tensors))
    alive = (
        [n for t, n in zip(tensors, sizes, strict=True) if t.first <= s <= t.last] for s in steps
    )
    return max(map(sum, alive))


@given(problems())
def test_the_peak_is_that_of_a_simulation(problem: tuple[GraphFacts, dict[str, BitArray]]) -> None:
    graph, assignment = problem
    expected = simulated_peak(graph.tensors, sizes_of(graph, assignment))
    assert cost(ActivationMemory(), graph, assignment) == expected


@given(problems())
def test_no_two_tensors_overlap(problem: tuple[GraphFacts, dict[str, BitArray]]) -> None:
    graph, assignment = problem
    plan = Arena().plan(graph, graph_bits(graph, assignment))
    assert [a.size for a in plan.allocations] == sizes_of(graph, assignment)
    assert plan.size == max(a.offset + a.size for a in plan.allocations)
    for a, b in combinations(plan.allocations, 2):
        in_time = a.first <= b.last and b.first <= a.last
        in_space = a.offset < b.offset + b.size and b.offset < a.offset + a.size
        assert not (in_time and in_space)


@given(problems())
def test_an_arena_holds_the_peak(problem: tuple[GraphFacts, dict[str, BitArray]]) -> None:
    assert cost(Arena(), *problem) >= cost(ActivationMemory(), *problem)


@pytest.mark.parametrize("model", [ActivationMemory(), Arena()])
@given(problem=problems(), data=st.data())
def test_more_bits_never_need_less(
    model: ActivationMemory | Arena,
    problem: tuple[GraphFacts, dict[str, BitArray]],
    data: st.DataObject,
) -> None:
    graph, low = problem
    more = {n: np.maximum(b, data.draw(gate_bits(b.size))) for n, b in low.items()}
    assert cost(model, graph, low) <= cost(model, graph, more)


def smallest_arena(tensors: Sequence[TensorFacts], sizes: Sequence[int]) -> int:
    """The smallest of all arenas: every packing is a stacking in some order."""

    def stacked(order: Sequence[int]) -> int:
        ends: dict[int, int] = {}
        for i in order:
            below = (ends[j] for j in ends if meet(tensors[i], tensors[j]))
            ends[i] = sizes[i] + max(below, default=0)
        return max(ends.values())

    return min(map(stacked, permutations(range(len(tensors)))))


def meet(a: TensorFacts, b: TensorFacts) -> bool:
    return a.first <= b.last and b.first <= a.last


def test_arenas_are_close_to_the_smallest() -> None:
    random = np.random.default_rng(0)
    ratios = []
    for _ in range(200):
        first, length = random.integers(0, 5, 5), random.integers(0, 4, 5)
        elements = random.integers(1, 50, 5)
        rows = zip(elements, first, first + length, "xxxyy", strict=True)
        graph = facts(*((int(e), int(f), int(t), q) for e, f, t, q in rows))
        assignment = {n: bits(random.choice([2, 4, 8])) for n in "xy"}
        sizes = sizes_of(graph, assignment)
        best = smallest_arena(graph.tensors, sizes)
        ratios.append(plan_arena(graph.tensors, np.array(sizes)).size / best)
    assert min(ratios) == 1  # below 1 would overlap
    assert max(ratios) < 1.2
    assert np.mean(ratios) < 1.005
