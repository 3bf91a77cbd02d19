"""From a QONNX file to an FPGA project of hls4ml, which runs bit by bit as it will on the chip.

hls4ml writes C++ for high-level synthesis. The same C++, compiled by g++, predicts exactly what the
synthesised circuit computes, given steps of powers of two and one step per weight tensor: what
`target="fpga"` trains.
"""

from __future__ import annotations

from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cgmq_fx.cost_models.errors import ExportError
from cgmq_fx.exporters.program import quiet

_PACKAGES = ("hls4ml", "qonnx", "onnx")
_EXACT = frozenset(
    {"Quant", "Conv", "MatMul", "Add", "Relu", "MaxPool", "Concat"}
    | {"Flatten", "Reshape", "Transpose"}
)
"""Ops whose C++ was seen to be exact. hls4ml accepts others: it looks a sigmoid up in a table, and
writes pools of averages that are wrong or do not compile.
"""

_PRECISION = "fixed<32,16>"
"""For what no quantizer decides; hls4ml widens accumulators where it knows that they need it."""


@dataclass(frozen=True)
class HLSProject:
    """An FPGA project.

    Attributes:
        model: hls4ml's model: `build()` synthesises it where the vendor's tools are installed.
        folder: The C++ and scripts.
        step: Step of the input's grid.
        low: Its lowest code.
        high: Its highest code.
        shape: Shape of an output sample.
    """

    model: Any
    folder: Path
    step: float
    low: int
    high: int
    shape: tuple[int, ...]

    def compile(self) -> None:
        """Compile the C++ with g++, to predict with it.

        Raises:
            ExportError: If it does not compile.
        """
        try:
            with redirect_stdout(StringIO()):
                self.model.compile()
        except Exception as error:
            raise ExportError(f"the C++ of hls4ml does not compile: {error}") from error

    def predict(self, inputs: Tensor) -> Tensor:
        """What the circuit computes; `compile` first.

        Args:
            inputs: Shape (batch, ...) as for the model, images with channels first. They are
                rounded to the input's grid, since fixed-point inputs are cut off instead.

        Returns:
            The outputs, as the model gives them.
        """
        codes = (inputs.detach() / self.step).round().clamp(self.low, self.high)
        values = codes * self.step
        if values.dim() > 2:
            values = values.movedim(1, -1)
        found = self.model.predict(np.ascontiguousarray(values.numpy()))
        return torch.from_numpy(np.asarray(found)).reshape(len(inputs), *self.shape)


def hls_project(
    path: str | Path,
    folder: str | Path,
    *,
    backend: str = "Vitis",
    io_type: Literal["io_stream", "io_parallel"] = "io_stream",
    part: str | None = None,
) -> HLSProject:
    """Make an FPGA project of a QONNX file.

    Args:
        path: What `Result.export(path, "qonnx")` wrote for a model of `target="fpga"`.
        folder: Where the project goes.
        backend: hls4ml's: Vitis, Vivado, Quartus or Catapult.
        io_type: Whether layers pass their data pixel by pixel, as convolutional models need it, or
            all at once.
        part: The FPGA; the backend's default otherwise.

    Raises:
        ExportError: If a package is missing, the model has an op that hls4ml does not have, or a
            grid that it cannot express exactly.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ExportError(
            f"an FPGA project needs {', '.join(missing)}; install with: "
            'pip install "cgmq-fx[hls4ml]"'
        )
    with quiet():
        model = _prepared(Path(path))
    _check(model)
    step, low, high = _input_grid(model)
    output = tuple(model.get_tensor_shape(model.graph.output[0].name)[1:])
    converted = _converted(model, Path(folder), backend, io_type, part)
    return HLSProject(converted, Path(folder), step, low, high, output)


def _prepared(path: Path) -> Any:
    """The model in the form that hls4ml reads: channels last, linear layers as products."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean
    from qonnx.transformation.gemm_to_matmul import GemmToMatMul
    from qonnx.util.cleanup import cleanup_model

    try:
        model = cleanup_model(ModelWrapper(str(path)))
        # Without channels last at the input a wrong layout is accepted in silence.
        model = model.transform(ConvertToChannelsLastAndClean(make_input_channels_last=True))
        return cleanup_model(model.transform(GemmToMatMul()))
    except Exception as error:
        raise ExportError(f"{path} cannot be prepared for hls4ml: {error}") from error


def _check(model: Any) -> None:
    """Refuse what hls4ml would refuse without a name, or would convert to something else."""
    unknown = sorted({node.op_type for node in model.graph.node} - _EXACT)
    if unknown:
        raise ExportError(
            f"hls4ml cannot execute {', '.join(unknown)} exactly; convolutions, linear layers, "
            "max-pools, ReLU, sums and joins can be used (a global average pool cannot)"
        )
    for node in model.graph.node:
        if node.op_type != "Quant":
            continue
        step = model.get_initializer(node.input[1])
        if step.size > 1 or np.frexp(step.reshape(-1)[0])[0] != 0.5:
            raise ExportError(
                f"{node.name} has steps that hls4ml cannot express exactly: it takes one per "
                'tensor, a power of two; quantize with target="fpga"'
            )


def _input_grid(model: Any) -> tuple[float, int, int]:
    """Step, lowest and highest code of what reads the input."""
    name = model.graph.input[0].name
    reader = model.find_consumer(name)
    while reader is not None and reader.op_type in ("Transpose", "Reshape", "Flatten"):
        reader = model.find_consumer(reader.output[0])
    if len(model.graph.input) != 1 or reader is None or reader.op_type != "Quant":
        raise ExportError("hls4ml takes models with one input, which is quantized first")
    step, bits = (float(model.get_initializer(reader.input[i]).reshape(-1)[0]) for i in (1, 3))
    signed = next(a.i for a in reader.attribute if a.name == "signed")
    high = 2 ** (int(bits) - signed) - 1
    return step, -high if signed else 0, high


def _converted(model: Any, folder: Path, backend: str, io_type: str, part: str | None) -> Any:
    import hls4ml

    options = {} if part is None else {"part": part}
    try:
        with redirect_stdout(StringIO()), quiet():
            config = hls4ml.utils.config_from_onnx_model(
                model, granularity="name", backend=backend, default_precision=_PRECISION
            )
            return hls4ml.converters.convert_from_onnx_model(
                model,
                output_dir=str(folder),
                backend=backend,
                io_type=io_type,
                hls_config=config,
                **options,
            )
    except Exception as error:
        other = "io_parallel" if io_type == "io_stream" else "io_stream"
        raise ExportError(
            f"hls4ml cannot convert the model: {error}; try io_type={other!r}"
        ) from error
