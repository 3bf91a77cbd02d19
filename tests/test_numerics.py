"""Odd numbers: right or refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cgmq_fx import DataError, Result, Scheme, prepare, quantize

INF, NAN = float("inf"), float("nan")


def net(scale: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.mul_(scale)
    return layers


def channels_last(model: nn.Module) -> nn.Module:
    convert: Any = model.to  # its annotations lack the memory format
    converted: nn.Module = convert(memory_format=torch.channels_last)
    return converted


def batches(fill: float | None = None, size: int = 4, dtype: Any = torch.float32) -> list[Tensor]:
    torch.manual_seed(1)
    data = [torch.randn(size, 2, 6, 6) for _ in range(3)]
    return [(x if fill is None else torch.full_like(x, fill)).to(dtype) for x in data]


def run(model: nn.Module, data: list[Tensor], **options: Any) -> Result:
    return quantize(model, "bops <= 10%", data, **({"epochs": 2, "progress": False} | options))


def good(result: Result, dtype: torch.dtype = torch.float32) -> bool:
    output = result.model(torch.rand(3, 2, 6, 6, dtype=dtype))
    state = result.model.state_dict().values()
    finite = all(bool(t.isfinite().all()) for t in [output, *state])
    return finite and result.cost.satisfied and output.dtype == dtype


CASES: dict[str, tuple[nn.Module, list[Tensor]]] = {
    "a single sample": (net(), batches(size=1)),
    "constant inputs": (net(), batches(3.0)),
    "zero inputs": (net(), batches(0.0)),
    "tiny inputs": (net(), batches(1e-38)),
    "denormal inputs": (net(), batches(1e-42)),
    "large inputs": (net(), batches(1e12)),
    "zero weights": (net(0.0), batches()),
    "tiny weights": (net(1e-30), batches()),
    "channels last": (
        channels_last(net()),
        [x.contiguous(memory_format=torch.channels_last) for x in batches()],
    ),
}


@pytest.mark.parametrize(("model", "data"), CASES.values(), ids=CASES)
def test_odd_values_train(model: nn.Module, data: list[Tensor]) -> None:
    assert good(run(model, data))


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_single_values_that_are_not_finite_do_not_set_a_range(value: float) -> None:
    poisoned = batches()[0]
    poisoned.view(-1)[7] = value
    prepared = prepare(net(), "bops <= 10%", torch.rand(2, 2, 6, 6))
    prepared.calibrate([poisoned])
    ranges = [p for n, p in prepared.model.named_parameters() if n.endswith("log_range")]
    assert all(bool((r.abs() < 20).all()) for r in ranges)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_dtypes_train(dtype: torch.dtype) -> None:
    assert good(run(net().to(dtype), batches(dtype=dtype)), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_own_loops_may_use_autocast(dtype: torch.dtype) -> None:
    prepared = prepare(net(), "bops <= 5%", torch.rand(2, 2, 6, 6), search_steps=3)
    optimizer = torch.optim.Adam(prepared.model.parameters(), 1e-3)
    for x in batches() * 2:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = prepared.model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        prepared.step()
    assert good(prepared.finalize())


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (net(), batches(INF), "all calibration values at .* are infinite or not a number"),
        (net(), batches(NAN), "all calibration values at .* are infinite or not a number"),
        (net(NAN), batches(), "all calibration values at .* are infinite or not a number"),
        (net(), batches(1e30), "reach 1e.30, and squares of what is beyond 1e.15 overflow"),
        (net(1e30), batches(), "overflow; scale|are infinite"),
        (net(), batches(size=0), "no values at .*; are they empty"),
        (net(), [*batches(), torch.rand(0, 2, 6, 6)], "has no samples; leave it out"),
    ],
    ids=["infinite", "nan", "nan weights", "huge", "huge weights", "empty", "one is empty"],
)
def test_what_cannot_be_right_is_refused(
    model: nn.Module, data: list[Tensor], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        run(model, data)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms_are_enough() -> None:
    options = {"scheme": Scheme(weights="channel", activations="channel")}
    first, second = (run(net(), batches(), **options) for _ in range(2))
    states = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("budget", ["arena <= 70%", "activations <= 70%", "weights <= 70%"])
def test_double_precision_that_stays_counts_as_it_did_with_its_quantizers(budget: str) -> None:
    scheme = Scheme((4, 32), activations="channel")
    data = batches(dtype=torch.float64)
    assert quantize(
        net().double(), budget, data, scheme=scheme, epochs=0, progress=False
    ).cost.satisfied


@pytest.fixture
def double_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("double_by_default")
@pytest.mark.parametrize("direction", ["marginal", "gradient"])
@pytest.mark.parametrize(
    "scheme", [Scheme(), Scheme(bit_widths=(0, 2, 4), weights="channel", activations="channel")]
)
def test_new_tensors_may_be_double_by_default(scheme: Scheme, direction: str) -> None:
    data = batches(dtype=torch.float64)
    assert good(run(net(), data, scheme=scheme, direction=direction), torch.float64)
