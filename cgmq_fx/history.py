"""What is recorded while a model is quantized."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Phase: TypeAlias = Literal["search", "tune"]
"""Search: gates move. Tune: bit-widths are frozen, weights and ranges train on."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One training step.

    Attributes:
        step: Steps taken before this one.
        steps: Steps in total.
        phase: What the driver is doing.
        costs: The cost of every constraint after the step, as a share of its bound.
        loss: The training loss, where it was read: always on the CPU, else now and then.
    """

    step: int
    steps: int
    phase: Phase
    costs: tuple[float, ...]
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One epoch.

    Attributes:
        epoch: Counted from 1.
        phase: What the driver was doing at its end.
        loss: Mean training loss.
        metrics: Measurements on the validation data, by name; empty without.
        costs: The cost of every constraint, as a share of its bound.
        satisfied: Whether the budget held at the end of the epoch.
    """

    epoch: int
    phase: Phase
    loss: float
    metrics: dict[str, float]
    costs: tuple[float, ...]
    satisfied: bool


@dataclass(frozen=True, slots=True)
class GateRecord:
    """Where the gates stood after a step.

    Attributes:
        step: Steps taken before it.
        gates: The mean gate of every quantizer.
        bits: The mean bit-width of every quantizer.
    """

    step: int
    gates: tuple[float, ...]
    bits: tuple[float, ...]


@dataclass
class History:
    """Everything recorded in one run.

    Attributes:
        steps: A record per step.
        epochs: A record per epoch.
        gates: A record now and then during the search, about a hundred in all.
        quantizers: The names of the quantizers, in the order of `gates`.
    """

    steps: list[StepRecord] = field(default_factory=list)
    epochs: list[EpochRecord] = field(default_factory=list)
    gates: list[GateRecord] = field(default_factory=list)
    quantizers: tuple[str, ...] = ()
