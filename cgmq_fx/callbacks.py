"""Listening to a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cgmq_fx.history import EpochRecord, StepRecord

if TYPE_CHECKING:
    from cgmq_fx.prepared import Prepared


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
