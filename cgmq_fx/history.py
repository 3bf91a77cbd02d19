"""What is recorded while a model is quantized."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

import torch

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
        silent: Where values are rounded, channels in which all were 0 for its last batch though
            they have bits: by the name of the quantizer how many, and of how many.
    """

    epoch: int
    phase: Phase
    loss: float
    metrics: dict[str, float]
    costs: tuple[float, ...]
    satisfied: bool
    silent: dict[str, tuple[int, int]] = field(default_factory=dict)


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

    def __repr__(self) -> str:
        return f"<History of {len(self.steps)} steps and {len(self.epochs)} epochs>"

    def state_dict(self) -> dict[str, Any]:
        """The records as tensors and plain values: a long run has very many steps."""
        steps = self.steps
        losses = [math.nan if r.loss is None else r.loss for r in steps]
        return {
            "costs": torch.tensor([r.costs for r in steps], dtype=torch.float64),
            "losses": torch.tensor(losses, dtype=torch.float64),
            "search": sum(r.phase == "search" for r in steps),
            "total": steps[0].steps if steps else 0,
            "epochs": [asdict(r) for r in self.epochs],
            "gates": [asdict(r) for r in self.gates],
            "quantizers": self.quantizers,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        rows = zip(state["costs"].tolist(), state["losses"].tolist(), strict=True)
        self.steps = [
            StepRecord(
                i,
                state["total"],
                "search" if i < state["search"] else "tune",
                tuple(costs),
                None if math.isnan(loss) else loss,
            )
            for i, (costs, loss) in enumerate(rows)
        ]
        self.epochs = [EpochRecord(**row) for row in state["epochs"]]
        self.gates = [GateRecord(**row) for row in state["gates"]]
        self.quantizers = tuple(state["quantizers"])
