"""`quantize` in two processes: as in one, with files by the first alone, and errors in both."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from cgmq_fx import Callback, CgmqError, Checkpoint, OptionError, Result, TrainingError, quantize
from cgmq_fx.history import StepRecord
from cgmq_fx.position import Position

EPOCHS, BATCHES, CUT, TIMEOUT = 3, 4, 8, 8
_FAR = 0.02  # weights move by 0.001 in a step


class CutError(Exception):
    """The power goes."""


class CutAt(Callback):
    """Raises after a step, or ends the process."""

    def __init__(self, step: int, dies: bool = False) -> None:
        self.step, self.dies = step, dies

    def on_step(self, record: StepRecord) -> None:
        if record.step == self.step:
            if self.dies:
                os._exit(0)
            raise CutError


def part(rank: int, count: int, batches: int = BATCHES) -> list[tuple[Tensor, Tensor]]:
    """A process's part of every batch."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(batches, 8, 6, generator=generator)
    labels = torch.randint(3, (batches, 8), generator=generator)
    own = slice(rank * 8 // count, (rank + 1) * 8 // count)
    return [(x[own], y[own]) for x, y in zip(inputs, labels, strict=True)]


def run(data: Any, *callbacks: Callback, **options: Any) -> Result:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    arguments: dict[str, Any] = {"loss": cross_entropy, "epochs": EPOCHS, "progress": False}
    arguments |= {"callbacks": callbacks, "val_data": data} | options
    return quantize(net, "bops <= 2%", data, **arguments)


def far(state: dict[str, Tensor], alone: Result) -> float:
    """The largest distance of a weight; ranges are calibrated on one process's part of the data."""
    other = alone.model.state_dict()
    names = [name for name in state if name.endswith("weight")]
    return max(float((state[name] - other[name]).abs().max()) for name in names)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    method, wait = f"file://{folder}/rendezvous", timedelta(seconds=TIMEOUT)
    distributed.init_process_group("gloo", method, wait, world_size=2, rank=rank)
    data, own, told = part(rank, 2), Path(folder, f"{rank}"), {}
    whole = run(data)
    try:
        run(part(rank, 2, BATCHES + rank))
    except OptionError as error:
        told["batches"] = str(error)
    try:
        run(data, CutAt(CUT), checkpoint=Checkpoint(own, steps=3))
    except CutError:
        told["files"] = " ".join(sorted(path.name for path in own.glob("*")))
    torch.save(
        {
            "told": told,
            "cost": str(whole.cost),
            "state": whole.model.state_dict(),
            "losses": [epoch.loss for epoch in whole.history.epochs],
            "metrics": whole.metrics,
        },
        f"{folder}/{rank}.pt",
    )
    start = time.monotonic()
    try:
        run(data, *([CutAt(CUT, dies=True)] if rank == 1 else []))
    except CgmqError as error:
        error = error if time.monotonic() - start < 4 * TIMEOUT else CgmqError("too late")
        kept = error.result is not None and error.result.cost.satisfied
        Path(folder, "error").write_text(f"{type(error) is TrainingError} {kept} {error}")
    os._exit(0)


@pytest.mark.filterwarnings("ignore")  # of the processes' start
def test_two_processes_quantize_like_one(tmp_path: Path) -> None:
    spawn(work, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = run(part(0, 1))
    for other in (second["cost"], str(alone.cost)):
        assert first["cost"] == other
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
    assert far(first["state"], alone) < _FAR
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx([e.loss for e in alone.history.epochs], rel=0.05)
    assert first["metrics"] == second["metrics"] == pytest.approx(alone.metrics, rel=0.05)

    for rank, found in enumerate((first, second)):
        assert "process 1 makes another call than process 0" in found["told"]["batches"]
        assert "batches is 4, there it is 5" in found["told"]["batches"]
        files = "newest.safetensors previous.safetensors" if rank == 0 else ""
        assert found["told"]["files"] == files

    seen: list[int] = []

    class Seen(Callback):
        def on_step(self, record: StepRecord) -> None:
            seen.append(record.step)

    resumed = run(part(0, 1), Seen(), checkpoint=Checkpoint(tmp_path / "0", steps=3))
    assert seen == list(range(6, EPOCHS * BATCHES))
    assert str(resumed.cost) == first["cost"]
    assert far(first["state"], resumed) < _FAR

    error = (tmp_path / "error").read_text()
    assert error.startswith("True True step 10 of 12 (phase tune): training failed: "), error


def test_distributed_samplers_shuffle_anew_in_every_epoch() -> None:
    numbers = TensorDataset(torch.arange(8.0))
    sampler: DistributedSampler[Any] = DistributedSampler(numbers, 2, 0)
    data, at = DataLoader(numbers, 2, sampler=sampler), Position(torch.zeros(()))
    orders = []
    for _ in range(2):
        orders.append([batch.tolist() for (batch,) in at.batches(data)])
        at.advance()
    assert orders[0] != orders[1]
    sampler.set_epoch(2)
    assert orders[1] == [batch.tolist() for (batch,) in data]
