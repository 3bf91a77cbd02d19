"""What a person sees while a model is quantized."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from cgmq_fx.callbacks import Callback
from cgmq_fx.history import EpochRecord, StepRecord

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    from cgmq_fx.prepared import Prepared

_REDRAW_SECONDS = 0.1
_PHASES = len("search, tune")


class Progress(Callback):
    """While it runs: a bar with the time left, phase, loss, and every constraint. A line per epoch.

    Args:
        console: Where to write; standard error by default. Without a terminal there are only lines.
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            expand=True,
        )
        self._epochs = 0
        self._phases: dict[str, None] = {}
        self._drawn = 0.0

    def on_start(self, prepared: Prepared, steps: int) -> None:
        """Show the bar, if there is a terminal."""
        from rich.live import Live

        self._prepared = prepared
        if self._console.is_terminal and steps:
            self._task = self._bar.add_task("search", total=steps)
            self._live = Live(self._bar, console=self._console, transient=True, auto_refresh=False)
            self._live.start()

    def on_step(self, record: StepRecord) -> None:
        """Move the bar, ten times a second at most."""
        self._phases[record.phase] = None
        if self._live is None or monotonic() - self._drawn < _REDRAW_SECONDS:
            return
        from rich.console import Group

        self._drawn = monotonic()
        loss = "" if record.loss is None else f"  train loss {record.loss:.4g}"
        text = f"{record.phase}  epoch {self._epochs + 1}{loss}"
        self._bar.update(self._task, completed=record.step + 1, description=text)
        self._live.update(Group(self._bar, self._constraints(record)), refresh=True)

    def on_epoch(self, record: EpochRecord) -> None:
        """Print a line."""
        self._epochs = record.epoch
        measured = ", ".join(f"{name} {value:.4f}" for name, value in record.metrics.items())
        pairs = zip(self._prepared.budget, record.costs, strict=True)
        shares = ", ".join(f"{c.name} {cost:.1%}" for c, cost in pairs)
        holds = "satisfied" if record.satisfied else "violated"
        phases, self._phases = ", ".join(self._phases) or record.phase, {}
        line = f"epoch {record.epoch:3d}  {phases:{_PHASES}s}  train loss {record.loss:.4f}"
        line += f"  val {measured}" if measured else ""
        costs = f"{shares} of bound, {holds}"
        narrow = self._console.is_terminal and len(line) + len(costs) + 2 > self._console.width
        between = "\n           " if narrow else "  "
        self._console.print(
            f"{line}{between}{costs}", highlight=False, markup=False, soft_wrap=True
        )

    def on_end(self) -> None:
        """Take the bar away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _constraints(self, record: StepRecord) -> Table:
        """A line per constraint: what it costs, its bound, and the cost as a share of the bound."""
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        for state, share in zip(self._prepared.cost, record.costs, strict=True):
            style = "green" if state.satisfied else "red"
            verdict = "satisfied" if state.satisfied else "violated"
            name, value, bound = state.amounts
            ratio = Text(f"{share:.1%} of bound, {verdict}", style)
            table.add_row(Text(name), Text(value), Text(f"<= {bound}"), ratio)
        return table
