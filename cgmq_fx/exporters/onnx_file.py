"""ONNX files in QDQ form: integers between QuantizeLinear and DequantizeLinear.

Written by torch.onnx; the two ops of a lowered graph are translated here, and nothing else. What
makes onnxruntime run integer kernels was measured: explicit zero points everywhere, unsigned
containers for activations that go below zero, and a Clip on the codes where a grid has fewer codes
than its container. (A runtime ignores limits that are not written out like this.) Slices, pads and
pools between codes on both sides run on bytes, which made ResNet-20 a tenth faster.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from cgmq_fx.cost_models.errors import ExportError
from cgmq_fx.exporters.exporter import Exporter, FileCost, Source, register_exporter
from cgmq_fx.exporters.inside import Inside
from cgmq_fx.exporters.onnx_float_weights import keep_float_weights
from cgmq_fx.exporters.onnx_names import name_for_users
from cgmq_fx.exporters.onnx_optimiser import optimise
from cgmq_fx.exporters.onnx_parts import keep_names, name_ops
from cgmq_fx.exporters.onnx_products import keep_float_products
from cgmq_fx.exporters.onnx_reader import read_onnx
from cgmq_fx.exporters.onnx_saturation import avoid_saturation, unsigned_weights
from cgmq_fx.exporters.program import constants_returned, exported_program, quiet
from cgmq_fx.passes.absorb import AbsorbClamps
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.codes import DEQUANTIZE, QUANTIZE, is_quantize
from cgmq_fx.passes.contain import HoistCodes, SurroundOps
from cgmq_fx.passes.copying import copy_graph
from cgmq_fx.passes.infra import run_passes
from cgmq_fx.passes.pools import PoolsAsMeans, PoolsWithoutPadding

OPSET = 21
"""The first one with 16-bit containers; onnxruntime refuses the newest that onnx writes."""

_KEY = "cgmq_fx"


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How torch.onnx writes the ops of a lowered graph."""
    import onnx_ir as ir
    from onnx import numpy_helper
    from onnxscript import opset21 as op

    def constant(value: Any, dtype: Any) -> Any:
        return op.Constant(value=numpy_helper.from_array(np.asarray(value, dtype)))

    def quantize(
        x: Any,
        step: Any,
        zero_point: int,
        low: Sequence[int],
        high: Sequence[int],
        axis: int,
        dtype: int,
    ) -> Any:
        if x.dtype not in (None, ir.DataType.FLOAT):  # steps are, and both have to be the same
            x = op.Cast(x, to=ir.DataType.FLOAT)
        kind = ir.DataType(dtype).numpy()
        zero = constant(np.full(list(step.shape), zero_point), kind)
        limits = np.add(low, zero_point), np.add(high, zero_point)
        whole, single = np.iinfo(kind), len(step.shape) == 0
        if single and (limits[0] <= whole.min).all() and (limits[1] >= whole.max).all():
            return op.QuantizeLinear(x, step, zero, axis=axis)
        if single and len(low) == 1 and np.dtype(kind).itemsize == 1:
            codes = op.QuantizeLinear(x, step, zero, axis=axis)
            return op.Clip(codes, constant(limits[0][0], kind), constant(limits[1][0], kind))
        # onnxruntime clips neither codes of 16 bits nor channel by channel, and takes steps per
        # channel right behind a convolution for one it can execute: clip the values
        if single and len(low) == len(high) == 1:
            ends = (op.Mul(constant(limit[0], np.float32), step) for limit in (low, high))
            return op.QuantizeLinear(op.Clip(x, *ends), step, zero, axis=axis)
        along = [] if single else [-1 if i == axis else 1 for i in range(len(x.shape))]
        step_along = op.Reshape(step, constant(along, np.int64)) if along else step
        for limit, nearest in ((low, op.Max), (high, op.Min)):
            codes = constant(np.reshape(limit, along if len(limit) > 1 else []), np.float32)
            x = nearest(x, op.Mul(codes, step_along))
        return op.QuantizeLinear(x, step, zero, axis=axis)

    def dequantize(codes: Any, step: Any, zero_point: int, axis: int) -> Any:
        if codes.dtype == ir.DataType.INT32:  # a bias, which has none
            return op.DequantizeLinear(codes, step, axis=axis)
        zero = np.full(list(step.shape), zero_point)
        return op.DequantizeLinear(codes, step, constant(zero, codes.dtype.numpy()), axis=axis)

    return {QUANTIZE: quantize, DEQUANTIZE: dequantize}


def to_onnx(source: Source) -> Any:
    """The model as a torch.onnx program, without the exporter's notes about where nodes came from.

    Raises:
        ExportError: If torch.onnx has no translation of an op.
    """
    exported = translated(_program(source), translations(), OPSET)
    return without_notes(exported.model, source.manifest)


def _program(source: Source) -> ExportedProgram:
    """What is translated: a quantize is called there as the codes that it makes are in the file."""
    module = copy_graph(source.lowered_with_offset)
    passes = [HoistCodes(), AbsorbClamps(), SurroundOps(), PoolsAsMeans(), PoolsWithoutPadding()]
    module = run_passes(module, passes)
    return exported_program(module, source.inputs)


def translated(program: ExportedProgram, table: dict[Any, Any], opset: int) -> Any:
    """What torch.onnx makes of a program.

    Args:
        program: The program.
        table: Translations of ops that are not PyTorch's own.
        opset: Version of the operators.

    Raises:
        ExportError: If torch.onnx has no translation of an op, or something else than tensors is
            returned.
    """
    others = constants_returned(program.graph_module)
    if others:
        raise ExportError(
            f"an ONNX file returns tensors, and the model returns {others[0]!r} beside them; leave "
            "it out"
        )
    name_ops(program)
    try:
        with quiet():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                custom_translation_table=table,
                opset_version=opset,
                optimize=False,
                verbose=False,
            )
            if exported is not None:
                optimise(exported.model)
    except Exception as error:
        cause = error.__cause__ or error  # what it says itself is how to report that
        raise ExportError(f"torch.onnx cannot translate the model: {cause}") from error
    if exported is None:
        raise ExportError("torch.onnx gave no program")
    return exported


def without_notes(model: Any, manifest: str) -> Any:
    """A model of onnx_ir without the exporter's notes and names, in place.

    What stays is which of several nodes are one op of the model.
    """
    keep_names(model)
    for value in (model, model.graph, *model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()
    for node in model.graph:
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    name_for_users(model)
    model.metadata_props[_KEY] = manifest
    return model


def drop_unread(model: Any) -> None:
    """Drop constants that nothing reads, such as zero points of weights that got others."""
    for node in list(model.graph):
        if node.op_type == "Constant" and not any(out.uses() for out in node.outputs):
            model.graph.remove(node, safe=True)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


def run_onnx(
    model: Path | bytes,
    batches: Sequence[ExampleInputs],
    configure: Callable[[Any], None] | None = None,
) -> list[list[Tensor]]:
    """Run a file in onnxruntime on the CPU.

    Args:
        model: The file, or what is in it.
        batches: Inputs whose tensors, in order, are the inputs of the file.
        configure: Called with the session's options.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if configure is not None:
        configure(options)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [put.name for put in session.get_inputs()]
    found = []
    for batch in batches:
        given = [leaf for leaf in pytree.tree_leaves((batch.args, dict(batch.kwargs)))]
        tensors = [leaf.numpy() for leaf in given if isinstance(leaf, Tensor)]
        outputs = session.run(None, dict(zip(names, tensors, strict=True)))
        found.append([torch.from_numpy(np.array(value)) for value in outputs])
    return found


class QdqFile(Exporter):
    """ONNX in QDQ form, however its weights are stored."""

    suffix: ClassVar[str] = ".onnx"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    extra: ClassVar[str] = "onnx"
    readable: ClassVar[bool] = True

    @abstractmethod
    def store(self, model: Any) -> None:
        """Give the weights, in signed bytes, the types that they are stored in, in place.

        Args:
            model: A model of onnx_ir.
        """

    def configure(self, options: Any) -> None:
        """Set what a session needs to be told to run the file."""

    def write(self, source: Source, path: Path) -> None:
        """Write it through torch.onnx."""
        import onnx_ir as ir

        model = to_onnx(source)
        keep_float_products(model)
        keep_float_weights(model)
        self.store(model)
        drop_unread(model)
        ir.save(model, path)

    def read(self, path: Path) -> FileCost:
        """Read its nodes and tensors with onnx."""
        return read_onnx(path)

    def run(self, path: Path, batches: Sequence[ExampleInputs]) -> list[list[Tensor]]:
        """Run it in onnxruntime."""
        return run_onnx(path, batches, self.configure)

    def inside(self, source: Source, path: Path, batches: Sequence[ExampleInputs]) -> Inside:
        """Run it in onnxruntime with all codes among its outputs."""
        import onnx

        program, model = _program(source), onnx.load(path)
        outputs = [put.name for put in model.graph.output]
        made = {name for node in model.graph.node for name in node.output} - {*outputs}
        names = [n.name for n in program.graph.nodes if is_quantize(n) and n.name in made]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        found = run_onnx(model.SerializeToString(), batches, self.configure)
        count = len(outputs)
        codes = [dict(zip(names, row[count:], strict=True)) for row in found]
        return Inside(program.module(), codes, [row[:count] for row in found])


@final
@register_exporter
class Portable(QdqFile):
    """8-bit containers, exact on every processor: weights that could saturate are unsigned."""

    name: ClassVar[str] = "onnx"

    def store(self, model: Any) -> None:
        """As `avoid_saturation` says."""
        avoid_saturation(model)

    def remarks(self, path: Path) -> tuple[str, ...]:
        """How many weights have the slower kernels, and what to do about it."""
        count = unsigned_weights(path)
        if not count:
            return ()
        return (
            f"{count} weights of 8 bits meet 8-bit activations and are unsigned, for exact sums on "
            "every processor, at the price of onnxruntime's fast kernels; target='onnxruntime' "
            "trains weights of at most 7 bits, format='onnx-signed' is for processors with VNNI",
        )


@final
@register_exporter
class Signed(QdqFile):
    """8-bit containers, all weights signed: what onnxruntime has its fastest kernels for.

    Products of 8 by 8 bits are exact where processors add them in 32 bits, as x86 does with VNNI.
    Elsewhere sums saturate; verification finds that only on such a processor.
    """

    name: ClassVar[str] = "onnx-signed"

    def store(self, model: Any) -> None:
        """They stay as they are."""
