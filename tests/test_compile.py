"""Training through `torch.compile`: one graph, whatever the bits do."""

from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy

import cgmq_fx
from benchmarks.resnet20 import ResNet20


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )


pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower")  # on Python 3.13.0

DATA = [(torch.rand(8, 1, 8, 8), torch.randint(3, (8,))) for _ in range(10)]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


IMAGES = [(torch.rand(4, 3, 32, 32), torch.randint(10, (4,))) for _ in range(10)]


@pytest.mark.parametrize(
    ("make", "data"), [(net, DATA), (ResNet20, IMAGES)], ids=["small", "ResNet-20"]
)
def test_gates_that_move_compile_nothing_again(
    make: Callable[[], nn.Module], data: list[tuple[Tensor, Tensor]]
) -> None:
    run = cgmq_fx.prepare(make(), "bops <= 2%", data[0][0], search_steps=80)
    run.calibrate(data[:2])
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = torch.compile(run.model, backend=counter, fullgraph=True)
    optimizer = torch.optim.Adam(run.model.parameters(), 1e-3)
    seen = set()
    for inputs, target in data[:9]:
        optimizer.zero_grad()
        cross_entropy(model(inputs), target).backward()
        optimizer.step()
        run.step()
        seen.add(tuple(run.controller.levels.tolist()))
    assert len(seen) > 2
    assert counter.frame_count == 1


def test_compiled_training_ends_like_any_other() -> None:
    results = [
        cgmq_fx.quantize(
            net(), "bops <= 2%", DATA, loss=cross_entropy, epochs=2, progress=False, compile=how
        )
        for how in (False, "aot_eager")
    ]
    assert not counters["graph_break"]
    values = [[state.value for state in r.cost.states] for r in results]
    assert values[0] == values[1]
    inputs = DATA[0][0]
    torch.testing.assert_close(*(r.model(inputs) for r in results), rtol=1e-3, atol=1e-3)
