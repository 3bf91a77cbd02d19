"""What an ONNX file costs, read from the file alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from cgmq_fx.cost_models.errors import ArtifactError
from cgmq_fx.exporters.code_bits import Array, Shape
from cgmq_fx.exporters.cost_graph import CostGraph, Counted, Manifest
from cgmq_fx.exporters.onnx_moves import moved
from cgmq_fx.exporters.onnx_ops import COMPUTE, OPS, PLACES, POOLS, SIZED, UNKNOWN
from cgmq_fx.exporters.onnx_parts import Whole, wholes
from cgmq_fx.exporters.onnx_shapes import sized, value_types
from cgmq_fx.exporters.onnx_values import along, attributes, dtype_of, single_zero
from cgmq_fx.exporters.qonnx_reader import as_integers, is_qonnx

MANIFEST = "cgmq_fx"
_MOST_BYTES = 1 << 31
_MATRIX = 2
_LIMITS: dict[str, tuple[int, ...]] = {"Max": (0,), "Min": (1,), "Clip": (0, 1)}
"""Which ends of the values an op limits: lower, upper."""


def read_onnx(path: Path) -> Counted:
    """Read a file; nothing in it is executed, and no other file is opened.

    Raises:
        ArtifactError: If it is not a file that this library exported, is damaged, or holds
            something that cannot be counted.
    """
    import onnx

    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ArtifactError(f"{path} is too large for an ONNX file")
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"{path} is not an ONNX file, or is damaged: {error}") from error
    try:
        manifest = _manifest(model, path)
        if is_qonnx(model):
            model = as_integers(model)
        reader = _Reader(*sized(model, manifest.batch), manifest)
        outputs = reader.read()
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return Counted(reader.graph, tuple(outputs), manifest)


def _manifest(model: Any, path: Path) -> Manifest:
    texts = [p.value for p in model.metadata_props if p.key == MANIFEST]
    if len(texts) != 1:
        raise ArtifactError(f"{path} is an ONNX file, but not one that cgmq_fx exported")
    return Manifest.from_text(texts[0], str(path))


class _Reader:
    """Walks through the nodes of one model."""

    def __init__(self, model: Any, doubled: Mapping[str, Shape], manifest: Manifest) -> None:
        self.graph = CostGraph()
        self._doubled = doubled
        self._manifest = manifest
        self._model = model
        self._constants = {t.name: t for t in model.graph.initializer}
        self._nodes: dict[str, Node] = {}
        self._wholes: dict[str, Whole] = {}
        self._makers = {out: node for node in model.graph.node for out in node.output}
        self._readers = Counter(name for node in model.graph.node for name in node.input)
        self._readers.update(out.name for out in model.graph.output)
        self._types = {name: kind.tensor_type for name, kind in value_types(model).items()}
        self._varying = {put.name for put in model.graph.input}
        for node in model.graph.node:
            if not self._varying.isdisjoint(node.input):
                self._varying.update(node.output)
            if node.op_type == "Constant":
                self._constants[node.output[0]] = node.attribute[0].t

    def read(self) -> list[Node]:
        """Build the graph."""
        for put in self._model.graph.input:
            self._nodes[put.name] = self.graph.input(*self._described(put.name))
        needed = self._needed()
        nodes = [n for n in self._model.graph.node if not needed.isdisjoint(n.output)]
        returned = [out.name for out in self._model.graph.output]
        for whole in wholes(
            nodes, returned, frozenset(self._varying), self._data_inputs, self._elements
        ):
            self._wholes |= dict.fromkeys(whole.made, whole)
        for node in nodes:
            if node.op_type not in ("QuantizeLinear", "Constant"):
                self._read(node)
        for name in self._doubled.keys() & self._nodes.keys():
            self.graph.doubled(self._nodes[name], self._doubled[name])
        return [self._value(name) for name in returned]

    def _needed(self) -> set[str]:
        """The values that data flows through: not those that only sizes are computed from."""
        stack = [out.name for out in self._model.graph.output]
        needed: set[str] = set()
        while stack:
            name = stack.pop()
            if name not in needed:
                needed.add(name)
                stack += self._data_inputs(self._makers[name]) if name in self._makers else []
        return needed

    def _data_inputs(self, node: Any) -> list[str]:
        _, count = OPS.get(node.op_type, (None, None))
        places = PLACES.get(node.op_type)
        given = enumerate(list(node.input)[:count])
        moving = self._varying
        return [name for index, name in given if name and (index != places or name not in moving)]

    def _read(self, node: Any) -> None:
        name = node.output[0]
        if name in self._wholes:
            self._read_part(node, self._wholes[name])
        elif node.op_type == "DequantizeLinear":
            self._nodes[name] = self._dequantized(node)
        elif self._is_clip_of_codes(node):
            return
        elif node.op_type in COMPUTE:
            read = self._convolution if COMPUTE[node.op_type] else self._product
            self._nodes[name] = read(node)
        else:
            self._nodes[name] = self._other(node)

    def _read_part(self, node: Any, whole: Whole) -> None:
        """The last part of an op makes what the op makes, the others make nothing."""
        if whole.output in node.output:
            given = tuple(self._value(name) for name in whole.inputs)
            made = self.graph.call(whole.target, given, *self._described(whole.output))
            self._nodes[whole.output] = made

    def _elements(self, name: str) -> int:
        return int(np.prod(self._described(name)[0]))

    def _other(self, node: Any) -> Node:
        target, _ = OPS.get(node.op_type, (None, None))
        if target is None:
            self.graph.unknown.append(f"{node.name} ({node.op_type})")
            target = UNKNOWN
        given = [self._value(name) for name in self._data_inputs(node)]
        if self._is_for_runtime(node, given):
            return given[0]
        layer = self._sum_of_product(node, given) or self._layer_without_bias(node, given)
        if layer is not None:
            return layer
        if node.op_type in POOLS:
            dims = len(given[0].meta["val"].shape) - 2
            target = POOLS[node.op_type].get(dims, target)
        if node.op_type == "Gather" and node.input[0] not in self._varying:
            table = given[0].op != "call_function"
            target = torch.ops.aten.embedding.default if table else target
        if node.op_type in SIZED and not self._varying.isdisjoint(list(node.input)[len(given) :]):
            target = torch.ops.aten.expand_as.default  # to a size that depends on the batch
            number = self.graph.call(torch.ops.aten.full.default, ([], 0.0), ())
            given = [*(given or [number]), self._nodes[self._model.graph.input[0].name]]
        if node.op_type == "Concat":
            given = [given]  # type: ignore[list-item]
        first = self._made(node, target, given, node.output[0])
        for extra in filter(self._readers.__getitem__, list(node.output)[1:]):
            self._nodes[extra] = self._made(node, target, given, extra)
        return first

    def _made(self, node: Any, target: Any, given: list[Node], name: str) -> Node:
        made = moved(node, name, target, given, self._constant, self._described)
        return self.graph.call(*made, *self._described(name))

    def _is_for_runtime(self, node: Any, given: list[Node]) -> bool:
        """Whether a node changes nothing: a product without its dimension, a slope of one."""
        if node.op_type == "LeakyRelu":
            return bool(attributes(node).get("alpha") == 1.0)
        return node.op_type == "Squeeze" and _shape(given[0]) == self._described(node.output[0])[0]

    def _convolution(self, node: Any) -> Node:
        shape, dtype = self._described(node.output[0])
        given = tuple(self._value(name) for name in node.input if name)
        target = COMPUTE[node.op_type][len(shape) - 2]
        groups = int(attributes(node).get("group", 1))
        return self.graph.call(target, given, shape, dtype, groups=groups)

    def _product(self, node: Any) -> Node:
        """A product of matrices: MatMul or Gemm."""
        aten, options = torch.ops.aten, attributes(node)
        if options.get("transA", 0):
            raise ArtifactError(f"{node.name} multiplies in an order that is not known")
        first, name, *bias = (name for name in node.input if name)
        name = self._matrix(name)
        turned = self._value(name) if options.get("transB", 0) else self._turned(name)
        second = turned or self._value(name)
        given = [self._value(first), second, *map(self._value, bias)]
        shape, dtype = self._described(node.output[0])
        if len(_shape(second)) == _MATRIX:  # whatever leading dimension it has for the runtime
            shape = shape[len(shape) - len(_shape(given[0])) :]
        if turned is not None:
            return self.graph.call(aten.linear.default, tuple(given), shape, dtype)
        if not bias:
            return self.graph.call(aten.matmul.default, tuple(given), shape, dtype)
        return self.graph.call(aten.addmm.default, (given[2], *given[:2]), shape, dtype)

    def _sum_of_product(self, node: Any, given: list[Node]) -> Node | None:
        """What is read as a Gemm, but is written with a leading dimension for the runtime."""
        if node.op_type != "Add":
            return None
        for name, product, other in zip(node.input, given, reversed(given), strict=True):
            maker = self._makers.get(name)
            if (
                maker is not None
                and maker.op_type == "Squeeze"
                and product.target is torch.ops.aten.matmul.default
                and len(_shape(product)) == _MATRIX
                and all(self._readers[made] == 1 for made in (name, maker.input[0]))
            ):
                parts = (other, *product.args)
                return self.graph.call(torch.ops.aten.addmm.default, parts, _shape(product))
        return None

    def _layer_without_bias(self, node: Any, given: list[Node]) -> Node | None:
        """The linear layer whose bias a node adds, with that bias."""
        if node.op_type != "Add" or len(given) != 2:
            return None
        layer, bias = sorted(given, key=lambda factor: factor.op == "get_attr")
        if (
            layer.target is not torch.ops.aten.linear.default
            or len(layer.args) != 2
            or self._readers[node.input[given.index(layer)]] != 1
            or bias.op != "get_attr"
            or _shape(bias) != _shape(layer)[-1:]
        ):
            return None
        moved = self.graph.call(layer.target, (*layer.args, bias), _shape(layer), torch.float32)
        layer.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)
        return moved

    def _matrix(self, name: str) -> str:
        """A weight without the leading dimension that it has for the runtime."""
        maker = self._makers.get(name)
        if maker is None or maker.op_type != "Unsqueeze" or name in self._varying:
            return name
        inner = maker.input[0]
        whole, matrix = self._described(name)[0], self._described(inner)[0]
        return inner if len(matrix) > 1 and whole == (1, *matrix) else name

    def _turned(self, name: str) -> Node | None:
        """The weight of a linear layer that is written as a product with the transposed weight."""
        maker = self._makers.get(name)
        if maker is None or maker.op_type != "Transpose":
            return None
        if list(attributes(maker)["perm"]) != [1, 0] or maker.input[0] in self._varying:
            return None
        source = self._value(maker.input[0])
        return source if source.op in ("call_module", "get_attr") else None

    def _dequantized(self, node: Any) -> Node:
        codes, scale = node.input[0], node.input[1]
        step = self._constant(scale)
        if step is None:
            raise ArtifactError(f"the step of {node.name} is not in the file")
        axis = int(attributes(node).get("axis", 1))
        if codes not in self._constants:
            return self._activation(codes, step, axis, scale)
        values = self._array(self._constants[codes])
        if values.dtype == np.int32:
            return self.graph.state(values.shape, torch.int32)
        zero = self._constant(node.input[2]) if len(node.input) > 2 else None
        if zero is not None:
            values = values.astype(np.int16) - single_zero(zero, node.name)
        layout = self._manifest.layout(codes)
        return self.graph.weight(values, along(step.shape, values.ndim, axis), layout)

    def _activation(self, codes: str, step: Array, axis: int, scale: str) -> Node:
        """From codes back to what was rounded: QuantizeLinear, perhaps a Clip."""
        maker, limits = self._makers[codes], []
        if self._is_clip_of_codes(maker):
            limits = [self._constant(name) for name in list(maker.input)[1:3]]
            maker = self._makers[maker.input[0]]
        if maker.op_type != "QuantizeLinear":
            raise ArtifactError(f"{maker.name} ({maker.op_type}) makes codes")
        zero = self._constant(maker.input[2]) if len(maker.input) > 2 else None
        own = self._constant(maker.input[1])
        if zero is None or own is None or not np.array_equal(own, step):
            raise ArtifactError(f"{maker.name} rounds to another grid than its codes are read on")
        whole = np.iinfo(zero.dtype)
        low, high = np.array(whole.min), np.array(whole.max)
        if limits:
            low, high = (np.asarray(v) for v in limits)
        source, ends = self._clipped(maker.input[0], step, axis)
        shape = _shape(source)
        places = along(step.shape, len(shape), axis)
        low = np.maximum(low.astype(np.int64) - zero.astype(np.int64).min(), ends[0])
        high = np.minimum(high.astype(np.int64) - zero.astype(np.int64).min(), ends[1])
        if step.size > 1:
            low, high = (
                np.broadcast_to(v.reshape(-1), step.shape).reshape(places) for v in (low, high)
            )
        layout = self._manifest.layout(scale)
        return self.graph.activation(source, low, high, step.reshape(places), layout)

    def _clipped(self, name: str, step: Array, axis: int) -> tuple[Node, tuple[Array, Array]]:
        """What is rounded, and the limits of its codes that come from a clip of its values."""
        ends = [np.array(-(1 << 40)), np.array(1 << 40)]
        for _ in range(2):
            maker = self._makers.get(name)
            places = () if maker is None else _LIMITS.get(maker.op_type, ())
            limits = [self._constant(other) for other in list(maker.input)[1:]] if maker else []
            if (
                maker is None
                or self._is_more_than_limits(name)
                or len(places) != len(limits)
                or any(v is None or v.size != step.size for v in limits)
            ):
                break
            for place, limit in zip(places, limits, strict=True):
                ends[place] = np.rint(limit.reshape(step.shape) / step).astype(np.int64)  # type: ignore[union-attr]
            name = maker.input[0] if places else name
        maker = self._makers.get(name)
        if maker is not None and maker.op_type == "Cast":
            given, made = (self._described(n)[1] for n in (maker.input[0], name))
            if given.is_floating_point and made is torch.float32:
                name = maker.input[0]  # steps are float32, and what is rounded has to be, too
        return self._value(name), (ends[0], ends[1])

    def _is_more_than_limits(self, name: str) -> bool:
        """Whether a value is made by parts of one op that do not only limit values."""
        whole = self._wholes.get(name)
        return whole is not None and any(n.op_type not in _LIMITS for n in whole.nodes)

    def _is_clip_of_codes(self, node: Any) -> bool:
        maker = self._makers.get(node.input[0]) if node.op_type == "Clip" else None
        return maker is not None and maker.op_type == "QuantizeLinear"

    def _value(self, name: str) -> Node:
        """A value that is read as data."""
        if name not in self._nodes:
            if name not in self._constants:
                raise ArtifactError(f"{name} is read before it is made")
            values = self._array(self._constants[name])
            kind = torch.from_numpy(np.zeros(1, values.dtype)).dtype
            node = self.graph.state(values.shape, kind) if values.ndim else None
            self._nodes[name] = node or self.graph.call(torch.ops.aten.full.default, ([], 0.0), ())
        return self._nodes[name]

    def _constant(self, name: str) -> Array | None:
        """A value that can be told without running anything: constants, and products of them."""
        if name in self._constants:
            return self._array(self._constants[name])
        maker = self._makers.get(name)
        if maker is None or maker.op_type not in ("Mul", "Reshape"):
            return None
        first, second = (self._constant(n) for n in maker.input)
        if first is None or second is None:
            return None
        return first * second if maker.op_type == "Mul" else first.reshape(second.tolist())

    def _array(self, tensor: Any) -> Array:
        from onnx import numpy_helper

        values: Array = numpy_helper.to_array(tensor)
        return values if values.dtype.kind in "iufb" else values.astype(np.int8)

    def _described(self, name: str) -> tuple[Shape, torch.dtype]:
        """Shape and dtype of a value."""
        kind: Any = self._types.get(name)
        known = kind is not None and kind.HasField("shape")
        if not known or any(not size.HasField("dim_value") for size in kind.shape.dim):
            raise ArtifactError(f"the shape of {name} cannot be told")
        shape = tuple(int(size.dim_value) for size in kind.shape.dim)
        return shape, dtype_of(kind.elem_type)


def _shape(node: Node) -> Shape:
    return tuple(node.meta["val"].shape)
