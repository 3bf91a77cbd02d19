"""`export`: write, run, compare, count."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cgmq_fx.cost_models.errors import CgmqError, DataError, ExportError, OptionError
from cgmq_fx.data import Signature, calibration_batches
from cgmq_fx.exporters.agreement import (
    Agreement,
    Reference,
    compared,
    outputs_of,
    trial_batches,
)
from cgmq_fx.exporters.certificate import (
    Certificate,
    certify,
    manifest_of,
    other_references,
)
from cgmq_fx.exporters.cost_graph import Manifest
from cgmq_fx.exporters.exporter import Exporter, Source, find_exporter, in_float32
from cgmq_fx.exporters.inside import look_inside
from cgmq_fx.exporters.program import draws
from cgmq_fx.given import path_of
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.copying import copy_graph
from cgmq_fx.result import Result

_SAMPLES = 32
_SAMPLE_BATCHES = 4


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: The file.
        format: Name of its format.
        certificate: What it costs, as counted from the file; it lies beside it as JSON.
        remarks: What whoever deploys it should know.
    """

    path: Path
    format: str
    certificate: Certificate
    remarks: tuple[str, ...] = ()

    @property
    def agreement(self) -> Agreement | None:
        """How its runtime compares with the graph; None if it was not run."""
        return self.certificate.agreement

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.format}, {self.certificate.size:,} bytes)"]
        lines += [] if self.agreement is None else [str(self.agreement)]
        return "\n".join([*lines, *map(str, self.certificate.states), *self.remarks])


def export(
    result: Result,
    path: str | Path,
    format: str | None = None,
    *,
    verify: bool = True,
    samples: Iterable[Any] | None = None,
) -> Exported:
    """Write a quantized model as a file that a runtime executes.

    Args:
        result: What `quantize`, `Prepared.finalize` or `load` gave.
        path: The file; replaced if it exists, and left alone if anything goes wrong.
        format: Name of the format; by default the suffix decides.
        verify: Whether to run the file in its runtime, on data that saturates the quantizers and on
            `samples`, and compare it with the graph.
        samples: Batches of inputs, in any of the forms that `quantize` takes; the first four are
            used.

    Returns:
        What was written, and how well it agrees.

    Raises:
        OptionError: If `result` is none, or `path` is none.
        ExportError: If there is no such format, a package is missing, the format cannot express
            the graph, the file cannot be written, or the runtime computes something else.
        UnsupportedModelError: If the graph cannot be lowered to integers, whatever the format.
        DataError: If `samples` do not fit the model.
        BoundError: If the file, counted on its own, costs more than the budget allows.
    """
    if not isinstance(result, Result):
        raise OptionError(f"export takes what quantize gave, not {type(result).__name__}")
    path = path_of("export", path)
    exporter = find_exporter(path, format)
    exporter.check_installed()
    result = in_float32(result)
    try:
        with TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as folder:
            temporary = Path(folder) / path.name
            source = _written(exporter, result, temporary)
            agreement: Agreement | None = None
            excuses: tuple[str, ...] = ()
            if verify:
                agreement, excuses = _verified(exporter, source, temporary, samples)
            certificate = certify(exporter, result, temporary, agreement)
            remarks = (*exporter.remarks(temporary), *excuses)
            beside = certificate.write(temporary)
            temporary.replace(path)
            beside.replace(path.with_name(beside.name))
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error}") from error
    return Exported(path, exporter.name, certificate, remarks)


def _written(exporter: Exporter, result: Result, path: Path) -> Source:
    """Write a file that tells what its bounds refer to, where that cannot be counted from it."""
    source = _source(result, manifest_of(result))
    exporter.write(source, path)
    others = other_references(exporter, result, path)
    if others:
        source = _source(result, manifest_of(result, others))
        exporter.write(source, path)
    return source


def _source(result: Result, manifest: Manifest) -> Source:
    return Source(result, json.dumps(manifest.to_json(), separators=(",", ":")))


def _verified(
    exporter: Exporter, source: Source, path: Path, samples: Iterable[Any] | None
) -> tuple[Agreement, tuple[str, ...]]:
    """How a file agrees with the graph, and why that is right where it looks wrong."""
    batches = [source.inputs, *trial_batches(source.lowered, source.inputs, _SAMPLES)]
    if samples is not None:
        batches += _given(source, samples)
    try:
        found = exporter.run(path, batches)
    except CgmqError:
        raise
    except Exception as error:
        raise ExportError(f"the runtime of {exporter.name!r} refuses the file: {error}") from error
    reference = Reference(source.lowered, batches)
    _check_lowered(source, reference)
    agreement = reference.compare(found)
    if agreement.is_close:
        return agreement, ()
    inside = exporter.inside(source, path, batches)
    if inside is not None and compared(source.lowered, inside.outputs, found).holds:
        finding = look_inside(inside, batches)
        excuse, wrong = finding.excuse, finding.wrong
    else:
        excuse, wrong = None if agreement.holds else reference.excuse(found), None
    if wrong is not None or not (agreement.holds or excuse):
        where = "" if wrong is None else f"; the first to differ from what is before it: {wrong}"
        raise ExportError(
            f"the file runs, but does not compute what the model computes: {agreement}{where}; it "
            "was removed"
        )
    return agreement, () if agreement.holds or excuse is None else (excuse,)


def _check_lowered(source: Source, reference: Reference) -> None:
    """Insist that the integers, which files are compared with, compute what the model computes.

    Raises:
        ExportError: If they do not, naming the ops that draw random numbers, if there are any.
    """
    found = outputs_of(copy_graph(source.frozen), reference.batches)
    agreement = reference.compare(found)
    if agreement.holds:
        return
    if not agreement.values:
        raise ExportError(
            "all outputs of the model are empty, so nothing tells whether a file computes what the "
            "model computes; verify=False writes one nevertheless"
        )
    drawn = [node for node in source.lowered.graph.nodes if draws(node)]
    if not drawn and reference.excuse(found) is not None:
        return
    reason = f": {', '.join(n.name for n in drawn)} draws random numbers" if drawn else ""
    raise ExportError(
        f"the integers of the model do not compute what it computes itself{reason} ({agreement})"
    )


def _given(source: Source, samples: Iterable[Any]) -> list[ExampleInputs]:
    names = tuple(str(n.target) for n in source.lowered.graph.find_nodes(op="placeholder"))
    signature = Signature.like(source.inputs, names)
    device = source.inputs.tensors[0].device
    found = calibration_batches(
        samples, signature, supervised=False, count=_SAMPLE_BATCHES, device=device
    )
    batches = [batch.map(lambda t: t.float() if t.is_floating_point() else t) for batch in found]
    try:
        outputs_of(copy_graph(source.frozen), batches)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise DataError(f"the model fails on the samples: {error}") from error
    return batches
