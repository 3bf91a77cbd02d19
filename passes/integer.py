"""The integer simulator: what a chip computes from a lowered graph.

Between two roundings everything is whole numbers: products of codes are summed up exactly, biases
are added on the grid of the sum, and the sum is brought to the next grid by a factor, whose form is
the one thing in which chips differ. Whole numbers are carried in float64, exact up to 2^53.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from math import ceil, log2, prod
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.codes import DEQUANTIZE, QUANTIZE, quantize_in_aten
from cgmq_fx.passes.oplists import AVERAGES, GRID_PRESERVING, JOINS, SCATTERS
from cgmq_fx.passes.optable import ComputeOp, Layout, argument, compute_op
from cgmq_fx.passes.state import groups_of

_ATEN = torch.ops.aten
_MULTIPLIER_BITS = 31
_PRODUCT_BITS = 63
_SAME_GRID = 1e-5
"""Relative difference of steps that float32 arithmetic makes of one step."""


class Rounding(Enum):
    """How a sum of products is brought to the next grid.

    FLOAT: times a float32 factor, ties to even (onnxruntime).
    HALF_UP: times a 31-bit multiplier, shifted right; ties go up (CMSIS-NN, most accelerators).
    HALF_AWAY: the same; ties go away from zero (gemmlowp, TensorFlow Lite's reference kernels).
    TRUNCATE: the same; what is shifted out is dropped (plain shifts in an FPGA).
    """

    FLOAT = "float"
    HALF_UP = "half-up"
    HALF_AWAY = "half-away"
    TRUNCATE = "truncate"


@dataclass(frozen=True)
class Part:
    """Whole numbers and the step that they count.

    Attributes:
        codes: Whole numbers in float64.
        step: Float64, broadcastable against the codes.
    """

    codes: Tensor
    step: Tensor


Sum: TypeAlias = tuple[Part, ...]
"""Parts on different grids that belong together, as in the sum of a residual block."""


@dataclass(frozen=True)
class Simulation:
    """What a simulated chip computed.

    Attributes:
        outputs: The outputs, flat.
        float_ops: Nodes that had to be computed in float: a chip needs a float unit for them.
        accumulator_bits: Bits that the largest sum of products needs, with its sign.
    """

    outputs: list[Tensor]
    float_ops: tuple[str, ...]
    accumulator_bits: int


def simulate_graph(
    module: GraphModule, inputs: ExampleInputs, rounding: Rounding = Rounding.FLOAT
) -> Simulation:
    """Run a lowered graph in integers.

    Args:
        module: What `lower` gave.
        inputs: What to run it with.
        rounding: How sums are brought to the next grid.
    """
    simulator = _Simulator(module, rounding)
    leaves = pytree.tree_leaves((inputs.args, dict(inputs.kwargs)))
    with torch.no_grad():
        found = simulator.run(*leaves, enable_io_processing=False)
    outputs = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]
    bits = 1 + ceil(log2(simulator.largest + 1))
    return Simulation(outputs, tuple(dict.fromkeys(simulator.float_ops)), bits)


def requantize(parts: Sum, step: Tensor, rounding: Rounding) -> Tensor:
    """Whole numbers of steps that are nearest to a sum, in the sense of `rounding`.

    Args:
        parts: What is rounded.
        step: The step of the new grid, broadcastable against the parts.
        rounding: The arithmetic.

    Returns:
        Whole numbers in float64, not clamped.
    """
    if rounding is Rounding.FLOAT:
        factors = [part.step.float() / step.float() for part in parts]
        scaled = [p.codes.float() * factor for p, factor in zip(parts, factors, strict=True)]
        return torch.round(torch.stack(torch.broadcast_tensors(*scaled)).sum(0)).double()
    ratios = [part.step / step.double() for part in parts]
    largest = max(float(ratio.max()) for ratio in ratios)
    most = max(float(part.codes.abs().max()) if part.codes.numel() else 0.0 for part in parts)
    room = _PRODUCT_BITS - len(parts) - ceil(log2(most + 1))
    shift = min(_MULTIPLIER_BITS, room) - ceil(log2(largest))
    products = [
        part.codes.long() * (ratio * 2.0**shift).round().long()
        for part, ratio in zip(parts, ratios, strict=True)
    ]
    return _shifted(torch.stack(torch.broadcast_tensors(*products)).sum(0), shift, rounding)


def _shifted(total: Tensor, shift: int, rounding: Rounding) -> Tensor:
    if shift <= 0:
        return (total << -shift).double()
    half = 1 << (shift - 1)
    if rounding is Rounding.TRUNCATE:
        return (total >> shift).double()
    if rounding is Rounding.HALF_UP:
        return ((total + half) >> shift).double()
    return (total.sign() * ((total.abs() + half) >> shift)).double()


def _value(value: Any) -> Any:
    """A sum as float32 values; anything else as it is."""
    if not _is_sum(value):
        return value
    rows = torch.broadcast_tensors(*(part.codes * part.step for part in value))
    return torch.stack(rows).sum(0).float()


def _is_sum(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and isinstance(value[0], Part)


def _single(value: Any) -> Part | None:
    """The one part of a sum of one."""
    return value[0] if _is_sum(value) and len(value) == 1 else None


def _along(step: Tensor, rank: int, axis: int) -> Tensor:
    wide = step.double()
    return wide.reshape([-1 if i == axis else 1 for i in range(rank)]) if step.dim() else wide


class _Simulator(Interpreter):
    """Runs a lowered graph; values that are on grids are sums of parts."""

    def __init__(self, module: GraphModule, rounding: Rounding) -> None:
        super().__init__(module)
        self.rounding = rounding
        self.float_ops: list[str] = []
        self.largest = 0.0

    def run_node(self, n: Node) -> Any:
        """One node: in integers where there is a way, else in float."""
        if n.op != "call_function":
            result = super().run_node(n)
            return pytree.tree_map(_value, result, is_leaf=_is_sum) if n.op == "output" else result
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target is QUANTIZE:
            return self._quantize(*args)
        if n.target is DEQUANTIZE:
            codes, step, zero, axis = args
            return (Part(codes.double() - zero, _along(step, codes.dim(), axis)),)
        held = [leaf for leaf in pytree.tree_leaves((args, kwargs), is_leaf=_is_sum)]
        if any(_is_sum(leaf) for leaf in held):
            found = self._integer(n, args, kwargs)
            if found is not None:
                return found
            self.float_ops.append(n.name)
        args, kwargs = pytree.tree_map(_value, (args, kwargs), is_leaf=_is_sum)
        return n.target(*args, **kwargs)  # type: ignore[operator]

    def _quantize(
        self,
        x: Any,
        step: Tensor,
        zero: int,
        low: Sequence[int],
        high: Sequence[int],
        axis: int,
        dtype: torch.dtype,
    ) -> Tensor:
        if not _is_sum(x):
            return quantize_in_aten(x, step, zero, low, high, axis, dtype)
        rank = max(part.codes.dim() for part in x)
        codes = requantize(x, _along(step, rank, axis), self.rounding)
        ends = [_along(torch.tensor(v if len(v) > 1 else v[0]), rank, axis) for v in (low, high)]
        return (codes.maximum(ends[0]).minimum(ends[1]) + zero).to(dtype)

    def _integer(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sum | None:
        """The result in integers, or None if there is no way."""
        op = compute_op(node)
        if op is not None:
            return self._product(node, op, args, kwargs)
        for ops, method in _METHODS:
            if node.target in ops:
                return method(node, args, kwargs)
        return None

    def _product(
        self, node: Node, op: ComputeOp, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Sum | None:
        """Multiply and accumulate; the bias is on the grid of the sum."""
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        given = dict(zip(names, args, strict=False)) | kwargs
        first, second = _single(given[op.activation]), _single(given[op.weight])
        bias = given.pop(op.bias, None) if op.bias else None
        if first is None or second is None or first.step.numel() != 1:
            return None
        step = _output_step(node, op, second)
        if step is None:
            return None
        given |= {op.activation: first.codes, op.weight: second.codes}
        if op.layout is Layout.PRODUCT and op.bias:
            return None
        codes = node.target(**given)  # type: ignore[operator]
        step = step * first.step.reshape(())
        if bias is not None:
            added = _single(bias)
            times = None if added is None else _multiple(added.step, step)
            if added is None or times is None:
                return None
            codes = codes + _spread(added.codes * times, codes.dim(), op)
        self.largest = max(self.largest, float(codes.abs().max()) if codes.numel() else 0.0)
        return (Part(codes, step),)


def _output_step(node: Node, op: ComputeOp, weight: Part) -> Tensor | None:
    """The steps of a weight along the channels of the output."""
    if weight.step.numel() == 1:
        return weight.step.reshape(())
    rank = weight.codes.dim()
    along = [i for i, size in enumerate(weight.step.shape) if size > 1]
    if op.layout is Layout.PRODUCT or along != [op.layout.output_axis % rank]:
        return None
    if op.layout is Layout.CONV_TRANSPOSE and groups_of(node) != 1:
        return None
    flat = weight.step.reshape(-1)
    return flat if op.layout is Layout.LINEAR else flat.reshape(1, -1, *[1] * (rank - 2))


def _multiple(step: Tensor, of: Tensor) -> Tensor | None:
    """How many of the steps of a sum are one step of its bias, powers of two; None if none are."""
    ratio = step.reshape(-1) / of.reshape(-1)
    times = ratio.log2().round().clamp(min=0.0).exp2()
    return times if bool(((ratio - times).abs() <= _SAME_GRID * times).all()) else None


def _spread(bias: Tensor, rank: int, op: ComputeOp) -> Tensor:
    """A bias along the channels of the output."""
    return bias if op.layout is Layout.LINEAR else bias.reshape(1, -1, *[1] * (rank - 2))


def _moved(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sum | None:
    """Ops that move values: steps that differ move with them."""
    part = _single(args[0])
    if part is None:
        return None
    call: Any = node.target
    how, kwargs = pytree.tree_map(_value, (args[1:], kwargs), is_leaf=_is_sum)
    codes = call(part.codes, *how, **kwargs)
    if not isinstance(codes, Tensor):
        return None
    if part.step.numel() == 1:
        return (Part(codes, part.step.reshape(())),)
    steps = call(part.step.expand(part.codes.shape), *how, **kwargs)
    return (Part(codes, steps),)


def _added(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sum | None:
    if not all(_is_sum(value) for value in args[:2]) or argument(node, "alpha", 1) != 1:
        return None
    sign = -1.0 if node.target is _ATEN.sub.Tensor else 1.0
    first, second = _single(args[0]), _single(args[1])
    if first is not None and second is not None and torch.equal(first.step, second.step):
        return (Part(first.codes + sign * second.codes, first.step),)
    return (*args[0], *(Part(sign * part.codes, part.step) for part in args[1]))


def _multiplied(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sum | None:
    """A product with a number, or of two tensors with a step each."""
    numbers = [value for value in args[:2] if isinstance(value, int | float)]
    if numbers and numbers[0] > 0 and _is_sum(args[0]):
        return tuple(Part(part.codes, part.step * numbers[0]) for part in args[0])
    first, second = _single(args[0]), _single(args[1])
    if first is None or second is None or first.step.numel() * second.step.numel() != 1:
        return None
    return (Part(first.codes * second.codes, first.step.reshape(()) * second.step.reshape(())),)


def _averaged(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sum | None:
    """A mean is a sum on a grid that is finer by the number of what is summed up."""
    part = _single(args[0])
    if part is None or part.step.numel() != 1:
        return None
    call: Any = node.target
    mean = call(part.codes, *args[1:], **kwargs)
    ones = call(torch.ones_like(part.codes), *args[1:], **kwargs)
    name = str(node.target._opname)  # type: ignore[union-attr]
    if name.startswith("avg_pool"):
        count = prod(_sizes(args[1], mean.dim() - 2))
    else:
        count = part.codes.numel() // max(mean.numel(), 1)
    total = mean * count
    if not bool((ones == 1).all()) or bool(((total - total.round()).abs() > 1e-6 * count).any()):
        return None  # windows of several sizes
    return (Part(total.round(), part.step.reshape(()) / count),)


def _sizes(value: Any, count: int) -> list[int]:
    rows = list(value) if isinstance(value, list | tuple) else [value]
    return rows * (count // len(rows))


def _joined(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sum | None:
    parts = [_single(value) for value in args[0]]
    if any(part is None for part in parts):
        return None
    own = [part for part in parts if part is not None]
    call: Any = node.target
    codes = call([part.codes for part in own], *args[1:], **kwargs)
    return (Part(codes, call([p.step.expand(p.codes.shape) for p in own], *args[1:], **kwargs)),)


def _scattered(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sum | None:
    """A tensor of which a part is another."""
    whole, part = _single(args[0]), _single(args[1])
    if whole is None or part is None:
        return None
    call: Any = node.target
    codes = call(whole.codes, part.codes, *args[2:], **kwargs)
    steps = (own.step.expand(own.codes.shape) for own in (whole, part))
    return (Part(codes, call(*steps, *args[2:], **kwargs)),)


_Method: TypeAlias = Callable[[Node, tuple[Any, ...], dict[str, Any]], Sum | None]

_METHODS: tuple[tuple[frozenset[Any], _Method], ...] = (
    (frozenset({_ATEN.add.Tensor, _ATEN.sub.Tensor}), _added),
    (frozenset({_ATEN.mul.Tensor, _ATEN.mul.Scalar}), _multiplied),
    (AVERAGES, _averaged),
    (JOINS, _joined),
    (SCATTERS, _scattered),
    (GRID_PRESERVING | {_ATEN.pad.default, _ATEN.constant_pad_nd.default}, _moved),
)
"""What is done in integers, by op; products of matrices besides."""
