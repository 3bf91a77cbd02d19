"""Training that goes wrong: the error says where, and offers what had been reached."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cgmq_fx import (
    Callback,
    CgmqError,
    Checkpoint,
    DataError,
    Prepared,
    Result,
    StoppedError,
    TrainingError,
    quantize,
)
from cgmq_fx.history import EpochRecord, StepRecord
from cgmq_fx.passes.quantizer import Quantizer

BATCHES = [(torch.rand(4, 6), torch.randint(3, (4,))) for _ in range(4)]
NAN = float("nan")


class At(Callback):
    """Does something after a step."""

    def __init__(self, step: int, action: Callable[[Prepared], Any]) -> None:
        self.step, self.action = step, action

    def on_start(self, prepared: Prepared, steps: int) -> None:
        self.prepared = prepared

    def on_step(self, record: StepRecord) -> None:
        if record.step == self.step:
            self.action(self.prepared)


class Breaking(list[Any]):
    """Batches that end in an error in the second epoch."""

    def __init__(self, batches: list[Any], spared: int = 4) -> None:
        super().__init__(batches)
        self.left = spared  # for training: two looks, calibration and the first epoch

    def __iter__(self) -> Iterator[Any]:
        self.left -= 1
        yield from self[:2]
        if self.left < 0:
            raise OSError("the network drive is gone")
        yield from self[2:]


def run(*callbacks: Callback, data: Any = BATCHES, **options: Any) -> Result:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    arguments: dict[str, Any] = {"loss": cross_entropy, "epochs": 5, "progress": False} | options
    return quantize(net, "bops <= 2%", data, callbacks=callbacks, **arguments)


def usable(error: CgmqError, steps: int) -> bool:
    result = error.result
    assert isinstance(result, Result)
    assert result.cost.satisfied
    assert all(t.isfinite().all() for t in result.model.state_dict().values())
    assert len(result.history.steps) == steps
    assert "what training had reached is in this error's `result`" in str(error)
    return bool(result.model(torch.rand(2, 6)).isfinite().all())


def fill(name: str, value: float) -> Callable[[Prepared], Any]:
    return lambda prepared: prepared.model.get_parameter(name).data.fill_(value)


def collapse(prepared: Prepared) -> None:
    quantizer = next(m for m in prepared.model.modules() if isinstance(m, Quantizer))
    quantizer.log_range.data.fill_(-120.0)


def explode(output: Tensor, target: Tensor) -> Tensor:
    """A loss that is finite, with a gradient that is not."""
    return (output.square().sum() * 0).sqrt() + cross_entropy(output, target)


POISONED = [*BATCHES[:2], (torch.full((4, 6), NAN), BATCHES[0][1]), BATCHES[3]]


@pytest.mark.parametrize(
    ("callbacks", "options", "kind", "message", "steps"),
    [
        (
            [],
            {"data": POISONED},
            TrainingError,
            r"step 3 of 20 \(phase tune\): the loss became nan: the inputs of this batch",
            2,
        ),
        (
            [At(6, fill("2.weight", NAN))],
            {},
            TrainingError,
            r"step 8 of 20 .*: the loss became nan: .*2.weight has values that are not finite",
            7,
        ),
        (
            [At(0, fill("0.weight", 3e38))],
            {"epochs": 400},  # long enough that nothing clips yet
            TrainingError,
            r"step 2 of 1600 .*the output of linear is not finite \(0",
            1,
        ),
        ([At(24, collapse)], {"epochs": 7}, TrainingError, r"step 26 .* collapsed to zero", 25),
        (
            [],
            {"data": Breaking(BATCHES)},
            DataError,
            "train_data failed at batch 3 of epoch 2 .*OSError: the network drive is gone",
            6,
        ),
        (
            [],
            {"val_data": Breaking(BATCHES, 3)},  # a look and two epochs
            DataError,
            r"val_data failed at batch 3 of epoch 3 \(after step 12 of 20\): OSError: the network",
            12,
        ),
        (
            [],
            {"val_data": Breaking(BATCHES, 6)},  # a look and all epochs
            DataError,
            r"val_data failed at batch 3 of epoch 6 \(after step 20 of 20\)",
            20,
        ),
        ([At(5, lambda _: os.kill(os.getpid(), signal.SIGINT))], {}, StoppedError, "step 6 of", 6),
    ],
    ids=["data", "weight", "output", "range", "loader", "validation", "end", "ctrl-c"],
)
def test_what_was_reached_is_offered(
    callbacks: list[Callback],
    options: dict[str, Any],
    kind: type[CgmqError],
    message: str,
    steps: int,
) -> None:
    with pytest.raises(kind, match=message) as caught:
        run(*callbacks, **options)
    assert usable(caught.value, steps)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_hurt() -> None:
    with pytest.raises(TrainingError, match=r"step 1 .*gradient of .* is not finite") as caught:
        run(loss=explode)
    assert caught.value.result is None  # nothing had been reached


def test_out_of_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def hungry(optimizer: torch.optim.Adam, *_: Any) -> None:
        calls.append(0)
        if len(calls) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(torch.optim.Adam, "step", hungry)
    with pytest.raises(
        TrainingError, match=r"step 6 .*out of memory.*use smaller batches"
    ) as caught:
        run()
    assert usable(caught.value, 5)


def test_out_of_memory_while_validating_is_said() -> None:
    calls = []

    def hungry(*_: Any) -> float:
        calls.append(0)
        if len(calls) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 0.0

    with pytest.raises(
        TrainingError, match=r"failed after step 8 of 20.*smaller batches"
    ) as caught:
        run(val_data=BATCHES, metric=hungry)
    assert usable(caught.value, 8)


def test_the_best_epoch_is_offered_rather_than_the_last_state() -> None:
    """In the fifth epoch a weight is lost, in the sixth the loader fails."""
    seen: dict[str, Tensor] = {}

    class Watching(Callback):
        def on_start(self, prepared: Prepared, steps: int) -> None:
            self.prepared = prepared

        def on_step(self, record: StepRecord) -> None:
            if record.step == 16:
                self.prepared.model.get_parameter("2.bias").data[0] = 50.0

        def on_epoch(self, record: EpochRecord) -> None:
            seen[f"{record.epoch}"] = self.prepared.model.get_parameter("2.weight").detach().clone()
            losses[record.epoch] = record.metrics["loss"]

    losses: dict[int, float] = {}
    with pytest.raises(DataError, match="epoch 6") as caught:
        run(Watching(), data=Breaking(BATCHES, 8), val_data=BATCHES, epochs=8)
    best = min(losses, key=lambda epoch: (losses[epoch], -epoch))
    assert best < 5
    assert usable(caught.value, 22)
    assert torch.equal(caught.value.result.model.get_parameter("2.weight"), seen[f"{best}"])


def interrupt_twice(_: Prepared) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


def test_a_second_interrupt_really_stops(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        run(At(5, interrupt_twice))
    assert not isinstance(caught.value, CgmqError)
    assert "press Ctrl-C again to stop at once" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_from_elsewhere_is_the_same() -> None:
    def interrupt(_: Prepared) -> None:
        raise KeyboardInterrupt

    with pytest.raises(StoppedError, match="stopped after step 4 of 20") as caught:
        run(At(3, interrupt))
    assert isinstance(caught.value, KeyboardInterrupt)
    assert usable(caught.value, 4)


def test_an_interrupted_run_resumes_where_it_stopped(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path, minutes=1000)
    with pytest.raises(StoppedError):
        run(At(5, lambda _: os.kill(os.getpid(), signal.SIGINT)), checkpoint=kept)
    seen: list[int] = []
    result = run(At(6, lambda _: seen.append(6)), At(5, lambda _: seen.append(5)), checkpoint=kept)
    assert seen == [6]
    whole = run().model.state_dict()
    assert all(torch.equal(t, whole[n]) for n, t in result.model.state_dict().items())


def test_training_works_beside_the_main_thread() -> None:
    found: list[Result] = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    assert found[0].cost.satisfied


def test_errors_of_callbacks_go_through() -> None:
    def fail(_: Prepared) -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        run(At(2, fail))
