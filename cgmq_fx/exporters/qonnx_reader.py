"""What a QONNX file costs: its `Quant` nodes written as integers, for the reader of ONNX files."""

from __future__ import annotations

from typing import Any

import numpy as np

from cgmq_fx.cost_models.errors import ArtifactError

DOMAIN = "qonnx.custom_op.general"
_OPSET = 21
"""The first one that quantizes to 16 bits."""

_FACTORS = {"MatMul", "Gemm", "Conv", "ConvTranspose"}
"""Ops whose first two inputs are multiplied."""

_READS = {"Gather", "GatherElements", "GatherND"}
"""Ops that pick from their first input."""

_VIEWS = {"Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}

_MOST_BITS = 16
_MOST_BIAS_BITS = 32


def is_qonnx(model: Any) -> bool:
    """Whether an ONNX model has nodes of QONNX."""
    return any(entry.domain == DOMAIN for entry in model.opset_import)


def as_integers(model: Any) -> Any:
    """A copy of a model in which integers stand where `Quant` nodes rounded float numbers.

    Args:
        model: A model of onnx.

    Raises:
        ArtifactError: If a `Quant` node is not one that this library writes.
    """
    copied = type(model)()
    copied.CopyFrom(model)
    graph, nodes = copied.graph, list(copied.graph.node)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in nodes:
        if node.op_type == "Constant":
            constants[node.output[0]] = node.attribute[0].t
    del graph.node[:], copied.opset_import[:]
    copied.opset_import.add(domain="", version=_OPSET)
    clips = {n.output[0]: n for n in nodes if n.op_type == "Clip" and len(n.input) == 3}
    factors = _factors(nodes)
    for node in nodes:
        if node.domain == DOMAIN:
            if node.op_type != "Quant":
                raise ArtifactError(f"{node.name} is a {node.op_type}, which is not counted")
            clip = clips.get(node.input[0])
            ends = [constants.get(name) for name in clip.input[1:]] if clip else []
            quant = _Quant(node, constants, ends, node.output[0] in factors)
            graph.node.extend(quant.nodes(graph))
        else:
            graph.node.append(node)
    return copied


def _factors(nodes: list[Any]) -> set[str]:
    """Names of the values that are multiplied or looked up in, as they are or viewed."""
    found: set[str] = set()
    for node in reversed(nodes):
        if node.op_type in _FACTORS:
            found.update(node.input[:2])
        elif node.op_type in _READS or (node.op_type in _VIEWS and node.output[0] in found):
            found.add(node.input[0])
    return found


class _Quant:
    """One `Quant` node, and the constant ends of a `Clip` in front of it, if there is one.

    Args:
        node: The node.
        constants: The tensors of the file, by name.
        ends: Those of the `Clip`.
        factor: Whether what it gives is multiplied or looked up in.
    """

    def __init__(self, node: Any, constants: dict[str, Any], ends: list[Any], factor: bool) -> None:
        from onnx import numpy_helper

        inputs = [constants.get(name) for name in node.input]
        if len(inputs) != 4 or any(tensor is None for tensor in inputs[1:]):
            raise ArtifactError(f"the grid of {node.name} is not in the file")
        self._node = node
        self._factor = factor
        self._stored = inputs[0]
        scale, zero, bits = (numpy_helper.to_array(tensor) for tensor in inputs[1:])
        flags = {a.name: a.i for a in node.attribute if a.name in ("signed", "narrow")}
        self._signed = flags.get("signed") == 1
        if flags.get("narrow", 0) != self._signed or zero.any() or bits.size != 1:
            raise ArtifactError(f"{node.name} has a grid that this library does not write")
        if not (scale > 0).all() or not np.isfinite(scale).all():
            raise ArtifactError(f"the steps of {node.name} are no positive numbers")
        self._scale = scale.astype(np.float32)
        self._ends = [numpy_helper.to_array(t) for t in ends if t is not None]
        self._bits = int(bits.reshape(-1)[0])
        most = _MOST_BITS if self._stored is None else _MOST_BIAS_BITS
        if not 2 <= self._bits <= most or self._bits != bits.reshape(-1)[0]:
            raise ArtifactError(f"{node.name} rounds to {bits} bits")

    def nodes(self, graph: Any) -> list[Any]:
        """What stands in its place."""
        if self._stored is not None:
            return self._constant(graph, self._stored)
        return self._activation(graph)

    @property
    def _axis(self) -> int:
        return next((i for i, size in enumerate(self._scale.shape) if size > 1), 0)

    def _limits(self) -> tuple[int, int]:
        high = 2 ** (self._bits - self._signed) - 1
        return (-high if self._signed else 0), high

    def _clipped(self) -> tuple[int, int]:
        """The limits, and those of the clip in front: a tensor of 0 bits is clipped to zeros."""
        low, high = self._limits()
        if len(self._ends) < 2 or self._scale.size > 1 or any(e.size != 1 for e in self._ends):
            return low, high
        ends = (float(end.reshape(-1)[0] / self._scale.reshape(-1)[0]) for end in self._ends)
        first, last = (int(np.rint(np.clip(end, low, high))) for end in ends)
        return first, last

    def _constant(self, graph: Any, stored: Any) -> list[Any]:
        """A weight or a table, or a bias: a vector that is neither."""
        from onnx import helper, numpy_helper

        values = numpy_helper.to_array(stored).astype(np.float64)
        low, high = self._limits()
        codes = np.clip(np.rint(values / self._scale), low, high)
        kind = np.int32 if values.ndim < 2 and not self._factor else np.int16
        if np.abs(codes).max(initial=0) > np.iinfo(kind).max:
            raise ArtifactError(f"{self._node.name} holds codes of more than {_MOST_BITS} bits")
        name = f"{stored.name.removesuffix('_values')}_codes"
        graph.initializer.append(numpy_helper.from_array(codes.astype(kind), name))
        step = self._step(graph)
        made = list(self._node.output)
        return [helper.make_node("DequantizeLinear", [name, step], made, axis=self._axis)]

    def _activation(self, graph: Any) -> list[Any]:
        from onnx import helper

        name, step = self._node.output[0], self._step(graph)
        kind = np.int16 if self._signed else np.uint16
        shape = [self._scale.size] if self._scale.size > 1 else []
        zero = self._number(graph, "zero", np.zeros(shape, kind))
        low, high = self._clipped()
        ends = [
            self._number(graph, end, np.asarray(v, kind))
            for end, v in zip("lh", (low, high), strict=True)
        ]
        codes, kept = f"{name}_codes", f"{name}_kept"
        return [
            helper.make_node(
                "QuantizeLinear", [self._node.input[0], step, zero], [codes], axis=self._axis
            ),
            helper.make_node("Clip", [codes, *ends], [kept]),
            helper.make_node("DequantizeLinear", [kept, step, zero], [name], axis=self._axis),
        ]

    def _step(self, graph: Any) -> str:
        scale = self._scale
        return self._number(
            graph, "step", scale.reshape(-1) if scale.size > 1 else scale.reshape(())
        )

    def _number(self, graph: Any, what: str, values: Any) -> str:
        from onnx import numpy_helper

        name = f"{self._node.output[0]}_{what}"
        graph.initializer.append(numpy_helper.from_array(values, name))
        return name
