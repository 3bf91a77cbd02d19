"""The projection against an exact solver, on problems small enough for one."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp

from cgmq_fx.calibrate import RangeTable
from cgmq_fx.cost_models import (
    Bound,
    Budget,
    Constraint,
    GraphFacts,
    Ledger,
    NodeFacts,
    Operand,
    QuantizerFacts,
    Role,
    Stored,
    WeightMemory,
    highest_bits,
)
from cgmq_fx.gates import GateLayout, Levels
from cgmq_fx.projection import Projection

WIDTHS = [(2, 4, 8, 16, 32), (2, 4, 8), (0, 2, 4, 8), (3, 5, 6, 7, 8)]
PROBLEMS = 60
WITHIN = {"top": 0.001, "random": 0.006}
"""What the loss exceeds the least by, on average: random levels have more to be mended."""


@dataclass(frozen=True)
class Problem:
    """Weights to be stored: a multiple-choice knapsack, with a second bound on some of them.

    Attributes:
        graph: One node per quantizer, in two modules.
        layout: One gate per quantizer.
        sensitivity: Loss per squared step of each.
        budget: At most so many bytes.
    """

    graph: GraphFacts
    layout: GateLayout
    sensitivity: np.ndarray[tuple[int], np.dtype[np.float64]]
    budget: Budget

    @property
    def ledger(self) -> Ledger:
        """The account with everything at its most bits."""
        return Ledger(self.graph, self.budget, highest_bits(self.graph))

    def loss(self, levels: Levels) -> float:
        """The loss that the projection minimises."""
        return self.layout.loss(torch.from_numpy(levels), torch.from_numpy(self.sensitivity))


def draw(seed: int) -> Problem:
    """A random problem of 8 to 20 quantizers."""
    rng = random.Random(seed)
    widths = rng.choice(WIDTHS)
    names = [f"{rng.choice('ab')}.w{i}" for i in range(rng.randint(8, 20))]
    sizes = {n: round(10 ** rng.uniform(1, 4)) for n in names}
    nodes = tuple(
        NodeFacts(
            n,
            "aten.linear.default",
            macs=size,
            operands=(Operand(Role.WEIGHT, size, n), Operand(Role.ACTIVATION, size, None)),
            stored=(Stored(n, size, n),),
            module=n,
        )
        for n, size in sizes.items()
    )
    facts = {n: QuantizerFacts(n, Role.WEIGHT, 1, widths, size) for n, size in sizes.items()}
    noise = torch.tensor([12.0 if b == 0 else 4 / (2**b - 1) ** 2 for b in widths])
    tables = {
        n: RangeTable(torch.zeros(len(widths)), noise * 10 ** rng.uniform(-2, 0), 1.0)
        for n in names
    }
    total = sum(sizes.values())
    low, high = widths[0], min(widths[-1], 12)
    bounds = [Constraint(WeightMemory(), Bound(total * rng.uniform(low + 0.1, high) / 8))]
    part = sum(size for n, size in sizes.items() if n.startswith("a."))
    if part and rng.random() < 0.4:
        bits = rng.uniform(low + 0.1, high)
        bounds.append(Constraint(WeightMemory(), Bound(part * bits / 8), "a.*"))
    sensitivity = np.array([size * 10 ** rng.gauss(0, 0.7) for size in sizes.values()])
    return Problem(
        GraphFacts(nodes, facts),
        GateLayout.of(facts, tables),
        sensitivity,
        Budget(tuple(bounds)),
    )


def projected(problem: Problem, start: str) -> Levels:
    """Where the projection ends."""
    count = len(problem.layout.quantizers)
    levels = np.full(count, len(problem.layout.quantizers[0].bit_widths) - 1)
    ledger = problem.ledger
    if start == "random":
        levels = np.random.default_rng(0).integers(0, levels[0] + 1, count)
        for name, bits in problem.layout.assignment(levels).items():
            ledger.move(name, bits)
    return Projection(problem.layout, ledger, levels, problem.sensitivity).run()


def optimum(problem: Problem, known: float) -> Levels:
    """The best levels, by integer programming.

    Args:
        problem: The problem.
        known: A loss that can be reached: it scales the objective, and what exceeds it is left out.
    """
    widths = np.array(problem.layout.quantizers[0].bit_widths)
    loss = problem.sensitivity[:, None] * problem.layout.noise.double().numpy()
    choices, levels = loss.shape[0], widths.size
    one_each = np.kron(np.eye(choices), np.ones(levels))
    rows = [LinearConstraint(one_each, 1, 1)]
    for constraint in problem.budget:
        inside = [constraint.scope in (None, f"{q.name[0]}.*") for q in problem.layout.quantizers]
        size = [q.elements * i for q, i in zip(problem.layout.quantizers, inside, strict=True)]
        cost = np.kron(size, widths) / 8
        rows.append(LinearConstraint(cost / constraint.bound.value, -np.inf, 1))
    allowed = np.where(loss.ravel() <= known * (1 + 1e-9), 1, 0)
    found = milp(
        np.minimum(loss.ravel() / known, 1) * 1e4,
        constraints=rows,
        integrality=np.ones(loss.size),
        bounds=Bounds(0, allowed),
        options={"mip_rel_gap": 1e-6},
    )
    assert found.success
    best: Levels = found.x.reshape(loss.shape).argmax(1)
    return best


@pytest.mark.parametrize("start", WITHIN)
def test_the_projection_is_near_the_optimum(start: str) -> None:
    gaps = []
    for seed in range(PROBLEMS):
        problem = draw(seed)
        levels = projected(problem, start)
        ledger = Ledger(problem.graph, problem.budget, problem.layout.assignment(levels))
        assert ledger.satisfied, seed
        reached = problem.loss(levels)
        if reached > 0:
            gaps.append(reached / problem.loss(optimum(problem, reached)) - 1)
    assert len(gaps) > PROBLEMS / 2
    assert min(gaps) > -1e-3  # the oracle is one
    assert sum(gaps) / len(gaps) < WITHIN[start]
