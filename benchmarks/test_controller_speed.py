"""The controller's step in the search, apart from training.

python -m pytest benchmarks/test_controller_speed.py
"""

import time

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import test_cost_speed
from cgmq_fx.calibrate import RangeTable
from cgmq_fx.controller import Controller
from cgmq_fx.cost_models import parse_budget
from cgmq_fx.directions import direction_of
from cgmq_fx.passes.quantizer import Quantizer, QuantizerSpec

pytestmark = pytest.mark.benchmark(timer=time.process_time)

STEPS = 1000
NOISE = torch.tensor([*(4.0 / (2**b - 1) ** 2 for b in (2, 4, 8, 16)), 0.0])


@pytest.mark.parametrize("budget", ["bops <= 5%", "bops <= 5%, weights <= 20%"])
@pytest.mark.parametrize("nodes", [30, 500], ids=["60 gates", "1000 gates"])
def test_step(
    benchmark: BenchmarkFixture, monkeypatch: pytest.MonkeyPatch, nodes: int, budget: str
) -> None:
    monkeypatch.setattr(test_cost_speed, "NODES", nodes)
    facts = test_cost_speed.chain(1)
    quantizers = {
        name: Quantizer(QuantizerSpec(q.role, True, q.bit_widths))
        for name, q in facts.quantizers.items()
    }
    table = RangeTable(torch.linspace(0, 0.3, 5), NOISE, 1.0)
    tables = dict.fromkeys(facts.quantizers, table)
    way = direction_of("marginal")
    controller = Controller(quantizers, facts, parse_budget(budget), tables, way, STEPS)
    probes = [q.probe for q in quantizers.values() if q.probe is not None]

    def report() -> None:
        for probe in probes:
            assert probe.grad is not None
            probe.grad.uniform_()

    benchmark.pedantic(controller.step, setup=report, rounds=STEPS - 1)  # type: ignore[no-untyped-call]
