"""Training through `torch.compile`: one graph, whatever the bits do."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy

import cgmq_fx
from benchmarks.resnet20 import ResNet20
from cgmq_fx.passes import native


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


@pytest.mark.skipif(
    shutil.which("g++") is None or not torch.backends.mkldnn.is_available(),
    reason="the compiler of PyTorch needs one for C++, and its convolutions oneDNN",
)
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # of PyTorch's own
def test_compiled_convolutions_and_quantizers_agree_about_the_layout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # not what is from other code
    seen: list[tuple[str, Tensor]] = []

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(native, name)

        def call(*args: Any) -> Any:
            seen.extend((name, t) for t in args[:2] if isinstance(t, Tensor) and t.dim() == 4)
            return original(*args)

        return call

    for name in ("forward", "backward"):
        monkeypatch.setattr(native, name, watched(name))
    torch.manual_seed(0)
    layers = [nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    images = torch.rand(4, 8, 12, 12)
    run = cgmq_fx.prepare(nn.Sequential(*layers), "bops <= 2%", images, search_steps=80)
    run.calibrate([(images, images)])
    seen.clear()
    torch.compile(run.model)(images.clone().requires_grad_()).square().sum().backward()
    between = [(name, t) for name, t in seen if t.shape[0] == 4 and t.shape[-1] < 12]
    assert {name for name, _ in between} == {"forward", "backward"}
    last = torch.channels_last
    assert all(t.is_contiguous(memory_format=last) for _, t in between), "copied to and fro"
