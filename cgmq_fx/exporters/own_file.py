"""The library's own artifact as an export format: small, exact, and read back by `cgmq_fx.load`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, final

from torch import Tensor

from cgmq_fx.artifact import load, save
from cgmq_fx.cost_models import Budget, ConstraintState
from cgmq_fx.exporters.agreement import outputs_of
from cgmq_fx.exporters.exporter import Exporter, FileCost, Source, register_exporter
from cgmq_fx.history import History
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.recount import count
from cgmq_fx.result import Result


@dataclass(frozen=True)
class _Loaded(FileCost):
    """A file that was loaded as a result."""

    result: Result

    @property
    def budget(self) -> str:
        """The budget that the file states."""
        return str(self.result.budget)

    def count(self, budget: Budget) -> tuple[tuple[ConstraintState, ...], tuple[str, ...]]:
        """Count on the graph in the file."""
        known = budget.with_references(self.result.budget.references)
        report = count(self.result.model, self.result.inputs, known)
        return report.states, report.facts.unknown


@final
@register_exporter
class Own(Exporter):
    """One safetensors file with packed codes and a JSON header, without the training's history."""

    name: ClassVar[str] = "safetensors"
    suffix: ClassVar[str] = ".safetensors"
    readable: ClassVar[bool] = True

    def write(self, source: Source, path: Path) -> None:
        """Save the result without what was recorded on the way."""
        save(replace(source.result, history=History()), path, packed=True)

    def read(self, path: Path) -> FileCost:
        """Load it, which executes nothing."""
        return _Loaded(load(path))

    def run(self, path: Path, batches: Sequence[ExampleInputs]) -> list[list[Tensor]]:
        """Load it and run its graph."""
        return outputs_of(load(path).model, batches)
