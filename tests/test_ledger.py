"""The running account equals a full recomputation, whatever moves."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cgmq_fx.cost_models import (
    ActivationMemory,
    BitArray,
    BOPs,
    Budget,
    Constraint,
    CostModel,
    GraphFacts,
    Ledger,
    MACs,
    NodeBits,
    NodeFacts,
    Operand,
    Role,
    TensorFacts,
    WeightMemory,
    highest_bits,
    lowest_bits,
    parse_budget,
    uniform_bits,
)
from cgmq_fx.cost_models.errors import BudgetError
from tests.cost_helpers import WIDTHS, bits, linear, quantizer, two_layers


class Wires(CostModel):
    """A user's additive model that is no integer."""

    name = "wires"
    unit = "mm"

    def node_cost(self, node: NodeFacts, bits: NodeBits) -> float:
        return 0.1 * node.macs * bits.mean(lambda w, a: (w + a) ** 0.5)


class Widest(CostModel):
    """A user's model that is no sum: the node with the most bit operations."""

    name = "widest"
    unit = "bop"
    additive = False

    def node_cost(self, node: NodeFacts, bits: NodeBits) -> float:
        return node.macs * bits.weight * bits.activation

    def graph_cost(self, graph: GraphFacts, bits: Sequence[NodeBits]) -> float:
        return max(self.node_cost(n, b) for n, b in zip(graph.nodes, bits, strict=True))


MODELS: list[CostModel] = [BOPs(), MACs(), WeightMemory(), Wires(), Widest()]
BUDGET = Budget(tuple(model <= 100.0 for model in MODELS))
WITH_MEMORY = Budget((*BUDGET, ActivationMemory() <= 100.0))
FACTS = two_layers((0, *WIDTHS))


def chain(gates: Sequence[int]) -> GraphFacts:
    """Layers, each with a weight of so many gates; the last one multiplies its input by itself."""
    nodes = [
        linear(f"fc{i}", f"w{i}", f"x{i}", meets=((n, 1, 1), (1, 1, 1)))
        for i, n in enumerate(gates)
    ]
    last = f"x{len(gates)}"
    square = Operand(Role.ACTIVATION, 3, last)
    nodes.append(NodeFacts("square", "aten.mul.Tensor", 3, (square, square)))
    quantizers = {
        name: quantizer(name, n if name[0] == "w" else 1)
        for i, n in enumerate(gates)
        for name in (f"w{i}", f"x{i}")
    }
    quantizers[last] = quantizer(last)
    tensors = tuple(TensorFacts(f"t{i}", 10 + i, i, i + 1, f"x{i}") for i in range(len(nodes)))
    return GraphFacts(tuple(nodes), quantizers, tensors=tensors)


def gates(name: str, facts: GraphFacts = FACTS) -> st.SearchStrategy[tuple[str, BitArray]]:
    quantizer = facts.quantizers[name]
    drawn = st.lists(
        st.sampled_from(quantizer.bit_widths), min_size=quantizer.gates, max_size=quantizer.gates
    )
    return st.tuples(st.just(name), drawn.map(np.array))


MOVES = st.lists(st.one_of([gates(name) for name in FACTS.quantizers]), max_size=12)


def account(ledger: Ledger) -> Any:
    """All that a ledger tells."""
    bits_now = {name: b.tolist() for name, b in ledger.assignment.items()}
    costs = [ledger.node_costs(i) for i in range(len(ledger.budget))]
    return ledger.totals, costs, bits_now, ledger.violated, ledger.satisfied, ledger.references


@settings(deadline=None)
@given(MOVES)
def test_after_any_moves_the_account_is_exact(moves: list[tuple[str, BitArray]]) -> None:
    ledger = Ledger(FACTS, BUDGET, highest_bits(FACTS))
    for name, new in moves:
        ledger.move(name, new)
    assert account(ledger) == account(Ledger(FACTS, BUDGET, dict(ledger.assignment)))


@settings(deadline=None)
@given(MOVES, st.one_of([gates(name) for name in FACTS.quantizers]))
def test_a_trial_predicts_a_move_and_changes_nothing(
    moves: list[tuple[str, BitArray]], tried: tuple[str, BitArray]
) -> None:
    ledger = Ledger(FACTS, BUDGET, lowest_bits(FACTS))
    for name, new in moves:
        ledger.move(name, new)
    before = account(ledger)
    predicted = ledger.trial(*tried)
    assert account(ledger) == before
    ledger.move(*tried)
    assert ledger.totals == predicted


MIXED = chain((1, 1, 3, 1))
"""Quantizers with one gate, read once or twice, and one with several; tensors on their grids."""

GRAPHS = pytest.mark.parametrize("facts", [FACTS, MIXED], ids=["by hand", "chain"])


def all_gates(graph: GraphFacts) -> st.SearchStrategy[BitArray]:
    """The bits of all gates, one quantizer after the other."""
    rows = [
        st.lists(st.sampled_from(q.bit_widths), min_size=q.gates, max_size=q.gates)
        for q in graph.quantizers.values()
    ]
    return st.tuples(*rows).map(np.concatenate)


@GRAPHS
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_all_bits_at_once_give_the_same_account(facts: GraphFacts, data: st.DataObject) -> None:
    ledger = Ledger(facts, WITH_MEMORY, highest_bits(facts))
    for flat in data.draw(st.lists(all_gates(facts), min_size=1, max_size=4)):
        ledger.assign(flat)
        whole = Ledger(facts, WITH_MEMORY, dict(ledger.assignment))
        assert account(ledger) == account(whole)
        assert np.concatenate(list(ledger.assignment.values())).tolist() == flat.tolist()
        name, new = data.draw(st.one_of([gates(name, facts) for name in facts.quantizers]))
        assert ledger.trial(name, new) == whole.trial(name, new)


@GRAPHS
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_what_one_quantizer_alone_would_change(facts: GraphFacts, data: st.DataObject) -> None:
    ledger = Ledger(facts, WITH_MEMORY, highest_bits(facts))
    ledger.assign(data.draw(all_gates(facts)))
    there = np.array([data.draw(st.sampled_from(q.bit_widths)) for q in facts.quantizers.values()])
    before = account(ledger)
    found = ledger.alone(there)
    assert account(ledger) == before
    for column, name, new in zip(found.T, facts.quantizers, there, strict=True):
        if facts.quantizers[name].gates == 1:
            expected = np.array(ledger.change(name, np.array([new])))
            known = [c.model.additive for c in WITH_MEMORY]
            assert np.isnan(column[np.logical_not(known)]).all()
            looked_up = column[known]
            assert np.isnan(looked_up).all() or looked_up == pytest.approx(expected[known])
        else:
            assert np.isnan(column).all()


def test_most_of_a_chain_is_looked_up() -> None:
    found = Ledger(MIXED, parse_budget("bops <= 9%"), highest_bits(MIXED)).alone(np.full(9, 8))
    assert [not bool(np.isnan(column).any()) for column in found.T] == [
        *(True, True),
        *(True, True),
        *(False, False),
        *(True, True),
        True,
    ]


# What each quantizer would change alone; FACTS at 8 bits, where w1 and h have a gate per channel.
CHANGES = [
    # 12 x (4 - 8) x 8, and 12 x 4 bits less of weights
    ("w1", bits(4, 4, 4), {"bops": -384.0, "weights": -6.0, "widest": -384.0}),
    # a third of that
    ("w1", bits(8, 8, 4), {"bops": -128.0, "weights": -2.0, "widest": -128.0}),
    # fc2 alone is cheaper than fc1: the widest does not change until it is not
    ("w2", bits(2), {"bops": -6 * 6 * 8.0, "weights": -6 * 6 / 8, "widest": 0.0}),
    ("w2", bits(32), {"bops": 6 * 24 * 8.0, "weights": 6 * 24 / 8, "widest": 6 * 32 * 8 - 768}),
    ("h", bits(0, 8, 8), {"bops": -2 * 64.0, "weights": 0.0, "widest": 0.0}),
]


@pytest.mark.parametrize(("name", "new", "expected"), CHANGES)
def test_what_a_move_changes_by_hand(name: str, new: BitArray, expected: dict[str, float]) -> None:
    ledger = Ledger(FACTS, BUDGET, uniform_bits(FACTS, 8))
    before = account(ledger)
    changed = ledger.change(name, new)
    assert account(ledger) == before
    by_name = dict(zip([c.model.name for c in BUDGET], changed, strict=True))
    assert {n: by_name[n] for n in expected} == pytest.approx(expected)
    trial = np.array(ledger.trial(name, new)) - ledger.totals
    assert trial.tolist() == pytest.approx(changed)


def test_several_quantizers_move_at_once() -> None:
    ledger = Ledger(FACTS, BUDGET, uniform_bits(FACTS, 8))
    ledger.update({"w1": bits(2, 4, 8), "h": bits(0, 4, 32), "x": bits(4)})
    assert account(ledger) == account(Ledger(FACTS, BUDGET, dict(ledger.assignment)))
    assert [b.tolist() for b in ledger.assignment.values()] == [[2, 4, 8], [4], [8], [0, 4, 32]]


# fc1 and fc2 lie in modules; the nodes are called otherwise.
SCOPES = [
    ("bops[block.fc1]", 768),
    ("bops[block.*]", 768 + 384),
    ("bops[*.fc2]", 384),
    ("bops[n2]", 384),
    ("bops[n?]", 768 + 384),
    ("bops[n1*]", 768),
    ("weights[block.fc2]", 6 + 2 * 4),
]


def in_modules() -> GraphFacts:
    nodes = (
        replace(node, name=f"n{i}", module=f"block.fc{i}") for i, node in enumerate(FACTS.nodes, 1)
    )
    return replace(FACTS, nodes=tuple(nodes))


@pytest.mark.parametrize(("cost", "total"), SCOPES)
def test_bounds_on_a_part_of_the_model(cost: str, total: float) -> None:
    graph = in_modules()
    ledger = Ledger(graph, parse_budget(f"{cost} <= 1%, bops <= 1%"), uniform_bits(graph, 8))
    assert ledger.totals == (total, 768 + 384)
    assert sum(ledger.node_costs(0)) == total
    if cost.startswith("bops"):
        assert ledger.references == (total * 16, (768 + 384) * 16)  # 32 x 32 by 8 x 8
        assert ledger.limits[0] == pytest.approx(total * 16 / 100)


REFUSED_SCOPES = [
    ("bops[block]", r"no layer matches 'block'; did you mean 'block\.\*'\? There are block.fc"),
    ("bops[block.fc11]", r"did you mean 'block\.fc1'\? There are block.fc1, block.fc2$"),
    ("bops[N1]", "no layer matches 'N1'; there are block.fc1, block.fc2$"),
    ("activations[block.*]", "'activations' is no sum over nodes, .* bounded for 'block.*' alone"),
]


@pytest.mark.parametrize(("cost", "message"), REFUSED_SCOPES)
def test_a_scope_is_refused(cost: str, message: str) -> None:
    graph = in_modules()
    with pytest.raises(BudgetError, match=message):
        Ledger(graph, parse_budget(f"{cost} <= 1 M"), uniform_bits(graph, 8))


def test_layers_without_a_module_are_named_by_their_nodes() -> None:
    with pytest.raises(BudgetError, match=r"there are fc1, fc2$"):
        Ledger(FACTS, parse_budget("bops[x] <= 1"), uniform_bits(FACTS, 8))


def test_a_bound_that_knows_its_reference_keeps_it() -> None:
    budget = parse_budget("bops <= 10%, bops <= 50% of 8 bits, weights <= 9%")
    fresh = Ledger(FACTS, budget, uniform_bits(FACTS, 4))
    assert fresh.references == (18 * 1024, 18 * 64, 18 * 4 + 20)
    assert fresh.limits == pytest.approx((1843.2, 576, 8.28))
    known = budget.with_references({"bops of 8 bits": 10.0, "weights of 32 bits": 0.0})
    ledger = Ledger(FACTS, known, uniform_bits(FACTS, 4))
    assert ledger.references == (18 * 1024, 10, 0)
    assert ledger.limits == pytest.approx((1843.2, 5, 0))
    assert ledger.violated == (1, 2)


def test_whether_every_cost_is_a_sum() -> None:
    assert Ledger(FACTS, parse_budget("bops <= 1, weights <= 1"), uniform_bits(FACTS, 8)).additive
    assert not Ledger(FACTS, WITH_MEMORY, uniform_bits(FACTS, 8)).additive
    found = Ledger(FACTS, WITH_MEMORY, uniform_bits(FACTS, 8))
    assert found.fits(found.limits)
    assert not found.fits([limit + 1e-9 for limit in found.limits])


def test_uniform_bits_have_an_entry_per_gate() -> None:
    found = uniform_bits(FACTS, 4)
    assert {n: b.tolist() for n, b in found.items()} == {
        **{"w1": [4, 4, 4], "x": [4]},
        **{"w2": [4], "h": [4, 4, 4]},
    }


def test_the_callers_assignment_is_not_written_to() -> None:
    assignment = uniform_bits(FACTS, 8)
    Ledger(FACTS, BUDGET, assignment).move("w2", bits(2))
    assert assignment["w2"].tolist() == [8]


# fc1: 12 MACs, weight w1, input x; fc2: 6 MACs, weight w2, input h.
BY_HAND: list[tuple[CostModel, tuple[float, float], float]] = [
    (BOPs(), (12 * 4 * 8, 6 * 2 * 8), 480),
    (Wires(), (1.2 * 12**0.5, 0.6 * 10**0.5), 1.2 * 12**0.5 + 0.6 * 10**0.5),
    (Widest(), (12 * 4 * 8, 6 * 2 * 8), 384),
]


@pytest.mark.parametrize(("model", "nodes", "total"), BY_HAND)
def test_totals_and_node_costs(model: CostModel, nodes: tuple[float, float], total: float) -> None:
    ledger = Ledger(FACTS, Budget((model <= 400.0,)), uniform_bits(FACTS, 8))
    ledger.move("w1", bits(4, 4, 4))
    ledger.move("w2", bits(2))
    assert ledger.node_costs(0) == pytest.approx(nodes)
    assert ledger.totals == pytest.approx((total,))


# At 8 x 8 bits: 1152 BOPs, 6.25 % of 18 x 1024; 18 bytes of weights and 5 x 4 of biases.
SATISFIED = [
    ("bops <= 1152", ()),
    ("bops <= 1151.9", (0,)),
    ("bops <= 6.25%", ()),
    ("bops <= 6.24%", (0,)),
    ("bops <= 6.24%, weights <= 38", (0,)),
    ("bops <= 7%, weights <= 37.9", (1,)),
    ("weights <= 1, bops <= 1", (0, 1)),
]


@pytest.mark.parametrize(("text", "violated"), SATISFIED)
def test_a_bound_may_be_met_but_not_exceeded(text: str, violated: tuple[int, ...]) -> None:
    ledger = Ledger(FACTS, parse_budget(text), uniform_bits(FACTS, 8))
    assert ledger.violated == violated
    assert ledger.satisfied == (not violated)
    assert [s.satisfied for s in ledger.states()] == [
        i not in violated for i in range(len(ledger.budget))
    ]


def test_a_state_tells_value_limit_and_share() -> None:
    constraint: Constraint = BOPs() <= "5%"
    (state,) = Ledger(FACTS, Budget((constraint,)), uniform_bits(FACTS, 8)).states()
    assert (state.value, state.reference, state.limit) == (1152, 18_432, 0.05 * 18_432)
    assert str(state) == "bops 6.2500% > (VIOLATED) 5.0000%"
    (state,) = Ledger(FACTS, Budget((BOPs() <= 2000,)), uniform_bits(FACTS, 8)).states()
    assert str(state) == "bops 1152 <= 2000 bop"
    assert state.relative == 0.0625


def test_the_ends_of_the_bit_widths() -> None:
    facts = two_layers((4, 8))
    assert {int(b.max()) for b in lowest_bits(facts).values()} == {4}
    assert {int(b.min()) for b in highest_bits(facts).values()} == {8}
    assert lowest_bits(facts)["w1"].shape == (3,)


class Counted(CostModel):
    """A user's model that gives whole numbers of any kind, or fractions."""

    name = "counted"
    unit = "piece"

    def node_cost(self, node: NodeFacts, bits: NodeBits) -> Any:
        found = bits.mean(lambda w, a: w + a)
        whole = found == int(found)
        return np.uint64(found) if whole and found % 2 else int(found) if whole else found


class Wild(CostModel):
    """A user's model whose costs differ by hundreds of orders of magnitude, or are infinite."""

    name = "wild"
    unit = "mm"

    def node_cost(self, node: NodeFacts, bits: NodeBits) -> float:
        size = bits.mean(lambda w, a: (w - a) * 40.0)
        return float("inf") if bits.weight == 0 else 10.0 ** min(size, 300.0) / 3.0


@pytest.mark.parametrize("model", [Counted(), Wild()], ids=lambda m: m.name)
@settings(deadline=None)
@given(st.data())
def test_no_digit_of_a_sum_is_lost(model: CostModel, data: st.DataObject) -> None:
    facts = chain((3, 1, 3))
    ledger = Ledger(facts, Budget((model <= 1e9,)), lowest_bits(facts))
    for _ in range(3):
        ledger.assign(data.draw(all_gates(facts)))
        assert account(ledger) == account(Ledger(facts, ledger.budget, dict(ledger.assignment)))
        tried = data.draw(st.one_of([gates(name, facts) for name in facts.quantizers]))
        predicted = ledger.trial(*tried)
        ledger.move(*tried)
        again = Ledger(facts, ledger.budget, dict(ledger.assignment))
        assert ledger.totals == predicted == again.totals
