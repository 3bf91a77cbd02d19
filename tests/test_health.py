"""Training that comes to an end but does harm, or kills channels: noticed, said, and made good."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cgmq_fx import Checkpoint, Result, Scheme, quantize
from cgmq_fx.data import as_inputs
from cgmq_fx.health import lowest_step, silent_channels, surely_lower
from cgmq_fx.history import History, StepRecord
from cgmq_fx.passes.quantizer import Quantizer
from cgmq_fx.prepared import prepare

EPOCHS = 5


def teacher_data() -> list[tuple[Tensor, Tensor]]:
    """Classes that a linear layer can tell."""
    generator = torch.Generator().manual_seed(1)
    plane = torch.randn(6, 3, generator=generator)
    inputs = torch.randn(12, 8, 6, generator=generator)
    return [(x, (x @ plane).argmax(1)) for x in inputs]


DATA = teacher_data()


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(20):
        for x, y in DATA:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


TRAINED = net()


def sgd(rate: float) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD([{**group, "lr": rate} for group in groups])

    return make


def run(rate: float, **options: Any) -> Result:
    arguments: dict[str, Any] = {
        "loss": cross_entropy,
        "epochs": EPOCHS,
        "progress": False,
        "optimizer": sgd(rate),
    } | options
    return quantize(TRAINED, "bops <= 10%", DATA, **arguments)


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("cgmq_fx")]


def loss_of(result: Result) -> float:
    with torch.no_grad():
        return sum(float(cross_entropy(result.model(x), y)) for x, y in DATA) / len(DATA)


@pytest.mark.parametrize("options", [{}, {"val_data": DATA}], ids=["train", "val"])
def test_training_that_does_harm_ends_in_what_was_best(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    untrained = loss_of(run(1e-9))
    with caplog.at_level(logging.WARNING):
        result = run(5.0, **options)
    assert result.cost.satisfied
    assert loss_of(result) <= untrained + 1e-3
    text = "\n".join(result.warnings)
    assert "training has not lowered the loss: on 12 batches it is " in text
    assert f"after step {EPOCHS * len(DATA)}" in text
    assert "pass an optimizer= with a smaller learning rate" in text
    assert list(result.warnings) == logged(caplog)
    assert "warning: training has not lowered" in " ".join(str(result).split())
    assert result.report()["warnings"] == list(result.warnings)
    assert len(result.history.epochs) == EPOCHS
    if options:
        assert result.metrics["loss"] == pytest.approx(loss_of(result), abs=1e-4)


def test_training_that_changes_nothing_is_said_quietly(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = run(1e-9)
    assert "training has not lowered the loss" in result.warnings[0]
    assert len(result.warnings) == 1
    assert not logged(caplog)


def test_training_that_helps_says_nothing() -> None:
    result = quantize(TRAINED, "bops <= 0.5%", DATA, loss=cross_entropy, epochs=20, progress=False)
    assert result.warnings == ()


def test_harm_is_judged_on_what_was_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []

    def judge(result: Result, *rest: Any) -> tuple[str, tuple[str, ...]]:
        seen.append(rest[-1](result.model))
        return "", ()

    monkeypatch.setattr("cgmq_fx.run.verdict", judge)
    wrong = [(x, (y + 1) % 3) for x, y in DATA[:5]]  # the better on DATA, the worse here
    result = run(1e-2, val_data=wrong)
    assert len(seen[0]) == len(DATA)
    assert sum(seen[0]) / len(DATA) == pytest.approx(loss_of(result))


def test_a_resumed_run_ends_in_the_same_best_state(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path, steps=7)
    first = run(5.0, checkpoint=kept)
    again, whole = run(5.0, checkpoint=kept), run(5.0)
    assert first.warnings
    for other in (again, whole):
        assert other.warnings == first.warnings
        state = other.model.state_dict()
        assert all(torch.equal(t, state[n]) for n, t in first.model.state_dict().items())


def test_a_layer_that_dies_is_named_with_its_epoch(caplog: pytest.LogCaptureFixture) -> None:
    first = nn.Linear(6, 8)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(8, 3))
    nn.init.constant_(first.bias, -100.0)
    with caplog.at_level(logging.WARNING):
        result = quantize(model, "bops <= 5%", DATA, loss=cross_entropy, epochs=2, progress=False)
    assert any("every value of relu (1" in text for text in result.warnings)
    assert any("has rounded to zero since epoch 1" in text for text in logged(caplog))
    assert result.history.epochs[-1].silent["relu"] == (8, 8)


def prepared(scheme: Scheme | None = None) -> Any:
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(2, 4, 3), nn.Linear(16, 3)
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), linear)
    conv.weight.data[1] = 0.0
    linear.weight.data[:2] = 0.0
    return prepare(model, "bops <= 90%", torch.rand(2, 2, 4, 4), scheme=scheme)


def test_silent_channels_are_counted_by_quantizer() -> None:
    own, batch = prepared(), as_inputs(torch.rand(5, 2, 4, 4))
    found = silent_channels(own.model, batch)
    assert found["0_weight"] == (1, 4)
    assert found["3_weight"] == (2, 3)
    assert own.model.training
    assert set(found) <= {"0_weight", "3_weight", "relu"}


def test_what_is_pruned_on_purpose_is_not_silent() -> None:
    own, batch = prepared(Scheme((0, 8), weights="channel")), as_inputs(torch.rand(5, 2, 4, 4))
    for module in own.model.modules():
        if isinstance(module, Quantizer) and module.bits.numel() > 1:
            module.bits.zero_()
    assert silent_channels(own.model, batch) == {}


class Recurrent(nn.Module):
    """A layer that starts from zeros."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.layer, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.layer(x)[0][:, -1])
        return result


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_zeros_to_start_from_are_not_silent(kind: type[nn.LSTM | nn.GRU]) -> None:
    batch = torch.rand(2, 3, 3)
    own = prepare(Recurrent(kind), "bops <= 90%", batch)
    assert silent_channels(own.model, as_inputs(batch)) == {}


def test_channels_that_an_activation_has_killed_are_silent() -> None:
    first = nn.Linear(3, 4)
    nn.init.constant_(first.bias[:2].detach(), -9.0)
    model, batch = nn.Sequential(first, nn.ReLU(), nn.Linear(4, 2)), torch.rand(5, 3)
    scheme = Scheme((8,), activations="channel")
    own = prepare(model, "bops <= 90%", batch, scheme=scheme)
    assert silent_channels(own.model, as_inputs(batch)) == {"relu": (2, 4)}


def history(*losses: float | None) -> History:
    return History([StepRecord(i, len(losses), "tune", (1.0,), x) for i, x in enumerate(losses)])


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2.0, 1.0], None),
        ([1.0, 1.0], 1),
        ([1.0, 2.0], 1),
        ([1.0], None),
        ([], None),
        ([None, 3.0, None, 1.0], None),
        ([3.0, 2.0, None, 1.0, 2.0, 9.0], 4),
        ([5.0] * 10 + [1.0] * 3 + [4.0] * 17, 13),
        ([5.0] * 10 + [1.0] * 3 + [0.5] * 17, 16),
        ([1.0, float("nan")], 1),
        ([float("nan"), 2.0, 3.0], 2),
    ],
)
def test_the_step_at_which_the_loss_was_lowest(
    losses: list[float | None], expected: int | None
) -> None:
    assert lowest_step(history(*losses)) == expected


@pytest.mark.parametrize(
    ("losses", "others", "expected"),
    [
        ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], True),
        ([2.0, 2.1, 1.9], [1.0, 1.1, 0.9], False),
        ([1.0, 2.0, 3.0], [1.1, 1.8, 3.2], False),  # by chance
        ([1.0], [2.0], True),
        ([1.0], [1.0], False),
        ([], [], False),
        ([float("nan")], [1.0], False),
        ([1.0], [float("inf")], True),
    ],
)
def test_lower_by_more_than_chance(
    losses: list[float], others: list[float], expected: bool
) -> None:
    assert surely_lower(losses, others) is expected
