"""Runs that are cut off and resumed end as if they had not been."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from cgmq_fx import (
    Callback,
    Checkpoint,
    CheckpointError,
    OptionError,
    Prepared,
    Result,
    Scheme,
    prepare,
    quantize,
)
from cgmq_fx.checkpoint import NEWEST, PREVIOUS, CheckpointStore
from cgmq_fx.history import StepRecord
from cgmq_fx.packing import pack, unpack

EPOCHS, BATCHES = 3, 4
STEPS = EPOCHS * BATCHES
OPTIONS: dict[str, Any] = {"label_smoothing": 0.1}


class CutError(Exception):
    """The power goes."""


class CutAt(Callback):
    """Raises after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, record: StepRecord) -> None:
        if record.step == self.step:
            raise CutError


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 5)
    )


class Noisy(TensorDataset):
    """Draws from the random states of all three libraries for every sample."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x, y = (tensor[index] for tensor in self.tensors)
        return x + torch.randn(()) * random.random() * np.random.rand(), y


def loader(seeded: bool = True) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    data = Noisy(
        torch.rand(16, 1, 6, 6, generator=generator), torch.randint(5, (16,), generator=generator)
    )
    return DataLoader(data, 4, shuffle=True, generator=generator if seeded else None)


def smoothed(output: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(output, target, **OPTIONS)


def run(folder: Path | Checkpoint | None, *callbacks: Callback, **options: Any) -> Result:
    random.seed(3)
    np.random.seed(3)
    arguments: dict[str, Any] = {
        "loss": cross_entropy,
        "val_data": loader(),
        "epochs": EPOCHS,
        "scheme": Scheme(weights="channel"),
        "progress": False,
        "checkpoint": folder,
    } | options
    data = arguments.pop("train_data", None) or loader()
    net = arguments.pop("model", None) or model()
    budget = arguments.pop("budget", "bops <= 2%")
    return quantize(net, budget, data, callbacks=callbacks, **arguments)


def same(first: Result, second: Result) -> bool:
    states = first.model.state_dict(), second.model.state_dict()
    return (
        states[0].keys() == states[1].keys()
        and all(torch.equal(states[0][n], states[1][n]) for n in states[0])
        and first.history == second.history
        and first.metrics == second.metrics
        and str(first) == str(second)
    )


@pytest.fixture(scope="module")
def whole() -> Result:
    return run(None)


def cut_off(folder: Path, step: int, every: int = 1, **options: Any) -> Checkpoint:
    kept = Checkpoint(folder, steps=every, minutes=None)
    with pytest.raises(CutError):
        run(kept, CutAt(step), **options)
    return kept


@pytest.mark.parametrize(("step", "every"), [(0, 1), (4, 1), (5, 3), (9, 5)])
def test_a_resumed_run_ends_like_a_whole_one(
    whole: Result, tmp_path: Path, step: int, every: int
) -> None:
    kept = cut_off(tmp_path, step, every)
    assert same(run(kept), whole)


def test_a_run_that_is_cut_off_again_and_again(whole: Result, tmp_path: Path) -> None:
    for step in (1, 6):
        kept = cut_off(tmp_path, step)
    assert same(run(kept), whole)


def test_a_finished_run_is_not_trained_again(whole: Result, tmp_path: Path) -> None:
    assert same(run(tmp_path), whole)
    assert same(run(tmp_path, CutAt(0)), whole)
    assert [p.name for p in sorted(tmp_path.iterdir())] == [NEWEST, PREVIOUS]


@pytest.mark.parametrize(
    "options",
    [
        {"loss": None, "train_data": [torch.rand(3, 1, 6, 6) for _ in range(BATCHES)]},
        {
            "optimizer": lambda groups: torch.optim.SGD(groups, momentum=0.9),
            "direction": "gradient",
        },
        {"train_data": loader(seeded=False)},
        {"scheme": Scheme(weights="element", activations="channel")},
    ],
    ids=["teacher", "sgd", "global seed", "elements"],
)
def test_every_kind_of_run_resumes(tmp_path: Path, options: dict[str, Any]) -> None:
    kept = cut_off(tmp_path, 5, every=2, val_data=None, **options)
    assert same(run(kept, val_data=None, **options), run(None, val_data=None, **options))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return cut_off(tmp_path_factory.mktemp("begun"), 6)


def copied(begun: Checkpoint, folder: Path) -> Checkpoint:
    copytree(begun.folder, folder, dirs_exist_ok=True)
    return Checkpoint(folder, steps=1, minutes=None)


def other_model() -> nn.Module:
    net = model()
    with torch.no_grad():
        next(net.parameters()).view(-1)[0] += 1e-6
    return net


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": other_model()}, "of the model, 0.weight is"),
        ({"budget": "bops <= 3%"}, "budget is 'bops <= 3%', there it is 'bops <= 2%'"),
        ({"epochs": 5}, "epochs is 5, there it is 3"),
        ({"seed": 7}, "seed is 7, there it is 0"),
        ({"direction": "gradient"}, "direction is .*Gradient', there it is .*Marginal'"),
        ({"val_data": None}, "val_data is None, there it is 'given'"),
        ({"scheme": Scheme()}, "scheme is .*weights='tensor'"),
        ({"loss": lambda a, b: a.sum()}, "loss is .*<lambda>.* there it is .*cross_entropy"),
        (
            {"loss": partial(cross_entropy, label_smoothing=0.9)},
            r"loss is .*smoothing=0\.9\)', there",
        ),
        (
            {"optimizer": lambda groups: torch.optim.Adam(groups, eps=1e-3)},
            "of the optimizer, eps of group 0 is '0.001', there it is '1e-08'",
        ),
    ],
    ids=[
        "model",
        "budget",
        "epochs",
        "seed",
        "direction",
        "val",
        "scheme",
        "loss",
        "partial",
        "optimizer",
    ],
)
def test_the_checkpoint_of_another_run_is_refused(
    begun: Checkpoint, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"of another run: {message}"):
        run(begun, **options)


def test_the_checkpoint_of_a_loss_that_reads_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, loss=smoothed)
    run(tmp_path, loss=smoothed)
    monkeypatch.setitem(OPTIONS, "label_smoothing", 0.2)
    message = r"OPTIONS of .*\.smoothed is .*0\.2.*, there it is .*0\.1"
    with pytest.raises(CheckpointError, match=f"of another run: {message}"):
        run(tmp_path, loss=smoothed)


def test_another_version_is_refused(begun: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    with pytest.raises(CheckpointError, match=r"of the versions, torch is '2.99.0', there it is"):
        run(begun)


@pytest.mark.parametrize("damage", [b"no safetensors"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    whole: Result, begun: Checkpoint, tmp_path: Path, damage: bytes
) -> None:
    kept = copied(begun, tmp_path)
    (tmp_path / NEWEST).write_bytes(damage)
    with pytest.warns(RuntimeWarning, match="newest.* is damaged.*using the one before"):
        assert same(run(kept), whole)


def test_if_none_can_be_read_nothing_is_overwritten(begun: Checkpoint, tmp_path: Path) -> None:
    kept = copied(begun, tmp_path)
    for name in (NEWEST, PREVIOUS):
        (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"newest.safetensors is damaged"):
        run(kept)
    assert (tmp_path / NEWEST).read_bytes() == b"broken"


class Disk:
    """A disk that is full now and then."""

    def __init__(self, full: Callable[[int], bool]) -> None:
        self.full, self.writes = full, 0

    def fsync(self, _: int) -> None:
        self.writes += 1
        if self.full(self.writes):
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_checkpoint_before(
    whole: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(lambda write: write > 6)
    monkeypatch.setattr(os, "fsync", disk.fsync)
    with pytest.warns(RuntimeWarning, match=r"cannot be written: .*No space left.* stays"):
        kept = cut_off(tmp_path, 8)
    assert not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    assert same(run(kept), whole)


def test_a_disk_that_is_full_from_the_start_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", Disk(lambda _: True).fsync)
    with pytest.raises(CheckpointError, match="No space left"):
        run(tmp_path)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        run(tmp_path / "file")


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    mine = {tmp_path / ".notes.tmp", tmp_path / ".checkpoint-notes.tmp", tmp_path / "mine.tmp"}
    for path in (*mine, tmp_path / f".checkpoint-{'0a' * 16}.tmp"):
        path.write_bytes(b"half")
    cut_off(tmp_path, 1)
    assert set(tmp_path.iterdir()) == {*mine, tmp_path / NEWEST}


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"minutes": -1.0}, {"steps": "a"}, {"steps": True}]
)
def test_intervals_are_positive(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="must be positive"):
        Checkpoint("folder", **options)


def test_when_a_checkpoint_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    store = CheckpointStore(Checkpoint(tmp_path, steps=10, minutes=2), {})
    assert store.due(1)
    store.write({})
    assert [store.due(step) for step in (2, 9, 10, 11, 20)] == [False, False, True, False, True]
    now[0] = 119.0
    assert not store.due(11)
    now[0] = 120.0
    assert store.due(11)


def prepared(budget: str = "bops <= 2%") -> Prepared:
    torch.manual_seed(1)
    return prepare(model().eval(), budget, torch.rand(2, 1, 6, 6), search_steps=6)


def train(own: Prepared, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        own.model(torch.ones(2, 1, 6, 6)).square().sum().backward()
        optimizer.step()
        own.step()


@pytest.mark.parametrize("done", [0, 1, 3, 5, 6, 8])
def test_own_loops_keep_their_state(done: int) -> None:
    whole, first, second = prepared(), prepared(), prepared()
    for own in (whole, first, second):
        own.model.eval()
    optimizers = [torch.optim.SGD(own.model.parameters(), 0.01) for own in (whole, first, second)]
    train(whole, optimizers[0], 10)
    train(first, optimizers[1], done)
    second.load_state_dict(unpack(*pack(first.state_dict())))
    train(second, optimizers[2], 10 - done)
    results = whole.finalize().model.state_dict(), second.finalize().model.state_dict()
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


@pytest.mark.parametrize("part", ["model", "signed", "tables", "controller"])
def test_the_state_of_another_model_is_refused(part: str) -> None:
    other = prepare(nn.Linear(3, 2), "bops <= 20%", torch.rand(2, 3)).state_dict()
    with pytest.raises(CheckpointError, match="does not fit the model"):
        prepared().load_state_dict({**prepared().state_dict(), part: other[part]})


def test_frozen_bit_widths_of_a_wider_budget_are_refused() -> None:
    wide, narrow = prepared("bops <= 20%"), prepared()
    narrow.load_state_dict(wide.state_dict())  # gates still move
    wide.freeze()
    with pytest.raises(CheckpointError, match=r"another budget.* bops 16\.\d+% > "):
        narrow.load_state_dict(wide.state_dict())
    assert all(state.satisfied for state in narrow.finalize().cost.states)
    wide.load_state_dict(narrow.state_dict())
    assert all(state.satisfied for state in wide.finalize().cost.states)


TREE = {
    "a": {0: [torch.arange(3), None, True, 7, 0.1, "text"], "b": (1, (2.5,))},
    "c": np.arange(4, dtype=np.uint32),
    "d": [float("inf"), {}],
}


def test_packing_keeps_every_kind() -> None:
    again = unpack(*pack(TREE))
    assert repr(again) == repr(TREE)
    assert again["c"].dtype == np.uint32


@pytest.mark.parametrize("value", [object(), {1.5: 2}, {"deep": lambda: None}])
def test_what_cannot_be_packed_is_named(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"/state.* is a .*which a checkpoint cannot hold"):
        pack({"state": value})


@pytest.mark.parametrize(
    "data", [{"set": []}, {"tensor": "none"}, {}, {"dict": [[1]]}, {"a": 1, "b": 2}]
)
def test_what_is_not_packed_is_refused(data: Any) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        unpack(data, {})
