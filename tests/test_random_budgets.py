"""A reduced run of `benchmarks.random_budgets`, and its judgement of right and wrong."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cgmq_fx
from benchmarks.random_budgets import PER_NET, Outcome, problems_of_net, raisable
from cgmq_fx.cost_models import parse_budget
from cgmq_fx.recount import count
from tests.random_nets import TinyCNN

IMAGES = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)


@pytest.mark.parametrize("net", range(8))
def test_budgets_are_met_without_slack_or_refused(net: int) -> None:
    found = problems_of_net(0, net, range(PER_NET * net, PER_NET * net + 4))
    assert [o.feasible for o in found] == [True, False] * 4
    assert [o for o in found if not o.right] == []


FINE = Outcome(0, True, "", "", 1, 0, satisfied=True, maximal=True)


@pytest.mark.parametrize(
    ("outcome", "right"),
    [
        (FINE, True),
        (replace(FINE, maximal=False), False),
        (replace(FINE, satisfied=False), False),
        (Outcome(0, True, "", "", 1, 0, refused=True), False),
        (Outcome(0, False, "", "", 1, 0, refused=True), True),
        (replace(FINE, feasible=False), False),
    ],
)
def test_what_counts_as_right(outcome: Outcome, right: bool) -> None:
    assert outcome.right == right


# The convolution has 36 weights and 4 biases, the linear layer 432 and 3: at 2 and 2 bits
# (36 + 432) / 4 + 7 * 4 = 145 bytes, at 4 and 2 bits 154, at 2 and 4 bits 253.
@pytest.mark.parametrize(
    ("bound", "found"),
    [(153, []), (154, ["conv_weight[0] 2 -> 4"]), (262, ["conv_weight[0] 2 -> 4", "head"])],
)
def test_slack_is_seen(bound: int, found: list[str]) -> None:
    result = cgmq_fx.prepare(TinyCNN(), "weights <= 145", IMAGES).finalize()
    budget = parse_budget(f"weights <= {bound}")
    seen = list(raisable(random.Random(0), count(result.model, result.inputs, budget), budget))
    assert [s[: len(f)] for s, f in zip(seen, found, strict=True)] == found


@pytest.mark.parametrize("text", ["bops <= 500% of 8 bits", "arena <= 250% of 8 bits"])
def test_a_share_of_8_bits_is_that_of_the_whole_model(text: str, tmp_path: Path) -> None:
    prepared = cgmq_fx.prepare(TinyCNN(), text, IMAGES)
    before = prepared.cost[0]
    result = prepared.finalize()
    assert len(result.cost.facts.quantizers) < len(prepared.facts.quantizers)  # some stay float
    same = cgmq_fx.load(result.save(tmp_path / "model.safetensors"))
    for state in (result.cost.states[0], same.cost.states[0]):
        assert (state.reference, state.limit) == (before.reference, before.limit)
        assert state.value <= state.limit
