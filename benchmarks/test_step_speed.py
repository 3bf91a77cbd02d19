"""Training steps, frozen inference and memory of whole networks against float and against others.

    python -m pytest benchmarks/test_step_speed.py --benchmark-group-by=param:net

Ratios from one run, side by side: `python -m benchmarks.ratios`.
"""

import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from benchmarks.peak_memory import peak_of
from benchmarks.peers import PEERS, converted, installed
from benchmarks.ratios import batch_of, prepared, stepping
from benchmarks.step_nets import NETS

pytestmark = pytest.mark.benchmark(timer=time.process_time, max_time=0.5, min_rounds=3)

MEMORY_GOAL = 1.25
ALL_NETS = pytest.mark.parametrize("net", NETS)


def made(net: str, variant: str) -> Callable[[], None]:
    make, shape = NETS[net]
    torch.manual_seed(0)
    model, batch = make().train(), batch_of(shape)
    if variant == "ours":
        run = prepared(model, shape)
        return stepping(run.model, batch, run.step)
    peer = variant != "float"
    return stepping(converted(model, variant, batch[0]) if peer else model, batch)


@ALL_NETS
@pytest.mark.parametrize("variant", ["float", "ours", *PEERS])
def test_step(benchmark: BenchmarkFixture, net: str, variant: str) -> None:
    if not installed(variant):
        pytest.skip(f"{variant} is not installed")
    benchmark(made(net, variant))


@ALL_NETS
@pytest.mark.parametrize("frozen", [False, True], ids=["float", "frozen"])
def test_inference(benchmark: BenchmarkFixture, net: str, frozen: bool) -> None:
    make, shape = NETS[net]
    model: nn.Module = make().eval()
    if frozen:
        model = prepared(model, shape).finalize().model.eval()
    images = torch.rand(shape)

    def infer() -> None:
        with torch.no_grad():
            model(images)

    benchmark(infer)


@ALL_NETS
def test_peak_memory(net: str) -> None:
    ratio = peak_of(made(net, "ours")) / peak_of(made(net, "float"))
    assert ratio <= MEMORY_GOAL
