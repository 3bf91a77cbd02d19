"""Users' cost models: registered, checked, and bounded."""

from collections.abc import Callable
from dataclasses import replace
from math import inf, nan
from typing import Any

import pytest

from cgmq_fx.cost_models import (
    Budget,
    CostModel,
    GraphBits,
    GraphFacts,
    Ledger,
    NodeBits,
    NodeFacts,
    TensorFacts,
    check_cost_models,
    check_feasible,
    cost_model,
    graph_bits,
    lowest_bits,
    model,
    parse_budget,
    register_cost_model,
    relevance,
)
from cgmq_fx.cost_models.errors import (
    BudgetError,
    CostModelError,
    InfeasibleBudgetError,
    UnknownCostError,
)
from cgmq_fx.cost_models.preflight import dominating
from tests.cost_helpers import bits, graph, linear, quantizer, two_layers


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cost models registered in a test are forgotten after it."""
    monkeypatch.setattr(model, "_REGISTRY", dict(model._REGISTRY))


class Wires(CostModel):
    name = "wires"
    unit = "wire"

    def node_cost(self, node: NodeFacts, bits: NodeBits) -> float:
        return node.output_elements + bits.weight


def test_a_users_model_is_used_by_name() -> None:
    assert register_cost_model(Wires) is Wires
    (constraint,) = parse_budget("wires <= 2 kwires")
    assert isinstance(constraint.model, Wires)
    assert (constraint.bound.value, str(constraint)) == (2000, "wires <= 2000 wire")


def test_registering_the_same_class_again_is_harmless() -> None:
    register_cost_model(register_cost_model(Wires))
    assert len(parse_budget("wires <= 1")) == 1


def test_an_unregistered_model_is_bounded_as_an_object() -> None:
    assert str(parse_budget(Wires() <= "2 kwire")) == "wires <= 2000 wire"
    with pytest.raises(BudgetError, match="no cost model named 'wires'"):
        parse_budget("wires <= 1")


def named(**attributes: Any) -> type[CostModel]:
    return type("Odd", (CostModel,), {"node_cost": lambda *_: 0.0, **attributes})


REFUSED = [
    (
        {"name": "bops", "unit": "bop"},
        r"'bops' is registered already \(BOPs\); give the new one an",
    ),
    ({"unit": "bop"}, "Odd needs a `name` that is an identifier, such as 'wires'; it has ''"),
    ({"name": "two words", "unit": "bop"}, "needs a `name` .* it has 'two words'"),
    ({"name": 5, "unit": "bop"}, "needs a `name` .* it has 5"),
    ({"name": "odd"}, "Odd needs a `unit`, a string such as 'byte'"),
    ({"name": "odd", "unit": 3}, "needs a `unit`"),
]


@pytest.mark.parametrize(("attributes", "message"), REFUSED)
def test_a_registration_is_refused(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(CostModelError, match=message):
        register_cost_model(named(**attributes))


class Scaled(Wires):
    name = "scaled"

    def __init__(self, factor: float) -> None:
        self.factor = factor


class Unwritten(CostModel):
    name = "unwritten"
    unit = "wire"


@pytest.mark.parametrize(
    ("model", "message"), [(Scaled, "missing 1 required .*'factor'"), (Unwritten, "node_cost")]
)
def test_a_model_that_its_name_does_not_make(model: type[CostModel], message: str) -> None:
    register_cost_model(model)
    with pytest.raises(CostModelError, match=f"'{model.name}' cannot be made .*{message}"):
        parse_budget(f"{model.name} <= 1")


class Table(CostModel):
    """A cost per bits of the weight."""

    name = "table"
    unit = "joule"

    def __init__(self, by_bits: dict[int, float]) -> None:
        self.by_bits = by_bits

    def node_cost(self, node: NodeFacts, bits: NodeBits) -> float:
        return self.by_bits[int(bits.weight)]


class Best(Table):
    """Only the largest of the node costs, and less of it for more bits of the input."""

    additive = False

    def graph_cost(self, graph: Any, bits: Any) -> float:
        return 100.0 - float(max(b.activation for b in bits))


UNREAD = type("Unread", (Table,), {"graph_cost": lambda *_: 1.0})
ONE_LAYER = graph(linear("fc", "w", "x"), widths=(2, 4, 8))
FINE = {2: 0.0, 4: 1.0, 8: 1.0, 32: 4.0}
CONTRACT: list[tuple[CostModel, str]] = [
    (
        Table({**FINE, 8: 0.5}),
        r"'table' falls from 1 to 0.5 joule when w goes from 4 to 8 bits and all others stay "
        r"\(x: 2 bits\); a cost must never be lower for more bits",
    ),
    (Table({**FINE, 2: -1.0}), "'table' gives -1.0 with every gate .* finite and not negative"),
    (Table({**FINE, 4: nan}), "gives nan with w at 4 bits; a cost must be finite"),
    (Table({**FINE, 4: inf}), "gives inf with w at 4 bits"),
    (Table({**FINE, 32: nan}), "gives nan with everything at 32 bits"),
    (UNREAD(FINE), "'table' defines `graph_cost`, which only counts with `additive = False`"),
    (Best(FINE), "falls from 98 to 96 joule when x goes from 2 to 4 bits .*w: 2 bits"),
]


@pytest.mark.parametrize(("model", "message"), CONTRACT)
def test_a_model_that_breaks_the_contract_is_refused(model: CostModel, message: str) -> None:
    with pytest.raises(CostModelError, match=message):
        check_cost_models(ONE_LAYER, Budget((model <= 10.0,)))


def test_the_bits_of_a_reference_are_those_of_its_bound() -> None:
    model = Table({**FINE, 8: nan})
    with pytest.raises(CostModelError, match="gives nan with everything at 8 bits"):
        check_cost_models(ONE_LAYER, parse_budget(model <= "50% of 8 bits"))


def test_a_fall_that_only_other_bits_show_is_found() -> None:
    class Crossed(Wires):
        def node_cost(self, node: NodeFacts, bits: NodeBits) -> float:
            return 100 - bits.weight if bits.activation == 8 else 0.0

    with pytest.raises(CostModelError, match=r"when w goes from 2 to 4 bits .*\(x: 8 bits\)"):
        check_cost_models(ONE_LAYER, Budget((Crossed() <= 1.0,)))


@pytest.mark.parametrize("model", [Table(FINE), Wires()])
def test_a_model_that_keeps_the_contract_is_accepted(model: CostModel) -> None:
    check_cost_models(ONE_LAYER, Budget((model <= 10.0,)))


# All at 2 bits: 18 MACs x 4 = 72 BOPs of 18,432 at 32 bits, 48 of them in fc1; 18 x 2 / 8 weight
# bytes and 20 of biases = 24.5, 3 + 12 of them in fc1.
FEASIBLE = ["bops <= 72", "bops <= 0.390625%", "weights <= 24.5", "bops <= 72, weights <= 25"]
INFEASIBLE = [
    (
        "bops <= 71.9",
        r"bops <= 71.9 bop is asked for, but with every gate at its smallest bit-width it is still "
        r"72 bop, most of it in fc1 \(67%\), fc2 \(33%\)\. Allow smaller bit-widths "
        r"\(.*0 prunes\) or raise",
    ),
    ("bops <= 0.3%", r"bops <= 0\.3% is asked .* still 0\.3907%, most .*1 multiply-accumulate"),
    ("weights <= 24", r"weights <= 24 byte .* still 24\.5 byte, most of it in fc1 \(61%\), fc2"),
    ("bops <= 72, weights <= 24", r"met, whatever the training does: weights <= 24"),
    ("bops <= 1, weights <= 1", r"bops <= 1 bop .*; weights <= 1 byte"),
]


@pytest.mark.parametrize("text", FEASIBLE)
def test_a_budget_that_the_smallest_bits_meet_is_accepted(text: str) -> None:
    check_feasible(two_layers(), parse_budget(text))
    with pytest.raises(InfeasibleBudgetError):
        check_feasible(two_layers((4, 8)), parse_budget(text))


@pytest.mark.parametrize(("text", "message"), INFEASIBLE)
def test_an_infeasible_budget_is_refused(text: str, message: str) -> None:
    with pytest.raises(InfeasibleBudgetError, match=message):
        check_feasible(two_layers(), parse_budget(text))


def test_the_layers_that_dominate_are_the_users_modules_inside_the_scope() -> None:
    small = [replace(linear(n, f"w_{n}", "x"), module="block.attention") for n in ("q", "k")]
    large = linear("large", "w_large", "x", shape=(50, 4))
    with pytest.raises(InfeasibleBudgetError, match=r"in large \(89%\), block.attention \(11%\)\."):
        check_feasible(graph(*small, large), parse_budget("bops <= 1"))
    with pytest.raises(InfeasibleBudgetError, match=r"still 96 bop, .* block.attention \(100%\)\."):
        check_feasible(graph(*small, large), parse_budget("bops[block.*] <= 1"))


RELEVANCE = [
    ("bops <= 1%", {"w1": True, "x": True, "w2": True, "h": True}),
    ("weights <= 30", {"w1": True, "x": False, "w2": True, "h": False}),
    ("macs <= 50%", {"w1": False, "x": False, "w2": False, "h": False}),
]


@pytest.mark.parametrize(("text", "expected"), RELEVANCE)
def test_relevance(text: str, expected: dict[str, bool]) -> None:
    found = relevance(two_layers(), parse_budget(text))
    assert found == {name: (flag,) for name, flag in expected.items()}
    pruned = relevance(two_layers((0, 8)), parse_budget("macs <= 50%"))
    assert pruned["h"] == (True,)


@pytest.mark.parametrize("function", [max, min])
def test_what_shows_at_one_end_only_is_relevant(function: Callable[[int, int], float]) -> None:
    class Wider(Wires):
        def node_cost(self, node: NodeFacts, bits: NodeBits) -> float:
            return bits.mean(function)

    assert relevance(ONE_LAYER, Budget((Wider() <= 1.0,))) == {"w": (True,), "x": (True,)}


def test_all_that_a_peak_reads_is_relevant() -> None:
    """Neither layer sets the peak alone, whichever end the others are at."""

    class Widest(Wires):
        additive = False

        def graph_cost(self, graph: GraphFacts, bits: GraphBits) -> float:
            return max(n.macs * b.weight for n, b in zip(graph.nodes, bits.nodes, strict=True))

    large = linear("large", "w_large", "x", shape=(100, 4))
    facts = graph(large, *(linear(n, f"w_{n}", "x") for n in ("first", "second")))
    budget = Budget((Widest() <= 1e9,))
    found = relevance(facts, budget)
    assert found == dict.fromkeys(facts.quantizers, (True,))
    assert relevance(facts, parse_budget("activations <= 1 MB")) == {
        name: (False,) for name in facts.quantizers
    }


LAYERS = graph(
    *(linear(f"fc{i}", f"w{i}", "x", shape=(size, 4)) for i, size in enumerate((40, 30, 20, 10))),
    widths=(2, 4, 8),
)


def test_three_layers_that_dominate_are_named() -> None:
    low = Ledger(LAYERS, parse_budget("bops <= 1, weights <= 1"), lowest_bits(LAYERS))
    assert dominating(low, 0) == "fc0 (40%), fc1 (30%), fc2 (20%)"
    # weights of 40, 30, 20 and 10 bytes, biases of 160, 120, 80 and 40
    assert dominating(low, 1) == "fc0 (40%), fc1 (30%), fc2 (20%)"


def test_only_the_first_layers_are_listed() -> None:
    facts = graph(*(linear(f"fc{i}", "w", "x") for i in range(23)))
    with pytest.raises(BudgetError, match=r"fc0, .* fc19 and 3 more$"):
        Ledger(facts, parse_budget("bops[x] <= 1%"), lowest_bits(facts))


def test_what_costs_nothing_is_dominated_by_nothing() -> None:
    pruned = two_layers((0, 8))
    ledger = Ledger(pruned, parse_budget("macs <= 1"), lowest_bits(pruned))
    assert dominating(ledger, 0) == "fc1 (0%), fc2 (0%)"


def test_what_dominates_a_part_is_in_it() -> None:
    ledger = Ledger(LAYERS, parse_budget("bops[fc?] <= 1, bops[fc3] <= 1"), lowest_bits(LAYERS))
    assert dominating(ledger, 0) == "fc0 (40%), fc1 (30%), fc2 (20%)"
    assert dominating(ledger, 1) == "fc3 (100%)"


# Of 400 MACs at 2 x 2 bits: 1,600 BOPs.
HINTS = [
    ("bops <= 1", r"bops <= 1 bop is asked for \(a share is .* as in \"bops <= 1%\"\), but"),
    ("bops <= 100", r"bops <= 100 bop is asked for \(a share .* as in \"bops <= 100%\"\), but"),
    ("bops <= 101", r"bops <= 101 bop is asked for, but .* it is still 1600 bop, most of it in"),
    ("bops <= 0.1%", r"bops <= 0\.1% is asked for, but .* it is still 0\.3907%, most of it in"),
    ("bops[fc3] <= 1", r"bops\[fc3\] <= 1 bop .* \"bops\[fc3\] <= 1%\"\), .* in fc3 \(100%\)"),
]


@pytest.mark.parametrize(("text", "message"), HINTS)
def test_a_share_without_its_sign_is_suspected(text: str, message: str) -> None:
    with pytest.raises(InfeasibleBudgetError, match=message):
        check_feasible(LAYERS, parse_budget(text))


def test_a_small_number_that_was_meant_gets_no_hint() -> None:
    small = graph(linear("fc", "w", "x", shape=(3, 4)))  # 48 BOPs
    with pytest.raises(InfeasibleBudgetError, match="bops <= 47 bop is asked for, but"):
        check_feasible(small, parse_budget("bops <= 47"))


def test_only_three_other_quantizers_are_named() -> None:
    class Falling(Wires):
        def node_cost(self, node: NodeFacts, bits: NodeBits) -> float:
            return 40 - bits.weight

    for names, shown in (
        ("abc", r"\(x: 2 bits, w_b: 2 bits, w_c: 2 bits\)"),
        ("abcd", r"\(x: 2 bits, w_b: 2 bits, w_c: 2 bits, \.\.\.\)"),
    ):
        facts = graph(*(linear(n, f"w_{n}", "x") for n in names), widths=(2, 4, 8))
        with pytest.raises(CostModelError, match=f"w_a goes from 2 to 4 bits .*{shown}"):
            check_cost_models(facts, Budget((Falling() <= 1e9,)))


@pytest.mark.parametrize(
    ("step", "message"), [(1, "gives 1.0 and then 4.0"), (-1, "gives 99.0 and")]
)
def test_the_same_bits_cost_the_same_again(step: int, message: str) -> None:
    class Seen(Wires):
        """Another cost every time that all have 2 bits; all else costs the same."""

        cost = 100 if step < 0 else 0

        def node_cost(self, node: NodeFacts, bits: NodeBits) -> float:
            if (bits.weight, bits.activation) != (2, 2):
                return 200.0
            self.cost += step
            return float(self.cost)

    with pytest.raises(CostModelError, match=f"'wires' {message} .* depend on hidden state"):
        check_cost_models(ONE_LAYER, Budget((Seen() <= 1e9,)))


def test_equal_costs_and_zero_keep_the_contract() -> None:
    check_cost_models(ONE_LAYER, Budget((Table(dict.fromkeys(FINE, 0.0)) <= 1.0,)))
    with pytest.raises(CostModelError, match="gives -1e-09 with everything at 32 bits"):
        check_cost_models(ONE_LAYER, Budget((Table({**FINE, 32: -1e-9}) <= 1.0,)))


def test_a_cost_of_nodes_does_not_depend_on_tensors() -> None:
    """Of the two quantizers, a node reads one, and a tensor is on the grid of the other."""

    class Widest(Wires):
        additive = False

        def graph_cost(self, graph: GraphFacts, bits: GraphBits) -> float:
            return max(b.weight for b in bits.nodes)

    own = {"w": quantizer("w"), "t": quantizer("t")}
    tensors = (TensorFacts("t", 8, 0, 0, "t"),)
    facts = GraphFacts((linear("fc", "w", None),), own, tensors=tensors)
    budget = Budget((Widest() <= 9.0, *parse_budget("activations <= 1 kB")))
    assert relevance(facts, budget) == {"w": (True, False), "t": (False, True)}


def test_each_constraint_has_a_relevance_of_its_own() -> None:
    found = relevance(two_layers(), parse_budget("weights <= 30, bops <= 1%, bops[fc2] <= 1%"))
    assert found == {
        "w1": (True, True, False),
        "x": (False, True, False),
        "w2": (True, True, True),
        "h": (False, True, True),
    }


def test_a_cost_is_the_sum_over_nodes_unless_overridden() -> None:
    facts = graph(linear("a", "w", "x"), linear("b", "v", "x"), linear("c", "u", "x"))
    facts = replace(
        facts, nodes=tuple(replace(n, module="m") for n in facts.nodes[:2]) + facts.nodes[2:]
    )
    found = graph_bits(facts, {"w": bits(2), "v": bits(4), "u": bits(8), "x": bits(8)})
    assert Wires().graph_cost(facts, found) == 2 + 4 + 8
    assert Wires().parts(facts, found) == {"m": 2 + 4, "c": 8}


def test_names_close_to_one_that_is_known_are_suggested() -> None:
    message = (
        r"no cost model named 'BOPs'; did you mean 'bops'\? Known are activations, arena, bops"
    )
    with pytest.raises(UnknownCostError, match=message):
        cost_model("BOPs")
    with pytest.raises(UnknownCostError, match="named 'zzz'; known are activations, arena, bops"):
        cost_model("zzz")
