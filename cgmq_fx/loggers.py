"""Callbacks of `quantize` that keep a record: as CSV files, and for TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cgmq_fx.callbacks import Callback
from cgmq_fx.cost_models.errors import OptionError
from cgmq_fx.given import path_of
from cgmq_fx.history import EpochRecord, StepRecord

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from cgmq_fx.prepared import Prepared

_RECORDS = 200
"""About how often the gates are recorded in one run."""


class CSVLogger(Callback):
    """Writes `steps.csv`, `epochs.csv` and `gates.csv` while a model is quantized.

    Costs are shares of their bounds. `gates.csv` has a row per quantizer, about 200 times in a run.

    Args:
        folder: Where to; made if it does not exist. Files in it are replaced.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = path_of("CSVLogger", folder)
        self._files = ExitStack()

    def on_start(self, prepared: Prepared, steps: int) -> None:
        """Open the files.

        Raises:
            OptionError: If that is not possible.
        """
        self._prepared = prepared
        self._every = max(1, steps // _RECORDS)
        self._metrics: list[str] | None = None
        self._names = [state.constraint.name for state in prepared.cost]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._steps = self._open("steps", ["step", "phase", "loss", *self._names])
            self._gates = self._open("gates", ["step", "quantizer", "gate", "bits"])
            self._epochs = self._open("epochs", [])
        except OSError as error:
            raise OptionError(f"{self._folder} cannot be written to: {error}") from error

    def on_step(self, record: StepRecord) -> None:
        """Write a row; now and then the gates."""
        loss = "" if record.loss is None else record.loss
        self._steps.writerow([record.step + 1, record.phase, loss, *record.costs])
        if record.step % self._every == 0:
            now = self._prepared.gate_record(record.step)
            names = self._prepared.controller.assignment
            for name, gate, bits in zip(names, now.gates, now.bits, strict=True):
                self._gates.writerow([record.step + 1, name, gate, bits])

    def on_epoch(self, record: EpochRecord) -> None:
        """Write a row."""
        if self._metrics is None:
            self._metrics = list(record.metrics)
            measured = [f"val {name}" for name in self._metrics]
            head = ["epoch", "phase", "loss", *measured, *self._names, "satisfied"]
            self._epochs.writerow(head)
        measured = [str(record.metrics.get(name, "")) for name in self._metrics]
        start = [record.epoch, record.phase, record.loss]
        self._epochs.writerow([*start, *measured, *record.costs, record.satisfied])

    def on_end(self) -> None:
        """Close the files."""
        self._files.close()

    def _open(self, name: str, head: Sequence[str]) -> Any:
        path = self._folder / f"{name}.csv"
        writer = csv.writer(self._files.enter_context(path.open("w", newline="")))
        if head:
            writer.writerow(head)
        return writer


class TensorBoardLogger(Callback):
    """Writes loss, metrics, costs, and the gates and bits of every quantizer for TensorBoard.

    Args:
        folder: Where TensorBoard looks for runs.

    Raises:
        OptionError: If the package `tensorboard` is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise OptionError(
                "TensorBoardLogger needs tensorboard, which is not installed: "
                'pip install "cgmq-fx[tensorboard]"'
            ) from error
        self._writer: SummaryWriter = SummaryWriter(str(folder))

    def on_start(self, prepared: Prepared, steps: int) -> None:
        """Remember what is recorded."""
        self._prepared = prepared
        self._every = max(1, steps // _RECORDS)
        self._step = 0

    def on_step(self, record: StepRecord) -> None:
        """Write the loss and the costs; now and then the gates."""
        self._step = record.step + 1
        if record.loss is not None:
            self._scalar("loss/train", record.loss)
        for state, share in zip(self._prepared.cost, record.costs, strict=True):
            self._scalar(f"cost as a share of its bound/{state.constraint.name}", share)
        if record.step % self._every == 0:
            now = self._prepared.gate_record(record.step)
            names = self._prepared.controller.assignment
            for name, gate, bits in zip(names, now.gates, now.bits, strict=True):
                self._scalar(f"gates/{name}", gate)
                self._scalar(f"bits/{name}", bits)

    def on_epoch(self, record: EpochRecord) -> None:
        """Write what was measured."""
        for name, value in record.metrics.items():
            self._scalar(f"validation/{name}", value)

    def on_end(self) -> None:
        """Flush and close."""
        self._writer.close()

    def _scalar(self, name: str, value: float) -> None:
        self._writer.add_scalar(name, value, self._step)
