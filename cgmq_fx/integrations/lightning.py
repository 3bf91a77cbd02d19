"""Lightning: a callback that moves the gates."""

from __future__ import annotations

from typing import Any

from cgmq_fx.cost_models.errors import OptionError
from cgmq_fx.prepared import Prepared

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise OptionError('Lightning is not installed: pip install "cgmq-fx[lightning]"') from error


class QuantizationCallback(Callback):  # type: ignore[misc]
    """Moves the gates after every step of the optimizer, and logs every cost.

    The `LightningModule` has to train `prepared.model`. Afterwards `prepared.finalize()` gives the
    result, which satisfies the budget wherever training stopped.

    Args:
        prepared: What `cgmq_fx.prepare` gave, calibrated.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._taken = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        """Move the gates, if the optimizer has stepped: not while gradients are accumulated."""
        if trainer.global_step == self._taken:
            return
        self._taken = trainer.global_step
        self._prepared.step()
        pl_module.log_dict(
            {f"cost/{s.constraint.name}": s.value for s in self._prepared.cost},
            on_step=True,
            on_epoch=False,
        )
