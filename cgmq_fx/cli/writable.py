"""A check before training that its result can be written."""

from __future__ import annotations

from cgmq_fx.artifact import check_kept
from cgmq_fx.callbacks import Callback
from cgmq_fx.prepared import Prepared


class Writable(Callback):
    """Sees before the first step that a file can hold the result: all that a command leaves."""

    def on_start(self, prepared: Prepared, steps: int) -> None:
        """Check the graph.

        Raises:
            ArtifactError: If no file can hold it.
        """
        check_kept(prepared.model)
