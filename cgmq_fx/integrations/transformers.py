"""Transformers: a callback for its Trainer that moves the gates."""

from __future__ import annotations

from typing import Any

from cgmq_fx.cost_models.errors import OptionError
from cgmq_fx.prepared import Prepared

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise OptionError(
        'Transformers is not installed: pip install "cgmq-fx[transformers]"'
    ) from error


class QuantizationCallback(TrainerCallback):  # type: ignore[misc]
    """Moves the gates after every step of the optimizer, and logs every cost.

    The `Trainer` has to train `prepared.model`. Afterwards `prepared.finalize()` gives the result,
    which satisfies the budget wherever training stopped.

    Args:
        prepared: What `cgmq_fx.prepare` gave, calibrated.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the gates."""
        self._prepared.step()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add every cost to the history of what was logged."""
        costs = {f"cost/{s.constraint.name}": s.value for s in self._prepared.cost}
        state.log_history.append({**costs, "step": state.global_step})
