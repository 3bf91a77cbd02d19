"""Listening to a run: the interface, and the progress display for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from cgmq_fx.history import EpochRecord, StepRecord

if TYPE_CHECKING:
    from cgmq_fx.prepared import Prepared

_REDRAW = 10


class Callback:
    """Told what happens in a run; every method does nothing unless overridden."""

    def on_start(self, prepared: Prepared, steps: int) -> None:
        """Training is about to begin.

        Args:
            prepared: The model being quantized.
            steps: Training steps in total.
        """

    def on_step(self, record: StepRecord) -> None:
        """A training step is done."""

    def on_epoch(self, record: EpochRecord) -> None:
        """An epoch is done, validation included."""

    def on_end(self) -> None:
        """Training has ended, by success or by an error."""


class Progress(Callback):
    """A bar with the time left while an epoch runs, and a line per epoch.

    Args:
        console: Where to write; standard error by default. Without a terminal there are only lines.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._names: list[str] = []

    def on_start(self, prepared: Prepared, steps: int) -> None:
        """Show the bar, if there is a terminal."""
        self._names = [state.constraint.name for state in prepared.cost]
        if self._console.is_terminal and steps:
            columns = [TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()]
            self._bar = Bar(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("starting", total=steps)
            self._bar.start()

    def on_step(self, record: StepRecord) -> None:
        """Move the bar."""
        if self._bar is not None and self._task is not None and record.step % _REDRAW == 0:
            text = f"{record.phase:6s} {self._cost_text(record.costs)}"
            self._bar.update(self._task, completed=record.step + 1, description=text)

    def on_epoch(self, record: EpochRecord) -> None:
        """Print a line."""
        measured = "".join(f"  val {name} {value:.4f}" for name, value in record.metrics.items())
        holds = "satisfied" if record.satisfied else "violated"
        self._console.print(
            f"epoch {record.epoch:3d}  {record.phase:6s}  loss {record.loss:.4f}{measured}  "
            f"{self._cost_text(record.costs)}  {holds}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    def on_end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def _cost_text(self, costs: tuple[float, ...]) -> str:
        pairs = zip(self._names, costs, strict=True)
        return ", ".join(f"{name} at {cost:.1%} of its bound" for name, cost in pairs)
