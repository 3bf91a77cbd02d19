"""LiteRT's `.tflite`, 8-bit integers wherever layers are quantized."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from cgmq_fx.cost_models.errors import ExportError
from cgmq_fx.exporters.exporter import Exporter, FileCost, Source, register_exporter
from cgmq_fx.exporters.litert_reader import MANIFEST, read_tflite
from cgmq_fx.exporters.program import quiet
from cgmq_fx.exporters.samples import first_sample, run_each
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.contain import contained
from cgmq_fx.passes.copying import copy_graph
from cgmq_fx.passes.infra import Pass, PassResult, run_passes
from cgmq_fx.passes.shapes import PropagateShapes
from cgmq_fx.passes.state import shape_of

_IMAGE = 4
"""Dimensions of a batch of images."""

_QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
_DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
_TO_LAST, _TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


@dataclass(frozen=True)
class TakeChannelsLast(Pass):
    """Let images enter with their channels last.

    Before: a graph with shapes. After: every input of four dimensions is expected as (batch,
    height, width, channels).
    """

    def run(self, module: GraphModule) -> PassResult:
        """Put a permutation behind every image."""
        images = [
            node
            for node in module.graph.find_nodes(op="placeholder")
            if len(shape_of(node) or ()) == _IMAGE
        ]
        for node in images:
            with module.graph.inserting_after(node):
                permute = torch.ops.aten.permute.default
                new = module.graph.call_function(permute, (node, list(_TO_FIRST)))
            node.replace_all_uses_with(new, lambda user, own=new: user is not own)
        return PassResult(module, modified=bool(images))


@dataclass(frozen=True)
class SeparateGrids(Pass):
    """Keep the converter from dropping a change of grid.

    Before: a graph with PyTorch's quantize and dequantize. After: no value goes from one grid to
    another without an op between, which would be taken for rounding twice to the first.
    """

    def run(self, module: GraphModule) -> PassResult:
        """Put the limits that the second grid has anyway between the two."""
        graph, found = module.graph, False
        for node in list(graph.find_nodes(op="call_function", target=_QUANTIZE)):
            source, scale, zero, low, high, _ = node.args
            if source.target is _DEQUANTIZE and source.args[1:3] != (scale, zero):
                limits = (scale * (low - zero), scale * (high - zero))
                with graph.inserting_before(node):
                    clamped = graph.call_function(torch.ops.aten.clamp.default, (source, *limits))
                node.replace_input_with(source, clamped)
                found = True
        return PassResult(module, modified=found)


def channels_last(inputs: ExampleInputs) -> ExampleInputs:
    """The same inputs with the channels of images last."""
    return inputs.map(lambda t: t.permute(_TO_LAST).contiguous() if t.dim() == _IMAGE else t)


@final
@register_exporter
class LiteRT(Exporter):
    """A LiteRT (TensorFlow Lite) model for one sample at a time, images with channels last.

    Inputs and outputs that are quantized are 8-bit integers; their scales and zero points stand in
    the file.
    """

    name: ClassVar[str] = "litert"
    suffix: ClassVar[str] = ".tflite"
    packages: ClassVar[tuple[str, ...]] = ("litert_torch", "ai_edge_litert")
    extra: ClassVar[str] = "litert"
    readable: ClassVar[bool] = True

    def write(self, source: Source, path: Path) -> None:
        """Convert with litert-torch."""
        sample = channels_last(first_sample(source.inputs))
        if sample.kwargs or not all(isinstance(arg, Tensor) for arg in sample.args):
            raise ExportError("LiteRT files take tensors by position, nothing else")
        module = copy_graph(source.lowered)
        module = run_passes(module, [TakeChannelsLast(), PropagateShapes(sample)])
        module = run_passes(contained(module, float_weights=True), [SeparateGrids()])
        try:
            with quiet(), redirect_stdout(StringIO()), torch.no_grad():  # it prints its progress
                _convert(module, sample, path)
                _add_manifest(path, source.manifest)
        except Exception as error:
            raise ExportError(f"litert-torch cannot convert the model: {error}") from error

    def read(self, path: Path) -> FileCost:
        """Read its FlatBuffer, without LiteRT."""
        return read_tflite(path)

    def run(self, path: Path, batches: Sequence[ExampleInputs]) -> list[list[Tensor]]:
        """Run it in LiteRT's interpreter, which uses XNNPACK where it can."""
        with quiet():
            from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(str(path), num_threads=1)
        interpreter.allocate_tensors()
        inputs = sorted(interpreter.get_input_details(), key=lambda d: str(d["name"]))
        outputs = interpreter.get_output_details()

        def run(tensors: list[Tensor]) -> list[Tensor]:
            for tensor, details in zip(tensors, inputs, strict=True):
                interpreter.set_tensor(details["index"], _codes(tensor, details))
            interpreter.invoke()
            return [_values(interpreter.get_tensor(d["index"]), d) for d in outputs]

        return run_each(run, [channels_last(batch) for batch in batches])


def _convert(module: GraphModule, sample: ExampleInputs, path: Path) -> None:
    import litert_torch
    from litert_torch.quantize.pt2e_quantizer import (
        PT2EQuantizer,
        get_symmetric_quantization_config,
    )
    from litert_torch.quantize.quant_config import QuantConfig

    # The model is quantized already; this tells the converter to use integer kernels for it.
    static = PT2EQuantizer().set_global(get_symmetric_quantization_config())
    converted = litert_torch.convert(
        module.eval(), sample.args, quant_config=QuantConfig(pt2e_quantizer=static)
    )
    converted.export(str(path))


def _add_manifest(path: Path, manifest: str) -> None:
    """Write the manifest into the metadata of a file."""
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(path)
    buffer, entry = schema.BufferT(), schema.MetadataT()
    buffer.data = np.frombuffer(manifest.encode(), np.uint8)
    entry.name, entry.buffer = MANIFEST.encode(), len(model.buffers)
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or []), entry]
    flatbuffer_utils.write_model(model, path)


def _codes(tensor: Tensor, details: dict[str, Any]) -> Any:
    """A tensor in the integers that the file takes."""
    scale, zero = details["quantization"]
    kind = details["dtype"]
    if not scale:
        return tensor.numpy().astype(kind)
    limits = np.iinfo(kind)
    codes = np.round(tensor.numpy() / np.float32(scale)) + zero
    return np.clip(codes, limits.min, limits.max).astype(kind)


def _values(codes: Any, details: dict[str, Any]) -> Tensor:
    scale, zero = details["quantization"]
    found = torch.from_numpy(np.array(codes))
    return (found.float() - zero) * scale if scale else found
