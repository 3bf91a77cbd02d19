"""The running account equals a full recomputation, whatever moves."""

from collections.abc import Sequence
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
