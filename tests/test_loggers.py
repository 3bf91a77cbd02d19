"""Records of a run, as CSV files and for TensorBoard."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import cgmq_fx
from cgmq_fx import Callback, CSVLogger, OptionError, Result, TensorBoardLogger
from tests.nets import small_classifier

STEPS = 12


def quantized(callback: Callback, **options: Any) -> Result:
    torch.manual_seed(0)
    data = [(torch.rand(4, 3), torch.tensor([0, 1, 0, 1])) for _ in range(STEPS // 3)]
    options = {"epochs": 3, "progress": False, "loss": cross_entropy, **options}
    return cgmq_fx.quantize(
        small_classifier(), "bops <= 5%, weights <= 50%", data, callbacks=[callback], **options
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_files_say_what_the_history_says(tmp_path: Path) -> None:
    val_data = [(torch.rand(4, 3), torch.tensor([0, 1, 0, 1]))]
    history = quantized(CSVLogger(tmp_path / "new"), val_data=val_data).history
    steps = rows(tmp_path / "new" / "steps.csv")
    assert [int(r["step"]) for r in steps] == list(range(1, STEPS + 1))
    assert [r["phase"] for r in steps] == [s.phase for s in history.steps]
    costs = [(float(r["bops"]), float(r["weights"])) for r in steps]
    assert costs == [s.costs for s in history.steps]
    epochs = rows(tmp_path / "new" / "epochs.csv")
    assert [float(r["val accuracy"]) for r in epochs] == [
        e.metrics["accuracy"] for e in history.epochs
    ]
    gates = rows(tmp_path / "new" / "gates.csv")
    assert {r["quantizer"] for r in gates} == set(history.quantizers)
    assert all(2 <= float(r["bits"]) <= 32 for r in gates)


def test_csv_files_without_validation(tmp_path: Path) -> None:
    quantized(CSVLogger(tmp_path))
    head = (tmp_path / "epochs.csv").read_text().splitlines()[0]
    assert head == "epoch,phase,loss,bops,weights,satisfied"


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="cannot be written to"):
        quantized(CSVLogger(tmp_path / "file"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own
def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: not tested with it")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = quantized(TensorBoardLogger(tmp_path)).history
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    written = events.Scalars("cost as a share of its bound/bops")
    assert [e.step for e in written] == list(range(1, STEPS + 1))
    assert [e.value for e in written] == pytest.approx([s.costs[0] for s in history.steps])
    tags = set(events.Tags()["scalars"])
    assert {f"bits/{name}" for name in history.quantizers} <= tags
    assert {"loss/train"} <= tags


def test_without_tensorboard_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(OptionError, match=r"pip install \"cgmq-fx\[tensorboard\]\""):
        TensorBoardLogger(tmp_path)


def test_gates_are_recorded_during_the_search() -> None:
    history = quantized(Callback()).history
    searched = sum(s.phase == "search" for s in history.steps)
    assert 0 < len(history.gates) <= searched + 1
    assert all(len(r.gates) == len(r.bits) == len(history.quantizers) for r in history.gates)
    assert all(0.5 <= gate <= 5.5 for r in history.gates for gate in r.gates)
