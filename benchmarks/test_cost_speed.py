"""How long a ledger takes on a graph of 1,000 compute nodes.

    python -m pytest benchmarks/test_cost_speed.py

How fast machines are differs, and what else they do, so the best times are compared: a full
evaluation may take 20 times as long as `yardstick`, a move of one gate or a trial 0.12 times. That
took 0.9 ms where the limits were set. The planner of `arena` places every tensor anew and is
measured apart, without a limit.
"""

import time
from itertools import cycle

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from cgmq_fx.cost_models import (
    BitArray,
    GraphFacts,
    Ledger,
    NodeFacts,
    Operand,
    QuantizerFacts,
    Role,
    Stored,
    TensorFacts,
    parse_budget,
    uniform_bits,
)

pytestmark = pytest.mark.benchmark(timer=time.process_time)  # whatever else runs does not count

NODES = 1000
CHANNELS = 32
WIDTHS = (2, 4, 8, 16, 32)
BOUNDS = {
    "bops": "bops <= 5%",
    "weights": "weights <= 20%",
    "activations": "activations <= 30%",
    "together": "bops <= 5%, weights <= 20%, activations <= 30%",
}
MOVE_LIMIT, FULL_LIMIT = 0.12, 20.0


def chain(gates: int) -> GraphFacts:
    """A chain of 1,000 convolutions; every fourth output is read again four steps later."""
    names = [f"{kind}{i}" for i in range(NODES) for kind in ("w", "x")]
    roles = {"w": Role.WEIGHT, "x": Role.ACTIVATION}
    owned = {"w": gates, "x": 1}
    quantizers = {
        n: QuantizerFacts(n, roles[n[0]], owned[n[0]], WIDTHS, elements=9 * CHANNELS**2)
        for n in names
    }
    nodes = tuple(
        NodeFacts(
            name=f"conv{i}",
            op="aten.conv2d.default",
            macs=9 * CHANNELS**2 * (100 + i),
            operands=(
                Operand(Role.WEIGHT, 9 * CHANNELS**2, f"w{i}", (1, gates, 1, 1)),
                Operand(Role.ACTIVATION, CHANNELS * (100 + i), f"x{i}", (1, 1, 1, 1)),
            ),
            stored=(
                Stored(f"conv{i}.weight", 9 * CHANNELS**2, f"w{i}"),
                Stored(f"conv{i}.bias", CHANNELS),
            ),
        )
        for i in range(NODES)
    )
    tensors = tuple(
        TensorFacts(f"t{i}", CHANNELS * (100 + i), i, i + (1 if i % 4 else 4), f"x{i}")
        for i in range(NODES)
    )
    return GraphFacts(nodes, quantizers, tensors=tensors)


@pytest.fixture(scope="module", params=[1, CHANNELS], ids=["tensor", "channel"])
def facts(request: pytest.FixtureRequest) -> GraphFacts:
    return chain(request.param)


def ledger_of(facts: GraphFacts, budget: str) -> Ledger:
    return Ledger(facts, parse_budget(budget), uniform_bits(facts, 8))


def raised(facts: GraphFacts, name: str) -> tuple[BitArray, BitArray]:
    """A quantizer's bits with one gate at 16 bits, and with that gate back at 8."""
    before = np.full(facts.quantizers[name].gates, 8)
    after = before.copy()
    after[0] = 16
    return after, before


@pytest.mark.parametrize("name", ["w500", "x500"])
@pytest.mark.parametrize("budget", BOUNDS)
def test_move(benchmark: BenchmarkFixture, facts: GraphFacts, budget: str, name: str) -> None:
    ledger = ledger_of(facts, BOUNDS[budget])
    states = cycle(raised(facts, name))
    benchmark(lambda: ledger.move(name, next(states)))
    within(benchmark, MOVE_LIMIT)


@pytest.mark.parametrize("name", ["w500", "x500"])
@pytest.mark.parametrize("budget", BOUNDS)
def test_trial(benchmark: BenchmarkFixture, facts: GraphFacts, budget: str, name: str) -> None:
    ledger = ledger_of(facts, BOUNDS[budget])
    bits, _ = raised(facts, name)
    totals = benchmark(lambda: ledger.trial(name, bits))
    assert totals[0] >= ledger.totals[0]
    within(benchmark, MOVE_LIMIT)


@pytest.mark.parametrize("budget", BOUNDS)
def test_full_evaluation(benchmark: BenchmarkFixture, facts: GraphFacts, budget: str) -> None:
    parsed, bits = parse_budget(BOUNDS[budget]), uniform_bits(facts, 8)
    benchmark(lambda: Ledger(facts, parsed, bits))
    within(benchmark, FULL_LIMIT)


def test_arena_trial(benchmark: BenchmarkFixture, facts: GraphFacts) -> None:
    ledger = ledger_of(facts, "arena <= 30%")
    bits, _ = raised(facts, "x500")
    assert benchmark(lambda: ledger.trial("x500", bits))[0] > 0


def within(benchmark: BenchmarkFixture, limit: float) -> None:
    """Within the limit at best; nothing is measured under `--benchmark-disable`."""
    if benchmark.stats is not None:
        shortest = yardstick()
        benchmark.extra_info["yardstick"] = shortest
        assert benchmark.stats.stats.min < limit * shortest


def yardstick() -> float:
    """Seconds that some plain Python and numpy take here, at best."""
    gates, taken = np.arange(CHANNELS), []
    for _ in range(100):
        start = time.process_time()
        found: dict[int, tuple[int, int]] = {}
        total = 0
        for i in range(2000):
            found[i] = (i, total)
            total += found[i][0] * 3
        for _ in range(200):
            total += int((gates * np.full(CHANNELS, 8)).sum())
        taken.append(time.process_time() - start)
    return min(taken)
