"""How far the controller moves gates, and what it remembers: exact numbers."""

from typing import Any

import numpy as np
import pytest
import torch

from cgmq_fx.controller import Controller
from cgmq_fx.cost_models import GraphFacts, NodeFacts, QuantizerFacts, Role, Stored, parse_budget
from tests.cost_helpers import bits
from tests.test_channels import READER
from tests.test_controller import WIDTHS, feed, toy, toy_controller


def weights(*elements: int) -> GraphFacts:
    names = {f"w{i}": e for i, e in enumerate(elements)}
    nodes = (
        NodeFacts(n, "aten.linear.default", stored=(Stored(n, e, n),)) for n, e in names.items()
    )
    own = {n: QuantizerFacts(n, Role.WEIGHT, 1, WIDTHS, e) for n, e in names.items()}
    return GraphFacts(tuple(nodes), own)


# Five levels over a quarter of half the steps, and how long that takes at most.
@pytest.mark.parametrize(
    ("steps", "pace", "reach"), [(20, 2.0, 10), (60, 2 / 3, 30), (7, 40 / 7, 4), (1, 40.0, 1)]
)
def test_the_pace_follows_from_the_length_of_the_search(
    steps: int, pace: float, reach: int
) -> None:
    controller = toy((10, 10), 0.3, steps=steps)
    assert controller.reach == reach
    feed(controller, 1.0, 1.0)
    # both are the median, which moves at 0.625 of the pace
    expected = max(5 - 0.625 * pace, 0.5)
    assert controller.gates.tolist() == pytest.approx([expected, expected])


def test_gates_rise_by_the_eagerness_of_their_direction() -> None:
    controller = toy((10, 10, 10), 0.9, direction="gradient", steps=80)  # the pace is 1/2
    controller.start({"w0": bits(2), "w1": bits(2), "w2": bits(4)})
    assert controller.gates.tolist() == [0.5, 0.5, 1.5]
    feed(controller, 1.0, 2.0, 6.0)
    # a share of the pace: a third, a half, and three quarters
    assert controller.gates.tolist() == pytest.approx([0.5 + 1 / 6, 0.75, 1.875])


def test_what_is_not_violated_keeps_its_gates() -> None:
    budget = parse_budget("weights[w0] <= 20, weights[w1] <= 30, weights <= 200")
    controller = toy_controller(weights(10, 10, 10), budget)
    seen = []
    for _ in range(3):
        before = controller.gates.clone()
        feed(controller, 1.0, 1.0, 1.0)
        seen.append((controller.ledger.violated, (controller.gates < before).tolist()))
    # at 5 - 1.25 they have 16 bits, which is 20 bytes: neither is violated any longer
    assert seen[0] == ((), [True, True, False])
    assert not any(seen[1][1])


# Rates 1, 1/2 and 1/3, then 1/3 of every newer one: 60 x 0.05 = 3 steps.
def test_sensitivities_are_smoothed_over_a_share_of_the_search() -> None:
    controller = toy((10, 20), 0.3, direction="gradient", steps=60)
    expected = np.zeros(2)
    for step, value in enumerate((1.0, 3.0, 2.0, 5.0, 4.0)):
        feed(controller, value, 2 * value)
        estimate = np.array([10 * value**2, 20 * (2 * value) ** 2])
        rate = max(1 / (step + 1), 1 / 3)
        expected = expected + rate * (estimate - expected)
        assert controller.sensitivity.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("value", "expected"), [(float("nan"), 0.0), (1e30, 3e38), (-2.0, 40.0), (0.0, 0.0)]
)
def test_sensitivities_stay_finite(value: float, expected: float) -> None:
    controller = toy((10,), 0.3, direction="gradient")
    feed(controller, value)
    assert controller.sensitivity.tolist() == pytest.approx([expected])


def test_before_the_first_step_errors_count_relative_to_the_values() -> None:
    controller = toy((10, 20), 0.3)
    assert controller.sensitivity.tolist() == [1, 1]
    quantizers = {"a": QuantizerFacts("a", Role.WEIGHT, 4, WIDTHS, 40)}
    node = NodeFacts("n", "aten.linear.default", stored=(Stored("a", 40, "a"),))
    facts = GraphFacts((node,), quantizers)
    shared = toy_controller(facts, parse_budget("weights <= 100"))
    assert shared.sensitivity.tolist() == [0.25] * 4


# 10, 40 and 10 elements, everything else at 2 bits: 15 bytes and more.
CEILINGS = [
    (15.0, [1.0, 1.0, 1.0]),
    (17.5, [2.0, 1.0, 2.0]),  # 2.5 bytes take the small ones to 4 bits
    (25.0, [3.0, 2.0, 3.0]),  # 10 bytes the large one
    (45.0, [4.0, 3.0, 4.0]),
    (52.5, [5.5, 3.0, 5.5]),  # nothing holds them back
    (240.0, [5.5, 5.5, 5.5]),
]


@pytest.mark.parametrize(("limit", "expected"), CEILINGS)
def test_gates_rise_to_what_can_be_paid_for(limit: float, expected: list[float]) -> None:
    budget = parse_budget(f"weights <= {limit}")
    controller = toy_controller(weights(10, 40, 10), budget, "gradient", steps=20)
    lowest = {name: bits(2) for name in controller.assignment}
    for gate in range(3):
        controller.start(lowest)
        for _ in range(4):
            others = torch.full((3,), 0.5)
            controller.gates = torch.where(torch.arange(3) == gate, controller.gates, others)
            controller.gates = controller._bounded(controller.gates + 2.0)
        assert float(controller.gates[gate]) == expected[gate]


def test_a_gate_above_its_ceiling_is_not_pushed_down() -> None:
    controller = toy((10, 40), 0.24)
    controller.gates = torch.tensor([5.0, 5.0])
    assert controller._bounded(torch.tensor([9.0, 4.0])).tolist() == [5.0, 4.0]
    assert controller._bounded(torch.tensor([-1.0, 0.2])).tolist() == [0.5, 0.5]


STARTS: list[tuple[dict[str, Any], list[int]]] = [
    ({"w0": bits(2), "w1": bits(16)}, [0, 3]),
    ({"w1": bits(8)}, [4, 2]),
    ({"w0": bits(3)}, [1, 4]),  # what it may not have becomes the next that it may
    ({"w0": bits(64), "w1": bits(0)}, [4, 0]),
    ({"w0": bits(2, 2), "other": bits(2)}, [4, 4]),  # these are of another graph
    ({}, [4, 4]),
]


@pytest.mark.parametrize(("given", "levels"), STARTS)
def test_a_search_starts_from_bits(given: dict[str, Any], levels: list[int]) -> None:
    controller = toy((10, 30), 0.3)
    controller.start(given)
    assert controller.levels.tolist() == levels
    assert controller.gates.tolist() == [level + 0.5 for level in levels]
    assert {n: b.tolist() for n, b in controller.assignment.items()} == {
        f"w{i}": [WIDTHS[level]] for i, level in enumerate(levels)
    }
    size = sum(WIDTHS[level] * e / 8 for level, e in zip(levels, (10, 30), strict=True))
    (state,) = controller.states
    assert state.value == size
    assert controller.satisfied == (size <= 48) == state.satisfied


def test_of_the_states_that_satisfy_the_best_is_kept() -> None:
    controller = toy((10, 10), 0.5, direction="gradient")
    assert controller.state_dict()["best"] is None
    # at the same worth: 8 and 16 bits, then 4 and 16, which is worse, then 16 and 8
    for levels, best in (
        ([2, 3], [2, 3]),
        ([1, 3], [2, 3]),
        ([4, 3], [2, 3]),  # not satisfied
        ([3, 2], [3, 2]),  # as good
        ([0, 0], [3, 2]),
    ):
        controller._settle(torch.tensor(levels))
        assert controller.state_dict()["best"].tolist() == best


def test_the_search_ends_with_what_loses_least() -> None:
    controller = toy((10, 30, 10), 0.2, direction="gradient")
    feed(controller, 3.0, 1.0, 0.1)
    controller.freeze()
    worth = controller.sensitivity
    reached = controller.layout.loss(torch.from_numpy(controller.levels), worth)
    choices = np.array(np.meshgrid(*[range(5)] * 3)).reshape(3, -1).T
    size = (np.array(WIDTHS)[choices] * np.array([10, 30, 10]) / 8).sum(1)
    allowed = choices[size <= 0.2 * 4 * 50]
    best = min(controller.layout.loss(torch.from_numpy(c), worth) for c in allowed)
    assert reached == pytest.approx(best)


def pruned() -> Controller:
    """A layer whose channels can be pruned, and one with a gate per channel that reads it."""
    maker = NodeFacts("maker", "aten.linear.default", stored=(Stored("m", 9, "m"),))
    roles = {"m": (Role.WEIGHT, 3, 9), "w": (Role.WEIGHT, 6, 6), "a": (Role.ACTIVATION, 1, 3)}
    widths = (0, *WIDTHS[:-1])
    own = {
        n: QuantizerFacts(n, role, gates, widths, size) for n, (role, gates, size) in roles.items()
    }
    return toy_controller(GraphFacts((maker, READER), own), parse_budget("weights <= 1 kB"))


def test_gates_behind_pruned_channels_end_at_their_lowest() -> None:
    controller = pruned()
    controller.fix({"m": [2, 0, 8], "w": [2, 4, 8, 16, 4, 2], "a": 4})
    found = {n: b.tolist() for n, b in controller.assignment.items()}
    assert found == {"m": [2, 0, 8], "w": [2, 0, 8, 16, 0, 2], "a": [4]}
    assert controller.frozen


def state_of(controller: Controller, **changes: Any) -> dict[str, Any]:
    return controller.state_dict() | changes


@pytest.mark.parametrize("done", [0, 1, 7, 12, 20])
def test_a_controller_goes_on_from_its_state(done: int) -> None:
    whole, other = (toy((10, 30, 5), 0.2, steps=20) for _ in range(2))
    values = torch.rand(25, 3, generator=torch.Generator().manual_seed(0)).tolist()
    for row in values[:done]:
        feed(whole, *row)
    state = whole.state_dict()
    for row in values[20:]:
        feed(other, *row)
    other = toy((10, 30, 5), 0.2, steps=20)
    other.load_state_dict(state)
    assert (other.taken, other.frozen) == (min(done, 20), done == 20)
    for row in values[done:20]:
        feed(whole, *row)
        feed(other, *row)
        assert torch.equal(whole.gates, other.gates)
        assert torch.equal(whole.sensitivity, other.sensitivity)
    assert other.levels.tolist() == whole.levels.tolist()
    assert other.frozen
    assert whole.state_dict()["taken"] == other.state_dict()["taken"] == 20
    assert torch.equal(whole.state_dict()["best"], other.state_dict()["best"])


def test_a_long_search_ends_as_well() -> None:
    controller = toy((10, 30), 0.2, steps=3000)
    controller.load_state_dict(state_of(controller, taken=2998))
    feed(controller, 1.0, 2.0)
    assert not controller.frozen
    feed(controller, 1.0, 2.0)
    assert controller.frozen


def test_a_state_is_a_copy() -> None:
    controller = toy((10, 30, 5), 0.2, steps=20)
    for _ in range(12):
        feed(controller, 1.0, 2.0, 3.0)
    state = controller.state_dict()
    kept = {name: state[name].clone() for name in ("gates", "levels", "sensitivity", "best")}
    other = toy((10, 30, 5), 0.2, steps=20)
    other.load_state_dict(state)
    for _ in range(8):
        feed(controller, 3.0, 2.0, 1.0)
        feed(other, 3.0, 2.0, 1.0)
    assert all(torch.equal(state[name], own) for name, own in kept.items())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"gates": torch.ones(4)}, "the gates in the state are not those of this graph"),
    ({"levels": torch.ones(1, dtype=torch.int64)}, "the gates in the state are not those"),
    ({"sensitivity": torch.ones(2, 3)}, "the gates in the state are not those of this graph"),
    ({"best": torch.ones(4, dtype=torch.int64)}, "the gates in the state are not those of"),
    ({"levels": torch.tensor([0, 5, 0])}, "the state has levels that no gate can take"),
    ({"levels": torch.tensor([0, 0, -1])}, "the state has levels that no gate can take"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_the_state_of_another_graph_is_refused(changes: dict[str, Any], message: str) -> None:
    controller = toy((10, 30, 5), 0.2)
    with pytest.raises(ValueError, match=message):
        controller.load_state_dict(state_of(controller, **changes))
    assert controller.levels.tolist() == [4, 4, 4]
    controller.load_state_dict(state_of(controller, levels=torch.tensor([0, 4, 2])))
    assert controller.levels.tolist() == [0, 4, 2]


def test_statistics_are_no_longer_collected_after_the_search() -> None:
    controller = toy((10, 30), 0.2)
    assert all(q.probe is not None for q in controller._quantizers)
    controller.fix({"w0": 2, "w1": 2})
    assert all(q.probe is None and q.adjacent is None for q in controller._quantizers)
    with pytest.raises(ValueError, match="the bit-widths are frozen already"):
        controller.fix({"w0": 2})
