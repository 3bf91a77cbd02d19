"""The certificate: what a file costs, counted from the file, beside the bounds it was made for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

from cgmq_fx.cost_models import (
    CONVENTION,
    Budget,
    BudgetLike,
    ConstraintState,
    parse_budget,
)
from cgmq_fx.cost_models.errors import ArtifactError, BoundError, ExportError
from cgmq_fx.cost_models.tables import TableModel
from cgmq_fx.exporters.agreement import Agreement
from cgmq_fx.exporters.code_bits import Layout
from cgmq_fx.exporters.cost_graph import Manifest
from cgmq_fx.exporters.exporter import Exporter, exporter_of
from cgmq_fx.exporters.layer_names import layer_names
from cgmq_fx.given import path_of
from cgmq_fx.passes.insert import QUANTIZERS
from cgmq_fx.passes.quantizer import Quantizer
from cgmq_fx.plain import json_text
from cgmq_fx.presets import TargetLike, deployment
from cgmq_fx.recount import count
from cgmq_fx.result import Result

SUFFIX = ".certificate.json"
_FORMAT = 1


@dataclass(frozen=True)
class Certificate:
    """What a file costs.

    Attributes:
        file: Its name, without the folder.
        format: Name of its format.
        sha256: Its hash, in hexadecimal digits.
        size: Its bytes.
        states: Every constraint: bound, value, satisfied.
        unknown: Ops that no table knows, which are not counted.
        from_file: Whether costs were counted from the file, not from the graph that it was written
            from.
        agreement: How its runtime compares with the graph, if it was run.
    """

    file: str
    format: str
    sha256: str
    size: int
    states: tuple[ConstraintState, ...]
    unknown: tuple[str, ...]
    from_file: bool
    agreement: Agreement | None = None

    @property
    def satisfied(self) -> bool:
        """Whether every constraint holds."""
        return all(state.satisfied for state in self.states)

    def __str__(self) -> str:
        lines = [str(state) for state in self.states]
        if self.unknown:
            lines.append(f"not counted (unknown ops): {', '.join(self.unknown)}")
        return "\n".join([*lines, f"({CONVENTION})"])

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "certificate": _FORMAT,
            "file": self.file,
            "format": self.format,
            "sha256": self.sha256,
            "bytes": self.size,
            "satisfied": self.satisfied,
            "counted_from": "file" if self.from_file else "graph",
            "constraints": [_state(state) for state in self.states],
            "not_counted": list(self.unknown),
            "convention": CONVENTION,
            "agreement": None if self.agreement is None else vars(self.agreement),
        }

    def write(self, path: Path) -> Path:
        """Write it beside the file that it is about.

        Args:
            path: That file.
        """
        target = path.with_name(path.name + SUFFIX)
        target.write_text(json_text(self.to_json()) + "\n")
        return target


def _state(state: ConstraintState) -> dict[str, Any]:
    return {
        "constraint": str(state.constraint),
        "unit": state.constraint.model.unit,
        "value": state.value,
        "limit": state.limit,
        "share": state.relative,
        "satisfied": state.satisfied,
    }


def manifest_of(result: Result, stated: Mapping[str, float] | None = None) -> Manifest:
    """What a file says about itself, so that its bits can be read.

    Args:
        result: What is in the file.
        stated: What relative bounds refer to, by `Constraint.base`, besides what the result itself
            tells that a file has to state.
    """
    layouts = {}
    for name, quantizer in result.model.get_submodule(QUANTIZERS).named_children():
        if isinstance(quantizer, Quantizer):
            spec = quantizer.spec
            layouts[name] = Layout(spec.bit_widths, spec.gate_shape, spec.power_of_two)
    parts = any(constraint.scope is not None for constraint in result.budget)
    layers = layer_names(result.cost.facts) if parts else ()
    budget = result.budget
    own = count(result.model, result.inputs, budget.with_references({})).references
    known = {
        base: reference
        for base, reference in budget.references.items()
        if result.cost.facts.has_copies or not isclose(reference, own[base], rel_tol=1e-9)
    }
    return Manifest(
        result.inputs.batch or 1, str(budget), layouts, layers, known | dict(stated or {})
    )


def other_references(exporter: Exporter, result: Result, path: Path) -> dict[str, float]:
    """What relative bounds refer to, by `Constraint.base`, where the file itself tells otherwise.

    A bound is a share of what the model costs. In a file that may be less: a runtime's own clean-up
    makes one tensor of two that are equal, and one product of two that are computed twice.

    Args:
        exporter: Its format.
        result: What was written.
        path: The file.
    """
    promised = result.budget.references
    if not promised or not exporter.readable:
        return {}
    relative = tuple(c for c in result.budget if c.base in promised and c.bound.relative)
    try:
        states, _ = exporter.read(path).count(Budget(relative))
    except ArtifactError:
        return {}  # `certify` says why it cannot be counted, or what is not
    found = {state.constraint.base: state.reference for state in states}
    return {
        base: promised[base]
        for base, own in found.items()
        if not isclose(own, promised[base], rel_tol=1e-9)
    }


def verify(
    path: str | Path,
    budget: BudgetLike | None = None,
    *,
    target: TargetLike | None = None,
) -> Certificate:
    """Count what an exported file costs, from the file alone, and compare it with a budget.

    It needs neither the model's source nor the training code, and executes nothing from the file.

    Args:
        path: The file; where its certificate lies beside it, the file must be the one certified,
            and cost what that states.
        budget: The bounds; by default those that the file states itself.
        target: The chip for latency and energy: a name, a file or a `Target`.

    Returns:
        What the file costs, and whether every bound holds.

    Raises:
        ArtifactError: If the file cannot be read, is not one that this library wrote, or is not the
            one of its certificate, or does not cost what that states.
        BudgetError: If the budget cannot be read.
        TargetError: If the target cannot be.
        ExportError: If a package that reads the format is missing.
        OptionError: If `path` is none.
    """
    path = path_of("verify", path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    exporter = exporter_of(path)
    digest = hashlib.sha256(content).hexdigest()
    stated = _stated(path, digest)
    try:
        read = exporter.read(path)
    except ModuleNotFoundError as error:
        package, line = str(error.name).partition(".")[0], 'pip install "cgmq-fx[verify]"'
        raise ExportError(f"reading {path} needs {package}; install with: {line}") from error
    parsed = parse_budget(budget if budget is not None else read.budget, deployment(target).chip)
    states, unknown = read.count(parsed)
    _check_values(path, stated, states)
    return Certificate(path.name, exporter.name, digest, len(content), states, unknown, True)


def certify(
    exporter: Exporter, result: Result, path: Path, agreement: Agreement | None
) -> Certificate:
    """The certificate of a file that was just written.

    Where a format of the user's own cannot be read back, constraints are counted from the graph;
    so are those on a part of the model, where the file does not show which part that is.

    Raises:
        BoundError: If the file costs more than the budget allows.
    """
    content = path.read_bytes()
    states, unknown, from_file = result.cost.states, result.cost.facts.unknown, False
    if exporter.readable:
        try:
            states, unknown = exporter.read(path).count(result.budget)
            from_file = True
        except ArtifactError:
            whole = Budget(tuple(c for c in result.budget if c.scope is None))
            if len(whole) == len(result.budget):
                raise
            counted, unknown = exporter.read(path).count(whole)
            known = {str(state.constraint): state for state in counted}
            states = tuple(known.get(str(s.constraint), s) for s in states)
    certificate = Certificate(
        path.name,
        exporter.name,
        hashlib.sha256(content).hexdigest(),
        len(content),
        states,
        tuple(unknown),
        from_file,
        agreement,
    )
    if not certificate.satisfied:
        broken = ", ".join(str(state) for state in states if not state.satisfied)
        raise BoundError(f"the file costs more than its budget allows: {broken}; it was removed")
    return certificate


def _stated(path: Path, digest: str) -> dict[str, float]:
    """What the certificate beside a file says that costs are, by their names; if it is there.

    Raises:
        ArtifactError: If it is no certificate, or one of another file.
    """
    beside = path.with_name(path.name + SUFFIX)
    if not beside.is_file():
        return {}
    try:
        found = json.loads(beside.read_text())
        if found["sha256"] != digest:
            raise ArtifactError(
                f"{path} is not the file that {beside.name} is about: its hash is another one"
            )
        values = {
            str(row["constraint"]).partition(" <= ")[0]: float(row["value"])
            for row in found["constraints"]
        }
        from_file = found["counted_from"] == "file"
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"{beside} is no certificate: {error}") from error
    return values if from_file else {}


def _check_values(path: Path, stated: dict[str, float], states: Iterable[ConstraintState]) -> None:
    for state in states:
        if isinstance(state.constraint.model, TableModel):
            continue  # it does not state which chip's figures it has
        name, unit = state.constraint.name, state.constraint.model.unit
        value = stated.get(name, state.value)
        if not isclose(value, state.value, rel_tol=1e-9):
            raise ArtifactError(
                f"the certificate of {path} states {value:g} {unit} of {name}, but counted from "
                f"the file it is {state.value:g}; a cost model with arguments must be given in the "
                "budget, with these; an older version may have counted wrong where a size is that "
                "of the batch: export again"
            )
