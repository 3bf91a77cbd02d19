"""What files of runtimes with 8-bit tensors cost: codes, their limits, and the ops between them.

Such files round a value to the grid of a tensor and may clamp it; both tell how many bits it needs.
So a rounding is written down only when something reads the value. Shapes are worked out from those
of inputs and weights, not from what a file states. Tensors have their channels last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from cgmq_fx.cost_models.errors import ArtifactError
from cgmq_fx.exporters.code_bits import Array, Layout, Shape, activation_bits, weight_bits
from cgmq_fx.exporters.cost_graph import CostGraph, Counted, Manifest
from cgmq_fx.exporters.flat import Buffer, read_bytes
from cgmq_fx.exporters.float_codes import float_codes
from cgmq_fx.passes.oplists import GRID_PRESERVING, JOINS, VIEWS
from cgmq_fx.passes.optable import preserves_grid

_ATEN = torch.ops.aten
_MOST_ELEMENTS = 1 << 40
_FAR = 1 << 40
_TO_FIRST, _TO_LAST = [0, 3, 1, 2], [0, 2, 3, 1]
ShapeRule: TypeAlias = Callable[..., Tensor]
Pads: TypeAlias = tuple[int, int, int, int]
"""Left, right, top, bottom."""


@dataclass(frozen=True)
class Grid:
    """Whole multiples of a step.

    Attributes:
        step: Distance of neighbouring values.
        low: Lowest code, the zero point subtracted.
        high: Highest code.
    """

    step: float
    low: int = -_FAR
    high: int = _FAR

    def within(self, other: Grid) -> Grid:
        """The codes that both grids, of the same step, have."""
        return Grid(self.step, max(self.low, other.low), min(self.high, other.high))


@dataclass(frozen=True)
class Value:
    """A tensor of the network.

    Attributes:
        node: What gives it, before it is rounded.
        grid: What it is rounded to, or None.
        rounded: Whether `node` is on the grid already.
        floor: A number that no float value is below.
    """

    node: Node
    grid: Grid | None = None
    rounded: bool = False
    floor: float = -math.inf

    @property
    def shape(self) -> Shape:
        """Its shape."""
        return tuple(self.node.meta["val"].shape)


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor that the file keeps.

    Attributes:
        values: Codes or numbers.
        steps: Distances of neighbouring codes: one, or one per channel; None for plain numbers.
        axis: The axis that runs over these channels.
    """

    values: Array
    steps: Array | None = None
    axis: int = 0

    def permuted(self, order: Sequence[int]) -> Constant:
        """The same with its axes in another order."""
        axis = list(order).index(self.axis) if self.values.ndim else 0
        return Constant(self.values.transpose(order), self.steps, axis)


Operand: TypeAlias = Value | Constant


class ByteGraph:
    """Builds a `CostGraph` from values and constants.

    Attributes:
        graph: What is built.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.graph = CostGraph()
        self._layouts = list(dict.fromkeys(manifest.layouts.values())) or [Layout()]
        self._nodes: dict[Value, Node] = {}
        self._kept: dict[Constant, Node] = {}

    def input(self, shape: Shape, dtype: torch.dtype, grid: Grid | None = None) -> Value:
        """An input of the network."""
        return Value(self.graph.input(_checked(shape), dtype), grid)

    def rounded(self, value: Value, grid: Grid) -> Value:
        """A value on a grid: rounded to it, or within its limits where it is on it already."""
        if value.grid is not None and value.grid.step == grid.step:
            narrow = value.grid.within(grid)
            return value if narrow == value.grid else replace(value, grid=narrow, rounded=False)
        lowest = max(grid.low, _nearest(value.floor, grid.step))
        return Value(self.node(value), replace(grid, low=lowest))

    def clamped(self, value: Value, low: float, high: float) -> Value:
        """A value within limits: codes have limits of their own, of floats the lower one counts."""
        if value.grid is None:
            return replace(value, floor=max(low, value.floor))
        step = value.grid.step
        return self.rounded(value, Grid(step, _nearest(low, step), _nearest(high, step)))

    def call(
        self, target: Any, operands: Sequence[Operand], rule: ShapeRule, **options: Any
    ) -> Value:
        """An op; what a grid survives stays on it.

        Args:
            target: The ATen op that costs what it costs.
            operands: What it reads.
            rule: Gives its result on tensors without data.
            options: Arguments that its cost depends on.

        Raises:
            ArtifactError: If the shapes do not fit.
        """
        joined, first = target in JOINS, operands[0]
        kept = isinstance(first, Value) and (target in VIEWS or self._waits(target, first))
        viewed = first if kept and isinstance(first, Value) else None
        nodes = [viewed.node] if viewed else [self.node(operand) for operand in operands]
        made = _result(target, rule, [node.meta["val"] for node in nodes])
        args = (nodes,) if joined else tuple(nodes)
        node = self.graph.call(target, args, tuple(made.shape), made.dtype, **options)
        if viewed is not None:
            return replace(viewed, node=node)  # a clamp may still come
        if preserves_grid(node) and isinstance(first, Value):
            return Value(node, first.grid, first.grid is not None, first.floor)
        grids = [o.grid if isinstance(o, Value) else None for o in operands]
        if joined and len({g.step if g else None for g in grids}) == 1 and grids[0] is not None:
            known = [g for g in grids if g is not None]
            ends = min(g.low for g in known), max(g.high for g in known)
            return Value(node, Grid(grids[0].step, *ends))
        return Value(node)

    def _waits(self, target: Any, value: Value) -> bool:
        """Whether an op that keeps grids stands between a rounding and its clamp."""
        if target not in GRID_PRESERVING or value.grid is None or value.rounded:
            return False
        ends = np.array(value.grid.low), np.array(value.grid.high)
        return all(
            _mean_bits(activation_bits, *ends, layout) == math.inf for layout in self._layouts
        )

    def convolution(
        self,
        operands: Sequence[Operand],
        strides: tuple[int, int],
        dilations: tuple[int, int],
        pads: Pads,
        groups: int,
    ) -> Value:
        """A convolution of two dimensions.

        Args:
            operands: The images; the weight, as (outputs, inputs / groups, height, width); perhaps
                a bias.
            strides: Vertical and horizontal.
            dilations: The same.
            pads: Zeros around the images.
            groups: Parts that the channels are divided into.
        """

        def rule(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
            wide = torch.nn.functional.pad(x, pads)
            floats = wide.float(), weight.float()
            return torch.conv2d(*floats, None, strides, (0, 0), dilations, groups)

        images = self.permuted(operands[0], _TO_FIRST)
        rest = [operands[1], *operands[2:]]
        made = self.multiplied(_ATEN.conv2d.default, [images, *rest], rule, groups=groups)
        return self.permuted(made, _TO_LAST)

    def transposed_convolution(
        self,
        operands: Sequence[Operand],
        strides: tuple[int, int],
        dilations: tuple[int, int],
        size: tuple[int, int] | None,
        pads: Pads,
    ) -> Value:
        """A transposed convolution of two dimensions, in one group.

        Args:
            operands: The images; the weight, as (inputs, outputs, height, width); perhaps a bias.
            strides: Vertical and horizontal.
            dilations: The same.
            size: Height and width of the result, where they are given; else `pads` say them.
            pads: What is cut off, less what is added behind.
        """

        def rule(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
            floats = x.float(), weight.float()
            whole = torch.conv_transpose2d(*floats, None, strides, (0, 0), (0, 0), 1, dilations)
            if size is None:
                return torch.nn.functional.pad(whole, [-amount for amount in pads])
            for found, wanted, stride in zip(whole.shape[2:], size, strides, strict=True):
                if not found - max(weight.shape[2:]) - stride < wanted < found + stride:
                    raise ValueError(f"a transposed convolution gives {found}, not {wanted}")
            return whole.new_empty((*whole.shape[:2], *size))

        images, weight, *bias = operands
        if isinstance(weight, Constant):
            weight = self.weight(weight, outputs=1)
        operands = [self.permuted(images, _TO_FIRST), weight, *bias]
        made = self.multiplied(_ATEN.conv_transpose2d.input, operands, rule)
        return self.permuted(made, _TO_LAST)

    def multiplied(
        self, target: Any, operands: Sequence[Operand], rule: ShapeRule, **options: Any
    ) -> Value:
        """An op that multiplies and accumulates; its second operand may be a weight."""
        operands = list(operands)
        if isinstance(operands[1], Constant):
            operands[1] = self.weight(operands[1])
        return self.call(target, operands, rule, **options)

    def pooled(
        self,
        target: Any,
        images: Operand,
        sizes: tuple[int, int],
        strides: tuple[int, int],
        dilations: tuple[int, int],
        pads: Pads,
    ) -> Value:
        """A pool of two dimensions."""

        def rule(x: Tensor) -> Tensor:
            wide = torch.nn.functional.pad(x.float(), pads)
            return torch.max_pool2d(wide, sizes, strides, 0, dilations).to(x.dtype)

        made = self.call(target, [self.permuted(images, _TO_FIRST)], rule)
        return self.permuted(made, _TO_LAST)

    def permuted(self, operand: Operand, order: Sequence[int]) -> Value:
        """A value with its axes in another order."""
        made = self.call(_ATEN.permute.default, [operand], lambda x: x.permute(list(order)))
        made.node.args = (made.node.args[0], list(order))
        return made

    def same(self, target: Any, operands: Sequence[Operand]) -> Value:
        """An op whose result has the shape that its operands have when they are broadcast."""
        return self.call(target, operands, _broadcast)

    def weight(self, constant: Constant, outputs: int = 0) -> Operand:
        """A weight: its bits are read from its codes, if it has any.

        Args:
            constant: The weight.
            outputs: Its axis over outputs, which may have steps of their own.
        """
        if constant.steps is None and constant.values.dtype.kind == "f":
            found = float_codes(np.moveaxis(constant.values, outputs, 0))
            if found is not None:
                constant = Constant(np.moveaxis(found[0], 0, outputs), found[1], outputs)
        if constant.steps is None or constant not in self._kept:
            if constant.steps is None:
                return constant
            self._kept[constant] = self._weight(constant)
        return Value(self._kept[constant])

    def node(self, operand: Operand) -> Node:
        """The node that gives an operand as it is read: rounded, if it is on a grid."""
        if isinstance(operand, Constant):
            if operand not in self._kept and not operand.values.ndim:
                self._kept[operand] = self.graph.call(_ATEN.full.default, ([], 0.0), ())
            if operand not in self._kept:
                kind = torch.from_numpy(np.zeros(1, operand.values.dtype)).dtype
                self._kept[operand] = self.graph.state(operand.values.shape, kind)
            return self._kept[operand]
        if operand.grid is None or operand.rounded:
            return operand.node
        if operand not in self._nodes:
            self._nodes[operand] = self._rounding(operand, operand.grid)
        return self._nodes[operand]

    def _rounding(self, value: Value, grid: Grid) -> Node:
        low, high, step = np.array(grid.low), np.array(grid.high), np.array(grid.step)
        plain = [layout for layout in self._layouts if not layout.gates] or [Layout()]
        layout = min(plain, key=lambda own: _mean_bits(activation_bits, low, high, own))
        if _mean_bits(activation_bits, low, high, layout) == math.inf:
            span = grid.high - grid.low  # not limited: all codes of its container
            low, high, layout = np.array(0), np.array(span), Layout((span.bit_length(),))
        return self.graph.activation(value.node, low, high, step, layout)

    def _weight(self, constant: Constant) -> Node:
        values, steps = constant.values, constant.steps
        assert steps is not None
        along = [1] * values.ndim
        along[constant.axis] = steps.size
        ranges = tuple(along) if steps.size > 1 else ()
        layouts = [_fitted(layout, values.shape) for layout in self._layouts]
        layout = min(layouts, key=lambda own: _mean_bits(weight_bits, values, ranges, own))
        return self.graph.weight(values, ranges, layout)


def _fitted(layout: Layout, shape: Shape) -> Layout:
    """A layout for a weight that was written with more or fewer axes of size 1."""
    gates, ones = layout.gates, [1] * len(shape)
    if not gates or len(gates) == len(shape):
        return layout
    if math.prod(gates) == math.prod(shape):
        return replace(layout, gates=shape)
    return replace(layout, gates=(*gates, *ones)[: len(shape)])


def _nearest(number: float, step: float) -> int:
    return round(max(min(number / step, _FAR), -_FAR))


def _mean_bits(count: Callable[..., Array], *arguments: Any) -> float:
    """The mean of the bits that a layout needs; infinite if it does not fit."""
    try:
        return float(count(*arguments).mean())
    except ArtifactError:
        return math.inf


def _broadcast(*operands: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(*(operand.shape for operand in operands))
    return operands[0].expand(shape) if operands[0].shape != shape else operands[0]


def _result(target: Any, rule: ShapeRule, operands: list[Tensor]) -> Tensor:
    try:
        with torch.no_grad():
            found = rule(*operands)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(str(tuple(operand.shape)) for operand in operands)
        raise ArtifactError(f"{target} does not take tensors of shape {shapes}") from error
    _checked(tuple(found.shape))
    return found


def _checked(shape: Shape) -> Shape:
    if min(shape, default=1) < 0 or math.prod(shape) > _MOST_ELEMENTS:
        raise ArtifactError(f"a tensor of shape {shape} is more than a model holds")
    return shape


def read_counted(
    path: Path, read: Callable[[Buffer], tuple[Manifest, ByteGraph, Sequence[Operand]]]
) -> Counted:
    """What a FlatBuffer costs.

    Args:
        path: The file.
        read: What it says about itself, the graph that is built of it, and what that returns.

    Raises:
        ArtifactError: If it cannot be read, whatever goes wrong.
    """
    buffer = Buffer(read_bytes(path))
    try:
        manifest, builder, outputs = read(buffer)
        nodes = tuple(builder.node(output) for output in outputs)
    except ArtifactError as error:
        raise ArtifactError(f"{path} cannot be counted: {error}") from error
    except Exception as error:
        raise ArtifactError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return Counted(builder.graph, nodes, replace(manifest, batch=1))  # whatever it says
