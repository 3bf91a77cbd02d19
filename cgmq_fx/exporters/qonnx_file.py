"""QONNX: ONNX files whose tensors are marked with the bit-widths that they have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from cgmq_fx.cost_models.errors import ExportError
from cgmq_fx.exporters.exporter import Exporter, FileCost, Source, register_exporter
from cgmq_fx.exporters.onnx_file import translated, without_notes
from cgmq_fx.exporters.onnx_reader import read_onnx
from cgmq_fx.exporters.program import quiet
from cgmq_fx.exporters.samples import first_sample, run_each
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.contain import HoistCodes
from cgmq_fx.passes.copying import copy_graph
from cgmq_fx.passes.infra import run_passes
from cgmq_fx.passes.pools import PoolsAsMeans
from cgmq_fx.passes.quant_nodes import MarkQuants
from cgmq_fx.passes.shapes import PropagateShapes

OPSET = 18
"""The oldest that torch.onnx writes: tools around QONNX are slow to follow."""


@final
@register_exporter
class QONNX(Exporter):
    """QONNX for one sample at a time: what hls4ml, FINN and other FPGA flows read."""

    name: ClassVar[str] = "qonnx"
    suffix: ClassVar[str] = ".onnx"
    packages: ClassVar[tuple[str, ...]] = ("qonnx", "onnx", "onnxscript", "onnxruntime")
    extra: ClassVar[str] = "qonnx"
    readable: ClassVar[bool] = True

    def write(self, source: Source, path: Path) -> None:
        """Write it through torch.onnx."""
        import onnx_ir as ir

        sample = first_sample(source.inputs)
        passes = [HoistCodes(joins=False), PropagateShapes(sample), MarkQuants(), PoolsAsMeans()]
        module = run_passes(copy_graph(source.lowered), passes)
        try:
            with quiet(), torch.no_grad():
                program = torch.export.export(
                    module, sample.args, dict(sample.kwargs), strict=False
                )
        except Exception as error:
            raise ExportError(f"torch.onnx cannot translate the model: {error}") from error
        exported = translated(program, {}, OPSET)
        manifest = json.loads(source.manifest) | {"batch": sample.batch or 1}
        ir.save(without_notes(exported.model, json.dumps(manifest)), path)

    def run(self, path: Path, batches: Sequence[ExampleInputs]) -> list[list[Tensor]]:
        """Run it in qonnx's executor."""
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.transformation.change_batchsize import ChangeBatchSize
        from qonnx.transformation.infer_shapes import InferShapes

        model = ModelWrapper(str(path))
        if len(model.graph.input) > 1 or any(batch.batch is None for batch in batches):
            prepared = model.transform(InferShapes())
            return run_each(lambda tensors: _executed(prepared, tensors), batches)
        sizes = [batch.batch or 1 for batch in batches]  # one run: each one makes many sessions
        model = model.transform(ChangeBatchSize(sum(sizes))).transform(InferShapes())
        outputs = _executed(model, [torch.cat([batch.tensors[0] for batch in batches])])
        return [list(parts) for parts in zip(*(o.split(sizes) for o in outputs), strict=True)]

    def read(self, path: Path) -> FileCost:
        """Bits from the `Quant` nodes, multiply-accumulates from shapes."""
        return read_onnx(path)

    def remarks(self, path: Path) -> tuple[str, ...]:
        """Which tensors have more bits for others than for this library."""
        count = read_onnx(path).graph.mixed
        if not count:
            return ()
        return (
            f"tensors whose gates have different bit-widths: {count}; a Quant node has one, the "
            "widest, so what counts from these nodes (qonnx's inference_cost) counts more than the "
            "bound; target='fpga' trains one bit-width per tensor",
        )


def _executed(model: Any, tensors: list[Tensor]) -> list[Tensor]:
    """Execute a model, node by node.

    Raises:
        ExportError: If the packages that are installed do not fit together.
    """
    from qonnx.core.onnx_exec import execute_onnx

    names = [put.name for put in model.graph.input]
    feed = {n: t.numpy() for n, t in zip(names, tensors, strict=True)}
    try:
        with quiet():
            found = execute_onnx(model, feed)
    except Exception as error:
        if "IR version" in str(error):
            raise ExportError(
                "qonnx writes ONNX of a version that the installed onnxruntime does not read; use "
                'an older onnx: pip install "onnx<1.23"'
            ) from error
        raise
    return [torch.from_numpy(found[put.name]) for put in model.graph.output]
