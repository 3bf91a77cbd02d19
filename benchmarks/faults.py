"""What goes wrong on purpose: kills, full disks, broken files, random training configurations.

    python -m benchmarks.faults kill --points 200      # kill -9 at random moments, then resume
    python -m benchmarks.faults disk --runs 50         # no space left, at random writes
    python -m benchmarks.faults fuzz --inputs 10000    # every loader, time and memory measured
    python -m benchmarks.faults configs --count 1000   # random ways to train

Each prints what it counted and ends with status 1 if anything was lost, crashed, hung or grew.
"""

import argparse
import errno
import hashlib
import json
import multiprocessing
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.configurations import run_configurations
from benchmarks.fuzzing import LOADERS, fuzz
from cgmq_fx import Callback, Checkpoint, CheckpointError, Prepared, Result, quantize
from cgmq_fx.checkpoint import NEWEST, PREVIOUS, CheckpointStore
from cgmq_fx.history import StepRecord

console = Console(highlight=False)
MOST_MIB = 200
FORK = multiprocessing.get_context("fork")


def small_run(folder: Path | None, *callbacks: Callback) -> Result:
    """A short run with everything random: dropout, a shuffled loader, gates per channel."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 5)
    )
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(64, 1, 6, 6, generator=generator)
    labels = torch.randint(5, (64,), generator=generator)
    data = DataLoader(TensorDataset(inputs, labels), 4, shuffle=True, generator=generator)
    kept = None if folder is None else Checkpoint(folder, steps=1)
    options: dict[str, Any] = {"loss": cross_entropy, "epochs": 4, "progress": False}
    return quantize(model, "bops <= 2%", data, callbacks=callbacks, checkpoint=kept, **options)


def fingerprint(result: Result) -> str:
    """A digest of every bit of a result."""
    digest = hashlib.sha256(repr(result.history).encode() + str(result).encode())
    for name, tensor in sorted(result.model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


class Started(Callback):
    """Tells another process that training has begun."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def on_start(self, prepared: Prepared, steps: int) -> None:
        self.pipe.send("started")


def worker(folder: Path, pipe: Any) -> None:
    torch.set_num_threads(1)
    pipe.send(fingerprint(small_run(folder, Started(pipe))))


def in_child(folder: Path, kill_after: float | None = None) -> tuple[str | None, float]:
    """Run in a child; what it ended with, and the seconds that its training took."""
    ours, theirs = FORK.Pipe()
    child = FORK.Process(target=worker, args=(folder, theirs))
    child.start()
    theirs.close()
    found, start = None, time.monotonic()
    try:
        ours.recv()
        start = time.monotonic()
        if kill_after is not None and not ours.poll(kill_after) and child.pid:
            os.kill(child.pid, signal.SIGKILL)
        found = ours.recv()
    except EOFError:
        pass  # it was killed, as asked, and has nothing more to say
    child.join()
    return found, time.monotonic() - start


def complete(folder: Path) -> bool:
    """Whether every checkpoint in a folder can be read; half-written files count only if named."""
    found = [folder / name for name in (NEWEST, PREVIOUS) if (folder / name).exists()]
    for path in found:
        store = CheckpointStore(Checkpoint(folder), {})
        try:
            store._state(path)
        except CheckpointError as error:
            if "of another run" not in str(error):
                return False
    return True


def kill(points: int, seed: int) -> bool:
    """Kill a run at random moments, resume it, and compare with an uninterrupted one."""
    rng = Random(seed)
    with tempfile.TemporaryDirectory() as name:
        expected, seconds = in_child(Path(name))
    killed = resumed = equal = corrupt = 0
    for point in range(points):
        with tempfile.TemporaryDirectory() as name:
            ended, _ = in_child(Path(name), rng.uniform(0, seconds))
            killed += ended is None
            corrupt += not complete(Path(name))
            found, _ = in_child(Path(name))
            resumed += found is not None
            equal += found == expected
        if (point + 1) % 10 == 0 or point + 1 == points:
            console.print(
                f"{point + 1} points: {killed} killed while training, {resumed} resumed, "
                f"{equal} bit-identical, {corrupt} corrupt checkpoints"
            )
    return equal == points and corrupt == 0


class StopError(Exception):
    """Ends a run from a callback."""


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, record: StepRecord) -> None:
        if record.step == self.step:
            raise StopError


@contextmanager
def full_disk(rng: Random, share: float) -> Iterator[None]:
    """Some writes of checkpoints end in the middle, with no space left."""
    plain = os.fsync

    def fsync(handle: Any) -> None:
        if rng.random() < share:
            size = os.fstat(handle).st_size
            if size:
                os.ftruncate(handle, rng.randrange(size))
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(handle)

    with patch.object(os, "fsync", fsync):
        yield


def disk(runs: int, seed: int) -> bool:
    """Runs with a disk that is full now and then, cut off and resumed."""
    rng = Random(seed)
    expected = fingerprint(small_run(None))
    refused = equal = corrupt = 0
    warnings.simplefilter("ignore", RuntimeWarning)
    for run in range(runs):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            try:
                with full_disk(rng, rng.choice([0.1, 0.5, 0.9])):
                    small_run(folder, StopAt(rng.randrange(2, 62)))
            except CheckpointError:
                refused += 1  # the very first checkpoint has to succeed
            except StopError:
                pass  # by `StopAt`; what is left on the disk is what matters
            corrupt += not complete(folder)
            equal += fingerprint(small_run(folder)) == expected
        if (run + 1) % 10 == 0 or run + 1 == runs:
            console.print(
                f"{run + 1} runs: {equal} bit-identical, {corrupt} corrupt checkpoints, "
                f"{refused} refused at their first checkpoint"
            )
    return equal == runs and corrupt == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tasks = parser.add_subparsers(dest="task", required=True)
    for name, count, default in (
        ("kill", "points", 200),
        ("disk", "runs", 50),
        ("fuzz", "inputs", 10_000),
        ("configs", "count", 1_000),
    ):
        task = tasks.add_parser(name)
        task.add_argument(f"--{count}", type=int, default=default, dest="count")
        task.add_argument("--seed", type=int, default=0)
        if name == "fuzz":
            task.add_argument("--loader", choices=sorted(LOADERS), action="append")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.task == "fuzz":
        wanted = options.loader or sorted(LOADERS)
        good = True
        for name in wanted:
            report = fuzz(name, options.count, options.seed)
            console.print(json.dumps(report))
            failed = report["crashes"] or report["hangs"] or report["unexpected"]
            good = good and not failed and report["peak_mib"] <= MOST_MIB
    elif options.task == "configs":
        good = run_configurations(options.count, options.seed, console)
    else:
        good = {"kill": kill, "disk": disk}[options.task](options.count, options.seed)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
