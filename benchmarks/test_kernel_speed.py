"""The fake-quantize kernel against a copy of the tensor and other forms of it.

    python -m pytest benchmarks/test_kernel_speed.py --benchmark-group-by=param:size

Ratios from one run, side by side: `python -m benchmarks.ratios --part kernel`.
"""

import time

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.kernel_forms import (
    FORMS,
    GRANULARITIES,
    Inputs,
    available,
    copy,
    forward,
    forward_backward,
)

pytestmark = pytest.mark.benchmark(timer=time.process_time, max_time=0.2, min_rounds=3)

SIZES = {"1K": 2**10, "32K": 2**15, "1M": 2**20, "64M": 2**26}
SLOW = 2**22
ALL = [
    (size, granularity, form)
    for size in SIZES
    for granularity in GRANULARITIES
    for form in FORMS
    if available(form, granularity) and (form == "ours" or SIZES[size] < SLOW)
]
CASES = pytest.mark.parametrize(("size", "granularity", "form"), ALL)


@pytest.mark.parametrize("size", SIZES)
def test_copy(benchmark: BenchmarkFixture, size: str) -> None:
    inputs = Inputs.of(SIZES[size], "tensor")
    benchmark(lambda: copy(inputs))


@CASES
def test_forward(benchmark: BenchmarkFixture, size: str, granularity: str, form: str) -> None:
    inputs = Inputs.of(SIZES[size], granularity)
    benchmark(lambda: forward(form, inputs))


@CASES
def test_backward(benchmark: BenchmarkFixture, size: str, granularity: str, form: str) -> None:
    inputs = Inputs.of(SIZES[size], granularity)
    benchmark(lambda: forward_backward(form, inputs))
