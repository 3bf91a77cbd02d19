"""Chains of layers as ONNX graphs, in float32 or on 8-bit integer kernels, and their run times."""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper
from torch import nn

OPSET = 21
IR_VERSION = 10  # onnxruntime refuses the newest that onnx writes
STEP = 0.05
WARM_UP = 5
MIN_RUNS = 15


class Graph:
    """An ONNX graph that grows by one layer at a time.

    Integer graphs are uint8 from end to end, with zero point 0: ReLU then is the saturation of the
    layer before it. Scales are arbitrary, since run times do not depend on values.
    """

    def __init__(self, integer: bool) -> None:
        self.integer = integer
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.tail = "input"
        self._random = np.random.default_rng(0)

    def add(self, layer: nn.Module) -> None:
        """Append a layer.

        Raises:
            ValueError: If there is no translation of it.
        """
        match layer:
            case nn.Conv2d():
                self._convolution(layer)
            case nn.Linear():
                self._linear(layer)
            case nn.MaxPool2d():
                sizes = {"kernel_shape": _two(layer.kernel_size), "strides": _two(layer.stride)}
                self._node("MaxPool", [self.tail], **sizes)
            case nn.AdaptiveAvgPool2d():
                self._global_pool()
            case nn.Flatten():
                self._node("Flatten", [self.tail])
            case nn.ReLU():
                if not self.integer:
                    self._node("Relu", [self.tail])
            case _:
                raise ValueError(f"no translation of {type(layer).__name__}")

    def model(self, shape: tuple[int, ...]) -> bytes:
        """The serialised model for one input of `shape`."""
        kind = onnx.TensorProto.UINT8 if self.integer else onnx.TensorProto.FLOAT
        ends = [
            helper.make_tensor_value_info(name, kind, dims)
            for name, dims in (("input", shape), (self.tail, None))
        ]
        graph = helper.make_graph(self.nodes, "net", ends[:1], ends[1:], self.constants)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        serialised: bytes = model.SerializeToString()
        return serialised

    def _convolution(self, layer: nn.Conv2d) -> None:
        sizes = {"pads": _two(layer.padding) * 2, "strides": _two(layer.stride)}
        options = sizes | {"group": layer.groups}
        weight = self._weight(tuple(layer.weight.shape))
        bias = self._bias(layer.out_channels)
        if self.integer:
            self._node(
                "QLinearConv", [*self._quantized(), *weight, *self._scale(), bias], **options
            )
        else:
            self._node("Conv", [self.tail, *weight, bias], **options)

    def _linear(self, layer: nn.Linear) -> None:
        weight = self._weight(tuple(layer.weight.shape))
        bias = self._bias(layer.out_features)
        if self.integer:
            inputs = [*self._quantized(), *weight, bias, *self._scale()]
            self._node("QGemm", inputs, domain="com.microsoft", transB=1)
        else:
            self._node("Gemm", [self.tail, *weight, bias], transB=1)

    def _global_pool(self) -> None:
        if self.integer:
            inputs = [*self._quantized(), *self._scale()]
            self._node("QLinearGlobalAveragePool", inputs, domain="com.microsoft")
        else:
            self._node("GlobalAveragePool", [self.tail])

    def _quantized(self) -> list[str]:
        return [self.tail, *self._scale()]

    def _scale(self) -> list[str]:
        return [self._constant(np.float32(STEP)), self._constant(np.uint8(0))]

    def _weight(self, shape: tuple[int, ...]) -> list[str]:
        codes = self._random.integers(-127, 128, shape)
        if not self.integer:
            return [self._constant((codes / 127).astype(np.float32))]
        scale = [self._constant(np.float32(STEP)), self._constant(np.int8(0))]
        return [self._constant(codes.astype(np.int8)), *scale]

    def _bias(self, channels: int) -> str:
        return self._constant(np.ones(channels, np.int32 if self.integer else np.float32))

    def _constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _node(self, op: str, inputs: list[str], **options: Any) -> None:
        self.tail = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [self.tail], **options))


def _two(value: Any) -> list[int]:
    """A size that torch takes as one number or as two."""
    return list(value) if isinstance(value, tuple) else [value, value]


def build(net: nn.Sequential, shape: tuple[int, ...], integer: bool) -> bytes:
    """A chain of layers as a serialised ONNX model.

    Args:
        net: Convolutions, linear layers, ReLU, max pools, global average pools, flatten.
        shape: Shape of the input, the batch included.
        integer: Whether it runs on uint8 activations and int8 weights, or in float32.
    """
    graph = Graph(integer)
    for layer in net:
        graph.add(layer)
    return graph.model(shape)


def seconds(model: bytes, threads: int, budget: float) -> float:
    """The median time of one run.

    Args:
        model: A serialised model with one input.
        threads: How many threads one operator may use.
        budget: Seconds to spend, at least 15 runs in any case.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (described,) = session.get_inputs()
    kind = np.uint8 if "uint8" in described.type else np.float32
    values = {described.name: np.ones(described.shape, kind)}
    return statistics.median(_runs(session, values, budget))


def _runs(session: Any, values: dict[str, Any], budget: float) -> Iterator[float]:
    for _ in range(WARM_UP):
        session.run(None, values)
    end, count = time.perf_counter() + budget, 0
    while count < MIN_RUNS or time.perf_counter() < end:
        start = time.perf_counter()
        session.run(None, values)
        yield time.perf_counter() - start
        count += 1


def version() -> str:
    """The runtime that is measured, with its version."""
    return f"onnxruntime {ort.__version__}"
