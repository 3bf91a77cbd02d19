"""Random input for every loader: refused by an error of the library, or right. See `faults`."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.configurations import configuration, train
from benchmarks.mutate import change_bytes, change_json
from cgmq_fx import CgmqError
from cgmq_fx.cost_models import parse_budget
from cgmq_fx.cost_models.target import parse_target, target_to_json
from cgmq_fx.packing import pack, unpack

_LONGEST = 2000
ROOT = Path(__file__).parents[1]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
KEYS = st.sampled_from(["dict", "tuple", "tensor", "array", "float", "tables", "a"])
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS, v, max_size=2), max_leaves=6
)
TARGET = json.loads((ROOT / "cost_models" / "targets" / "cortex-m7.json").read_text())
PACKED = pack({"a": [torch.ones(2), (1, 2.5)], "b": {0: None}})


def refusal(load: Callable[[], object]) -> str | None:
    """What the library says of an input that it refuses; None if it reads a value from it."""
    try:
        assert load() is not None
    except CgmqError as error:
        return str(error)
    return None


def one_sentence(text: str | None) -> bool:
    """Whether a refusal, if it is one, is a short text without a traceback of ours."""
    return text is None or (0 < len(text) < _LONGEST and "Traceback" not in text)


@given(st.integers(0, 1 << 32))
def test_changed_targets_are_refused_or_read_back(seed: int) -> None:
    text = json.dumps(change_json(Random(seed), TARGET))
    with contextlib.suppress(CgmqError):
        target = parse_target(text.encode(), "the file")
        assert parse_target(json.dumps(target_to_json(target)).encode(), "again") == target


@given(st.integers(0, 1 << 32))
def test_targets_with_other_bytes_are_refused_or_read(seed: int) -> None:
    data = change_bytes(Random(seed), json.dumps(TARGET).encode())
    assert one_sentence(refusal(lambda: parse_target(data, "the file")))


@given(VALUES | st.dictionaries(st.sampled_from(["bops", "weights", "x"]), VALUES))
def test_budgets_of_any_kind_are_refused_or_read(value: Any) -> None:
    assert one_sentence(refusal(lambda: str(parse_budget(value))))


@given(VALUES)
def test_states_of_any_kind_are_refused_or_read(value: Any) -> None:
    assert one_sentence(refusal(lambda: [unpack(value, PACKED[1])]))


@settings(max_examples=200)
@given(st.integers(0, 1 << 32))
def test_changed_states_are_refused_or_read(seed: int) -> None:
    changed = change_json(Random(seed), PACKED[0])
    assert one_sentence(refusal(lambda: [unpack(changed, PACKED[1])]))


@pytest.mark.parametrize("seed", range(5))
def test_random_configurations_end_well(seed: int) -> None:
    rng = Random(seed)
    assert train(configuration(rng), rng) != "satisfied, not finite"


@pytest.mark.parametrize(
    "task",
    [["kill", "--points", "1"], ["fuzz", "--inputs", "25"]],
    ids=str,
)
def test_the_benchmark_of_faults_finds_none(task: list[str]) -> None:
    command = [sys.executable, "-m", "benchmarks.faults", *task]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
