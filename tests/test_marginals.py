"""What one level of each gate costs is what a full count says, also when only part is counted."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from cgmq_fx import Budget
from cgmq_fx.calibrate import RangeTable
from cgmq_fx.cost_models import (
    ActivationMemory,
    GraphFacts,
    Ledger,
    QuantizerFacts,
    Role,
    TensorFacts,
    WeightMemory,
    parse_budget,
)
from cgmq_fx.gates import GateLayout, Levels
from cgmq_fx.marginals import Marginals
from tests.cost_helpers import WIDTHS
from tests.test_ledger import chain

MIXED = chain((1, 2, 3, 1))
"""Nine quantizers, two of them with several gates; ten bytes per bit and more of tensors."""


def laid_out(graph: GraphFacts) -> GateLayout:
    table = RangeTable(torch.zeros(5), torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0]), 1.0)
    return GateLayout.of(graph.quantizers, dict.fromkeys(graph.quantizers, table))


class Case:
    """Gates, their costs, and the marginals that follow them."""

    def __init__(self, graph: GraphFacts, budget: Budget, steps: int, level: int = 4) -> None:
        self.layout = laid_out(graph)
        self.levels: Levels = np.full(self.layout.starts[-1], level, dtype=np.int64)
        self.ledger = Ledger(graph, budget, self.layout.assignment(self.levels))
        self.marginals = Marginals(self.layout, self.ledger, steps)

    def move(self, levels: Levels) -> None:
        changed = torch.from_numpy(levels != self.levels)
        self.levels = levels
        self.ledger.assign(self.layout.widths_at(torch.from_numpy(levels)).numpy())
        self.marginals.moved(changed)

    def at(self, step: int) -> list[list[float]]:
        """Freed and taken, gate by gate."""
        return [found.tolist() for found in self.marginals.at(self.levels, step)]

    def counted(self) -> list[Any]:
        """The same by a new account per level of each quantizer, moving one gate of that level."""
        violated = self.ledger.violated or tuple(range(len(self.ledger.limits)))
        columns = {-1: violated, 1: tuple(range(len(self.ledger.limits)))}
        return [
            pytest.approx([self.share(gate, step, columns[step]) for gate in self.gates()])
            for step in (-1, 1)
        ]

    def gates(self) -> range:
        return range(self.levels.size)

    def share(self, gate: int, step: int, constraints: tuple[int, ...]) -> float:
        owner = int(self.layout.owner[gate])
        own = slice(*self.layout.starts[owner : owner + 2])
        first = own.start + int((self.levels[own] == self.levels[gate]).argmax())
        more = self.levels.copy()
        more[first] += step
        if not 0 <= more[first] < len(WIDTHS):
            return 0.0
        graph, budget = self.ledger.graph, self.ledger.budget
        after = Ledger(graph, budget, self.layout.assignment(more))
        pairs = ((after.totals[c] - self.ledger.totals[c], after.limits[c]) for c in constraints)
        return sum(abs(change) / limit for change, limit in pairs)


ADDITIVE = parse_budget("bops <= 12%, weights <= 60 B, bops[fc2] <= 100")
PEAK = Budget((*ADDITIVE, ActivationMemory() <= 20.0))


@pytest.mark.parametrize("budget", [ADDITIVE, PEAK], ids=["sums", "with a peak"])
@pytest.mark.parametrize("seed", range(3))
def test_marginals_are_those_of_a_full_count(budget: Budget, seed: int) -> None:
    rng = np.random.default_rng(seed)
    case = Case(MIXED, budget, steps=100)
    seen = set()
    for step in range(12):
        assert case.at(step) == case.counted()
        seen.add(case.ledger.violated)
        some = rng.random(case.levels.size) < 0.3
        lower = rng.integers(0, max(1, 5 - step // 2), case.levels.size)
        case.move(np.where(some | (step == 8), lower, case.levels))
    assert len(seen) > 1


def test_nothing_violated_counts_everything() -> None:
    case = Case(MIXED, parse_budget("bops <= 100%, weights <= 100%"), steps=10, level=2)
    assert case.ledger.violated == ()
    freed, taken = case.at(0)
    assert [freed, taken] == case.counted()
    assert min(freed) > 0
    assert min(taken) > 0


def test_in_long_searches_costs_are_counted_now_and_then() -> None:
    """0.5 % of 1,000 steps are five."""
    case = Case(MIXED, parse_budget("weights <= 1 kB"), steps=1000)
    before = case.at(0)
    case.move(case.levels - 1)
    assert [case.at(step) for step in (1, 2, 3, 4)] == [before] * 4
    after = case.at(5)
    assert after == case.counted()
    assert after != before
    case.move(case.levels - 1)
    assert case.at(9) == after
    assert case.at(10) == case.counted()


def test_what_is_violated_counts_at_once() -> None:
    budget = parse_budget("bops <= 20%, weights <= 1 kB")
    case = Case(MIXED, budget, steps=1000)
    assert list(case.ledger.violated) == [0]
    assert case.at(1) == case.counted()
    case.move(case.levels - 2)
    assert not case.ledger.violated
    freed, taken = case.at(2)
    weights = Case(MIXED, Budget((WeightMemory() <= "1 kB",)), steps=1000).at(0)
    bops = Case(MIXED, parse_budget("bops <= 20%"), steps=1000).at(0)
    assert taken == pytest.approx([a + b for a, b in zip(weights[1], bops[1], strict=True)])
    assert freed == pytest.approx([a + b for a, b in zip(weights[0], bops[0], strict=True)])
    case.move(case.levels + 2)
    assert case.at(3) == [pytest.approx(bops[0]), taken]
    assert case.at(4) == [pytest.approx(bops[0]), taken]


MANY = 40


def peaks() -> GraphFacts:
    """Tensors of 8 elements that are alive together, and later one of 1,000."""
    tensors = [TensorFacts(f"t{i}", 8, 0, 0, f"t{i}") for i in range(MANY)]
    tensors.append(TensorFacts("large", 1000, 1, 1, "large"))
    own = {t.name: QuantizerFacts(t.name, Role.ACTIVATION, 1, WIDTHS, 8) for t in tensors}
    return GraphFacts((), own, tensors=tuple(tensors))


# At 16 bits the many take 640 bytes, 16 each; the large one 1,000 at 8 bits and 500 at 4.
def large_at(case: Case, level: int) -> None:
    case.move(np.array([3] * MANY + [level]))


@pytest.mark.parametrize(("steps", "each"), [(100, 16), (400, 32)])
def test_what_has_not_moved_is_counted_in_turns(steps: int, each: int) -> None:
    case = Case(peaks(), Budget((ActivationMemory() <= 400.0,)), steps, level=3)
    assert case.at(0) == [pytest.approx([0] * MANY + [2.5]), [0] * MANY + [5]]
    large_at(case, 1)
    wait = each // 16
    for turn in range(1, 4):
        known = min(turn * each, MANY)
        freed, taken = case.at(turn * wait)
        assert freed == pytest.approx([8 / 400] * known + [0] * (MANY - known) + [0])
        assert taken == pytest.approx([16 / 400] * known + [0] * (MANY - known) + [360 / 400])
    assert case.at(4 * wait) == case.counted()


def test_turns_go_on_where_they_were() -> None:
    case = Case(peaks(), Budget((ActivationMemory() <= 400.0,)), steps=100, level=3)
    case.at(0)
    large_at(case, 1)
    case.at(1)
    large_at(case, 2)
    freed, _ = case.at(2)  # what was counted before is old; the next are counted now
    assert freed == pytest.approx([8 / 400] * 15 + [0] * (MANY - 15) + [360 / 400])


def run(case: Case, seed: int, steps: range) -> list[list[list[float]]]:
    found = []
    for step in steps:
        rng = np.random.default_rng((seed, step))
        case.move(rng.integers(0, 5, case.levels.size))
        found.append(case.at(step))
    return found


@pytest.mark.parametrize("steps", [100, 1000])
@pytest.mark.parametrize("graph", [MIXED, peaks()], ids=["mixed", "peaks"])
def test_a_state_goes_on_as_if_it_had_never_been_kept(graph: GraphFacts, steps: int) -> None:
    budget = Budget((ActivationMemory() <= 20.0,))
    budget = budget if graph is not MIXED else Budget((*budget, *ADDITIVE))
    whole, other = Case(graph, budget, steps), Case(graph, budget, steps)
    run(whole, 0, range(8))
    state = whole.marginals.state_dict()
    run(other, 1, range(3))
    other.move(whole.levels)
    other.marginals.load_state_dict(state)
    assert run(other, 2, range(8, 14)) == run(whole, 2, range(8, 14))


def test_a_state_that_has_been_kept_does_not_change() -> None:
    case = Case(MIXED, ADDITIVE, steps=100)
    case.at(0)
    state = case.marginals.state_dict()
    kept = {name: state[name].clone() for name in ("freed", "taken")}
    other = Case(MIXED, ADDITIVE, steps=100)
    other.marginals.load_state_dict(state)
    run(case, 0, range(1, 4))
    run(other, 0, range(1, 4))
    assert all(torch.equal(state[name], own) for name, own in kept.items())


def fresh_state() -> Mapping[str, Any]:
    case = Case(MIXED, ADDITIVE, steps=100)
    case.at(0)
    return case.marginals.state_dict()


def test_a_state_from_before_the_first_step_is_taken() -> None:
    case, whole = (Case(MIXED, ADDITIVE, steps=100) for _ in range(2))
    case.marginals.load_state_dict(whole.marginals.state_dict())
    assert case.at(0) == whole.at(0) == case.counted()


def narrower(tensor: Tensor) -> Tensor:
    return tensor[..., 1:]


DAMAGED: dict[str, dict[str, Any]] = {
    "freed": {"freed": narrower(fresh_state()["freed"])},
    "taken": {"taken": narrower(fresh_state()["taken"])},
    "one quantizer less": {"turns": list(range(8))},
    "one quantizer more": {"turns": list(range(10))},
    "stale": {"stale": [9]},
    "waiting": {"waiting": [-1]},
    "gates": {"current": [narrower(own) for own in fresh_state()["current"]]},
    "half of the gates": {
        "current": [fresh_state()["current"][0], narrower(fresh_state()["current"][1])]
    },
}


@pytest.mark.parametrize("changes", DAMAGED.values(), ids=DAMAGED)
def test_the_state_of_another_graph_is_refused(changes: dict[str, Any]) -> None:
    case = Case(MIXED, ADDITIVE, steps=100)
    before: npt.NDArray[np.float64] = np.array(case.at(0))
    with pytest.raises(ValueError, match="not those of this graph and budget"):
        case.marginals.load_state_dict({**fresh_state(), **changes})
    assert np.array(case.at(1)).tolist() == before.tolist()
    case.marginals.load_state_dict(fresh_state())
