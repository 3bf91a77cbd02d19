"""What an exporter is, and the registry of formats."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.node import map_aggregate

from cgmq_fx.cost_models import Budget, ConstraintState
from cgmq_fx.cost_models.errors import ArtifactError, ExportError
from cgmq_fx.exporters.inside import Inside
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.copying import copy_graph
from cgmq_fx.passes.lower import lower
from cgmq_fx.result import Result

_BUILT_IN = (
    "onnx_file",
    "onnx_compact",
    "pt2_file",
    "own_file",
    "qonnx_file",
    "executorch_file",
    "litert_file",
)
"""Modules of this package that register formats."""


def in_float32(result: Result) -> Result:
    """A result whose numbers between the grids are float32, as runtimes have them.

    Codes of 8 bits times a step are no numbers of float16 or bfloat16, so a model in one of these
    is deployed as what it rounds.
    """
    wide = [t.dtype for t in result.model.state_dict().values() if _is_other_float(t.dtype)]
    given = [t.dtype for t in result.inputs.tensors if _is_other_float(t.dtype)]
    if not wide and not given:
        return result
    model = copy_graph(result.model).float()
    for node in model.graph.nodes:
        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), _single)
    model.recompile()
    inputs = result.inputs.map(lambda t: t.float() if _is_other_float(t.dtype) else t)
    return replace(result, model=model, inputs=inputs)


def _is_other_float(value: Any) -> bool:
    other = isinstance(value, torch.dtype) and value.is_floating_point
    return other and value is not torch.float32


def _single(value: Any) -> Any:
    return torch.float32 if _is_other_float(value) else value


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        result: The quantized model.
        manifest: JSON text that belongs into the file, where its format has a place for text.
    """

    result: Result
    manifest: str = "{}"

    @property
    def inputs(self) -> ExampleInputs:
        """Example inputs with memory of their own: files hold the whole storage of a view."""
        return self.result.inputs.map(lambda t: t.detach().cpu().clone())

    @cached_property
    def lowered(self) -> GraphModule:
        """The lowered graph, on the CPU; signed codes in signed containers. Not to be edited."""
        return lower(self.frozen, self.inputs)

    @cached_property
    def lowered_with_offset(self) -> GraphModule:
        """The same with the codes of signed activations in unsigned containers."""
        return lower(self.frozen, self.inputs, offset=True)

    @cached_property
    def frozen(self) -> GraphModule:
        """The quantized model itself, on the CPU, for evaluation. Not to be edited."""
        return copy_graph(self.result.model).cpu().eval()


class FileCost(ABC):
    """What was read from a file in order to count its cost."""

    @property
    @abstractmethod
    def budget(self) -> str:
        """The budget that the file states, as text."""

    @abstractmethod
    def count(self, budget: Budget) -> tuple[tuple[ConstraintState, ...], tuple[str, ...]]:
        """Every constraint with its cost, and the ops that no table knows."""


class Exporter(ABC):
    """A format.

    Attributes:
        name: What users call it.
        suffix: Ending of its files; the first registered format with a suffix is its default.
        packages: Import names of what must be installed to write and run it.
        extra: The extra of this library that installs them, empty if it needs none.
        readable: Whether the cost of a file can be counted from the file: `read` is implemented.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    readable: ClassVar[bool] = False

    @abstractmethod
    def write(self, source: Source, path: Path) -> None:
        """Write the file.

        Raises:
            ExportError: If the graph holds something that the format cannot express.
        """

    @abstractmethod
    def run(self, path: Path, batches: Sequence[ExampleInputs]) -> list[list[Tensor]]:
        """Load the file in the runtime that it is meant for, and run it.

        Args:
            path: What `write` wrote.
            batches: Inputs in the form of the source's example inputs.

        Returns:
            For every batch the outputs, flat, in the order of the graph.
        """

    def inside(self, source: Source, path: Path, batches: Sequence[ExampleInputs]) -> Inside | None:
        """What its runtime computes inside of a file, asked for where outputs disagree.

        Args:
            source: What was written.
            path: What `write` wrote.
            batches: As of `run`.

        Returns:
            None if the runtime shows nothing but outputs.
        """
        return None

    def read(self, path: Path) -> FileCost:
        """Read what a file costs, from nothing but the file, without executing anything in it.

        Raises:
            ArtifactError: If it is not a file that this library exported, is damaged, or of a newer
                format.
        """
        raise ArtifactError(f"what a file of format {self.name!r} costs cannot be read from it")

    def remarks(self, path: Path) -> tuple[str, ...]:
        """What whoever deploys a file should know of it, in sentences.

        Args:
            path: What `write` wrote.
        """
        return ()

    def check_installed(self) -> None:
        """Insist that all packages are there.

        Raises:
            ExportError: Naming those that are missing and the line that installs them.
        """
        missing = [name for name in self.packages if find_spec(name) is None]
        if missing:
            raise ExportError(
                f"the format {self.name!r} needs {', '.join(missing)}; "
                f'install with: pip install "cgmq-fx[{self.extra}]"'
            )


_EXPORTERS: dict[str, Exporter] = {}
ExporterType = TypeVar("ExporterType", bound=type[Exporter])


def register_exporter(kind: ExporterType) -> ExporterType:
    """Make a format known; a class decorator.

    Raises:
        ExportError: If it has no name or no suffix, lacks a method, or if the name is taken.
    """
    if kind.__module__.rpartition(".")[0] != __package__:
        exporters()  # those of this package come first, whenever others are registered
    name, suffix = getattr(kind, "name", None), getattr(kind, "suffix", None)
    if not isinstance(name, str) or not name:
        raise ExportError(f"{kind.__qualname__} needs a `name`, such as 'mine'; it has {name!r}")
    if not isinstance(suffix, str) or not suffix.startswith(".") or suffix != suffix.lower():
        raise ExportError(
            f"{kind.__qualname__} needs a `suffix` in small letters, such as '.mine'; it has "
            f"{suffix!r}"
        )
    if name in _EXPORTERS:
        raise ExportError(f"there is a format {name!r} already")
    missing = ", ".join(sorted(kind.__abstractmethods__))
    if missing:
        raise ExportError(f"{kind.__qualname__} has to define {missing}")
    _EXPORTERS[name] = kind()
    return kind


def exporters() -> dict[str, Exporter]:
    """All formats by name."""
    for name in _BUILT_IN:
        importlib.import_module(f"cgmq_fx.exporters.{name}")
    return dict(_EXPORTERS)


def find_exporter(path: Path, name: str | None) -> Exporter:
    """The format that was asked for, by name or else by the suffix of the file.

    Raises:
        ExportError: If there is none.
    """
    known = exporters()
    if name is not None:
        if name not in known:
            raise ExportError(f"there is no format {name!r}; there are {', '.join(known)}")
        return known[name]
    try:
        return exporter_of(path)
    except ArtifactError as error:
        raise ExportError(f"{error} or pass format=, one of {', '.join(known)}") from error


def exporter_of(path: Path) -> Exporter:
    """The format that the suffix of a file stands for.

    Raises:
        ArtifactError: If it stands for none.
    """
    known = exporters().values()
    for exporter in known:
        if path.suffix.lower() == exporter.suffix:
            return exporter
    suffixes = dict.fromkeys(e.suffix for e in known)
    raise ArtifactError(
        f"cannot tell the format of {path.name!r}: its suffix is none of {', '.join(suffixes)}; "
        "rename it"
    )
