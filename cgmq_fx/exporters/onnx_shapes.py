"""The shapes of all values of an ONNX file, node by node.

Shapes that are computed in the file, from other shapes and from constants, are computed here too:
by a few lines of numpy on small tensors of numbers, which nothing that an input holds gets into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cgmq_fx.cost_models.errors import ArtifactError

Array: TypeAlias = npt.NDArray[Any]
Shape: TypeAlias = tuple[int, ...]

_MOST_ELEMENTS = 1 << 14
"""What has more elements is no shape, and is not computed."""

_LIKE_THEIR_INPUT = frozenset({"GroupNormalization"})
"""Ops whose output has the shape of their first input, which onnx's inference does not tell."""


def sized(model: Any, batch: int) -> tuple[Any, dict[str, Shape]]:
    """The model with sizes for inputs, which every other shape is worked out anew from.

    Returns:
        The model, and the shapes that its values have for twice the batch; of none where the file
        insists on a size.

    Raises:
        ArtifactError: If it holds functions, ops of other domains or of graphs, tensors in another
            file, or fewer samples than `batch`.
    """
    import onnx

    if model.functions or any(o.domain not in ("", "ai.onnx") for o in model.opset_import):
        raise ArtifactError("the file holds functions or ops of other domains")
    if any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer):
        raise ArtifactError("the file keeps tensors in another file")
    for node in model.graph.node:
        if any(a.g.node or a.graphs for a in node.attribute):
            raise ArtifactError(f"{node.name} ({node.op_type}) holds a graph of its own")
    del model.graph.value_info[:]
    sizes = [size for put in model.graph.input for size in put.type.tensor_type.shape.dim]
    free = [size for size in sizes if size.dim_param]  # the batch is the only size that is free
    doubled = _with(model, free, 2 * batch) if free and batch > 1 else {}
    _resize(free, batch)
    for put in model.graph.input:
        if any(0 < size.dim_value < batch for size in put.type.tensor_type.shape.dim[:1]):
            raise ArtifactError(
                f"the manifest states a batch of {batch}, the file has a smaller one"
            )
    return model, doubled


def _with(model: Any, free: Sequence[Any], batch: int) -> dict[str, Shape]:
    """The shapes of all values for a batch; none where the file does not take it."""
    _resize(free, batch)
    try:
        shapes = _Shapes(model)
        for node in model.graph.node:
            shapes.infer(node)
            _check_reshaped(node, shapes)
    except Exception:  # noqa: BLE001 - whatever it is, the file does not take this batch
        return {}
    found = {name: shapes.shape(name) for name in shapes.types}
    return {name: shape for name, shape in found.items() if shape is not None}


def _check_reshaped(node: Any, shapes: _Shapes) -> None:
    """Insist that a tensor has the elements that its new shape holds, which inference does not."""
    if node.op_type == "Reshape":
        given, made = shapes.shape(node.input[0]), shapes.shape(node.output[0])
        if given is not None and made is not None and prod(given) != prod(made):
            raise ArtifactError(f"{node.name}: {list(given)} cannot be reshaped to {list(made)}")


def _resize(free: Sequence[Any], batch: int) -> None:
    for size in free:
        size.dim_value = batch


def value_types(model: Any) -> dict[str, Any]:
    """The type, with its shape, of every value that has one, by its name.

    Args:
        model: An ONNX model without functions, the sizes of whose inputs are numbers.

    Raises:
        ArtifactError: If an op is unknown to onnx, or does not fit its inputs.
    """
    shapes = _Shapes(model)
    for node in model.graph.node:
        shapes.infer(node)
    return shapes.types


class _Shapes:
    """Types, and the values of what is known without running anything."""

    def __init__(self, model: Any) -> None:
        from onnx import helper, numpy_helper

        self._opsets = list(model.opset_import)
        self._version = max((o.version for o in self._opsets), default=0)
        self._ir = model.ir_version
        self.types = {put.name: put.type for put in model.graph.input}
        self._known: dict[str, Array] = {}
        for tensor in model.graph.initializer:
            self.types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
            if np.prod(tensor.dims, dtype=np.int64) <= _MOST_ELEMENTS:
                self._known[tensor.name] = numpy_helper.to_array(tensor)

    def infer(self, node: Any) -> None:
        """Add what is known about the outputs of a node."""
        given = [self._known.get(name) if name else None for name in node.input]
        found = self._inferred(node)
        if node.op_type in _LIKE_THEIR_INPUT:
            found[node.output[0]] = self.types[node.input[0]]
        self.types.update(found)
        value = self._value(node, given)
        if value is not None and value.size <= _MOST_ELEMENTS:
            self._known[node.output[0]] = value

    def _inferred(self, node: Any) -> dict[str, Any]:
        from onnx import defs, numpy_helper, shape_inference

        names = [name for name in node.input if name]
        missing = [name for name in names if name not in self.types]
        if missing:
            raise ArtifactError(f"{missing[0]} is not in the file, or its type cannot be told")
        data = {n: numpy_helper.from_array(self._known[n], n) for n in names if n in self._known}
        try:
            schema = defs.get_schema(node.op_type, self._version, node.domain)
            return dict(
                shape_inference.infer_node_outputs(
                    schema,
                    node,
                    {name: self.types[name] for name in names},
                    data,
                    opset_imports=self._opsets,
                    ir_version=self._ir,
                )
            )
        except (defs.SchemaError, shape_inference.InferenceError) as error:
            raise ArtifactError(f"{node.name} ({node.op_type}) is damaged: {error}") from error

    def _value(self, node: Any, given: Sequence[Array | None]) -> Array | None:
        """The value of a node's first output, if its inputs are known or only its shape counts."""
        from onnx import helper

        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type in ("Shape", "Size"):
            shape = self.shape(node.input[0])
            whole = slice(options.get("start", 0), options.get("end"))
            if shape is None:
                return None
            sizes = np.array(shape, np.int64)
            return sizes[whole] if node.op_type == "Shape" else sizes.prod()
        compute = _VALUES.get(node.op_type)
        made = self.shape(node.output[0])
        known = all(v is not None for v, name in zip(given, node.input, strict=True) if name)
        if compute is None or made is None or not known:
            return None
        if np.prod(made, dtype=np.float64) > _MOST_ELEMENTS:
            return None
        with np.errstate(all="ignore"):
            return np.asarray(compute(options, *given))

    def shape(self, name: str) -> Shape | None:
        """The shape of a value, None if it cannot be told."""
        kind = self.types.get(name)
        if kind is None or not kind.tensor_type.HasField("shape"):
            return None
        sizes = kind.tensor_type.shape.dim
        if not all(size.HasField("dim_value") for size in sizes):
            return None
        return tuple(int(size.dim_value) for size in sizes)


def _constant(options: dict[str, Any]) -> Array:
    from onnx import numpy_helper

    if "value" in options:
        values: Array = numpy_helper.to_array(options["value"])
        return values
    (value,) = options.values()
    return np.asarray(value, np.float32 if isinstance(np.ravel(value)[0], float) else np.int64)


def _cast(options: dict[str, Any], x: Array) -> Array:
    from onnx import helper

    return x.astype(helper.tensor_dtype_to_np_dtype(options["to"]))


def _slice(
    _: dict[str, Any],
    x: Array,
    starts: Array,
    ends: Array,
    axes: Array | None = None,
    steps: Array | None = None,
) -> Array:
    along = range(len(starts)) if axes is None else axes
    strides = np.ones_like(starts) if steps is None else steps
    parts = [slice(None)] * x.ndim
    for axis, start, end, step in zip(along, starts, ends, strides, strict=True):
        low = -x.shape[axis] - 1
        parts[axis] = slice(int(start), None if step < 0 and end <= low else int(end), int(step))
    return x[tuple(parts)]


def _reshape(_: dict[str, Any], x: Array, shape: Array) -> Array:
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape.tolist())])


def _unsqueeze(_: dict[str, Any], x: Array, axes: Array) -> Array:
    return np.expand_dims(x, tuple(axes.ravel().tolist()))


def _squeeze(_: dict[str, Any], x: Array, axes: Array | None = None) -> Array:
    return x.squeeze(None if axes is None else tuple(axes.ravel().tolist()))


def _div(_: dict[str, Any], x: Array, y: Array) -> Array:
    if x.dtype.kind == "f":
        return np.divide(x, y)
    return np.trunc(np.divide(x, y)).astype(x.dtype)


def _range(_: dict[str, Any], start: Array, limit: Array, delta: Array) -> Array:
    count = max(ceil((limit - start) / delta), 0)
    made: Array = start + delta * np.arange(count, dtype=start.dtype)
    return made


def _full(options: dict[str, Any], shape: Array) -> Array:
    from onnx import numpy_helper

    value = numpy_helper.to_array(options["value"]) if "value" in options else np.zeros(1, "f4")
    return np.full(shape.tolist(), value.ravel()[0], value.dtype)


def _of(function: Callable[..., Any]) -> Callable[..., Array]:
    return lambda _, *given: function(*given)


_VALUES: dict[str, Callable[..., Array]] = {
    "Constant": _constant,
    "Cast": _cast,
    "Slice": _slice,
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Div": _div,
    "Range": _range,
    "ConstantOfShape": _full,
    "Identity": _of(np.array),
    "Gather": lambda options, x, places: x.take(places.astype(np.int64), options.get("axis", 0)),
    "Concat": lambda options, *parts: np.concatenate(parts, options["axis"]),
    "Expand": _of(lambda x, shape: x * np.ones(shape.tolist(), x.dtype)),
    "Add": _of(np.add),
    "Sub": _of(np.subtract),
    "Mul": _of(np.multiply),
    "Max": _of(np.maximum),
    "Min": _of(np.minimum),
    "Neg": _of(np.negative),
    "Abs": _of(np.abs),
    "Floor": _of(np.floor),
    "Ceil": _of(np.ceil),
    "Equal": _of(np.equal),
    "Less": _of(np.less),
    "Greater": _of(np.greater),
    "Where": _of(np.where),
}
"""What computes shapes: the value of an op from its attributes and the values of its inputs."""
