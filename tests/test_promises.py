"""What a result and a budget tell: rounding up, the plan of the arena, hidden state."""

import pytest
import torch
from torch import nn

import cgmq_fx
from cgmq_fx.cost_models.target import Row


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def test_what_a_target_cannot_run_is_reported() -> None:
    result = cgmq_fx.prepare(
        net(), "bops <= 0.5%, latency <= 1 s", torch.rand(2, 1, 8, 8), target="cortex-m7"
    ).finalize()
    found = result.cost.rounded_up()
    assert any(line.startswith("cortex-m7 runs 0 (2x") and line.endswith("8x8") for line in found)
    assert all(line in str(result) for line in found)


# 3 x 8 bits fit into both pairs: 4 x 8 takes less energy and 8 x 8 less time, 8 x 3 would be 8 x 8.
BILLED = [("energy <= 1 J", "4x8"), ("latency <= 1 s", "8x8")]


@pytest.mark.parametrize(("budget", "pair"), BILLED)
def test_what_is_reported_is_the_pair_that_is_billed(budget: str, pair: str) -> None:
    rows = (Row(4, 8, cycles=3.0, picojoules=1.0), Row(8, 8, cycles=2.0, picojoules=5.0))
    chip = cgmq_fx.Target("toy", "A toy.", "Made up.", {"*": rows}, clock=1e6)
    scheme = cgmq_fx.Scheme((8,), weight_widths=(3,))
    result = cgmq_fx.prepare(
        nn.Linear(16, 8), budget, torch.rand(2, 16), scheme=scheme, target=chip
    ).finalize()
    (line,) = result.cost.rounded_up()
    assert line.endswith(f"(3x8 bits) as {pair}")
    billed = {"4x8": 16 * 8 * 1e-12, "8x8": 16 * 8 * 2 / 1e6}
    assert result.cost[budget.partition(" ")[0]].value == pytest.approx(billed[pair])


def test_the_plan_of_the_arena_is_returned() -> None:
    result = cgmq_fx.prepare(
        net(), "arena <= 100 B", torch.rand(2, 1, 8, 8), scheme=cgmq_fx.Scheme((2, 4))
    ).finalize()
    plan = result.cost.arena()
    assert plan.size == result.cost["arena"].value
    assert [a.name for a in plan.allocations][:2] == ["input_1", "conv2d"]


def test_a_cost_with_hidden_state_is_refused() -> None:
    class Counts(cgmq_fx.CostModel):
        """Costs more every time."""

        name, unit = "counts", "call"
        calls = 0

        def node_cost(self, node: cgmq_fx.NodeFacts, bits: cgmq_fx.NodeBits) -> float:
            self.calls += 1
            return float(self.calls)

    with pytest.raises(cgmq_fx.CostModelError, match="hidden state"):
        cgmq_fx.prepare(net(), Counts() <= 1e9, torch.rand(2, 1, 8, 8))
