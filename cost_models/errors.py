"""The one exception hierarchy of cgmq_fx.

Every mistake that a user can make ends in one of these. They live in the lowest layer so that each
layer can raise them; users import them from `cgmq_fx`.
"""

from __future__ import annotations

from typing import Any


class CgmqError(Exception):
    """Base of every error that cgmq_fx raises on purpose.

    Attributes:
        result: If training had begun, what it had reached: a `cgmq_fx.Result` that satisfies the
            budget, from the weights at the end or, where these are not finite or an earlier epoch
            was better, from those. None if no step was taken, or nothing can be saved.
    """

    result: Any = None

    def __str__(self) -> str:
        hint = " (what training had reached is in this error's `result`)"
        return super().__str__() + (hint if self.result is not None else "")


class BudgetError(CgmqError, ValueError):
    """A budget cannot be read: wrong syntax, wrong unit, or a bound that is no bound."""


class UnknownCostError(BudgetError):
    """A budget names a cost that is not registered."""


class InfeasibleBudgetError(BudgetError):
    """No assignment of the allowed bit-widths satisfies the budget."""


class CostModelError(CgmqError):
    """A cost model breaks its contract: not finite, negative, or lower for more bits.

    Or it fails, or cannot be registered, or made from its name.
    """


class TargetError(CgmqError, ValueError):
    """A target cannot be read, or has no figure for what is asked."""


class UnknownTargetError(TargetError):
    """A target is asked for by a name that nothing has."""


class OptionError(CgmqError, ValueError):
    """An option of the public API has a value that makes no sense or cannot be carried out here."""


class CaptureError(CgmqError):
    """The model cannot be turned into a graph."""


class UnsupportedModelError(CgmqError):
    """Nothing in the model can be quantized, or something in it cannot be executed as asked."""


class PassError(CgmqError):
    """A pass left the graph in a state that breaks the contract of its stage."""


class DataError(CgmqError):
    """The data does not fit the model, or a loss or metric does not fit what the model gives."""


class TrainingError(CgmqError):
    """Training went wrong: something is not finite, memory is short, or another process ended."""


class StoppedError(TrainingError, KeyboardInterrupt):
    """Training was stopped by Ctrl-C."""


class BoundError(CgmqError):
    """The verification of a finished model found a constraint that does not hold."""


class ExportError(CgmqError):
    """A model cannot be written in a format, or what was written does not run as it should."""


class ArtifactError(CgmqError):
    """A file is not an artifact of cgmq_fx, is damaged, or is of a newer format."""


class CheckpointError(CgmqError):
    """A checkpoint cannot be written or read, or is of another run."""
