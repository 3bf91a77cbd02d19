"""The two ops of a lowered graph, and what each of them is in plain ATen ops.

A code is a whole number; its value is the code times a step. Codes stand in integer tensors whose
dtype, the container, may hold more codes than the grid has: then the limits tell which are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node


@torch.library.custom_op("cgmq_fx::quantize", mutates_args=())
def quantize(
    x: Tensor,
    step: Tensor,
    zero_point: int,
    low: Sequence[int],
    high: Sequence[int],
    axis: int,
    dtype: torch.dtype,
) -> Tensor:
    """The codes of `x`: divided by the step, rounded (ties to even), clamped, shifted.

    Args:
        x: Any shape, floating point.
        step: Shape () or, for a step per channel, (channels,).
        zero_point: Number that stands for code 0 in the container.
        low: Lowest code, or one per channel.
        high: Highest code, or one per channel.
        axis: The axis of `x` that runs over channels; 0 where there is one step.
        dtype: The container.

    Returns:
        Codes plus zero point, of the shape of `x`.
    """
    return quantize_in_aten(x, step, zero_point, low, high, axis, dtype)


@quantize.register_fake
def _(
    x: Tensor,
    step: Tensor,
    zero_point: int,
    low: Sequence[int],
    high: Sequence[int],
    axis: int,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


@torch.library.custom_op("cgmq_fx::dequantize", mutates_args=())
def dequantize(codes: Tensor, step: Tensor, zero_point: int, axis: int) -> Tensor:
    """The values of codes, in the dtype of `step`.

    Args:
        codes: Codes plus zero point, in any container.
        step: Shape () or (channels,).
        zero_point: Number that stands for code 0.
        axis: The axis of `codes` that runs over channels; 0 where there is one step.
    """
    return dequantize_in_aten(codes, step, zero_point, axis)


@dequantize.register_fake
def _(codes: Tensor, step: Tensor, zero_point: int, axis: int) -> Tensor:
    return torch.empty_like(codes, dtype=step.dtype)


def quantize_in_aten(
    x: Tensor,
    step: Tensor,
    zero_point: int,
    low: Sequence[int],
    high: Sequence[int],
    axis: int,
    dtype: torch.dtype,
) -> Tensor:
    """What `quantize` is in ATen ops."""
    codes = torch.round(x.to(step.dtype) / _along(step, x.dim(), axis))
    if len(low) == len(high) == 1:
        codes = torch.clamp(codes, low[0], high[0])
    else:
        limits = (_vector(numbers, codes) for numbers in (low, high))
        codes = torch.clamp(codes, *(_along(limit, x.dim(), axis) for limit in limits))
    return (codes + zero_point if zero_point else codes).to(dtype)


def dequantize_in_aten(codes: Tensor, step: Tensor, zero_point: int, axis: int) -> Tensor:
    """What `dequantize` is in ATen ops."""
    whole = codes.to(step.dtype)
    return (whole - zero_point if zero_point else whole) * _along(step, codes.dim(), axis)


def _vector(numbers: Sequence[int], like: Tensor) -> Tensor:
    """Numbers as a tensor, by ops without constants: those cannot be decomposed."""
    return torch.cat([like.new_full((len(list(run)),), value) for value, run in groupby(numbers)])


def _along(vector: Tensor, rank: int, axis: int) -> Tensor:
    """A vector along one axis of a tensor of `rank`; a single number as it is."""
    return vector.reshape([-1 if i == axis else 1 for i in range(rank)]) if vector.dim() else vector


QUANTIZE = torch.ops.cgmq_fx.quantize.default
DEQUANTIZE = torch.ops.cgmq_fx.dequantize.default

IN_ATEN: dict[Any, Callable[..., Any]] = {
    QUANTIZE: quantize_in_aten,
    DEQUANTIZE: dequantize_in_aten,
}
"""Decompositions, for `ExportedProgram.run_decompositions` and others that take such a table."""


def container(low: int, high: int, offset: bool = False) -> tuple[torch.dtype, int]:
    """The smallest container of 8, 16 or 32 bits that holds codes, and its zero point.

    Args:
        low: Lowest code.
        high: Highest code.
        offset: Whether codes below zero are stored in an unsigned container. The zero point is the
            smallest even number that does: what is stored stays small, and runtimes that round
            to even after they added it round as if they had not.
    """
    if low >= 0:
        fits = ((torch.uint8, 2**8), (torch.uint16, 2**16))
        return next((dtype for dtype, end in fits if high < end), torch.int32), 0
    half = next((bits for bits in (7, 15) if -(2**bits) <= low and high < 2**bits), 31)
    if offset and half < 31:
        return (torch.uint8 if half == 7 else torch.uint16), -low + low % 2
    return {7: torch.int8, 15: torch.int16, 31: torch.int32}[half], 0


def is_quantize(node: Node) -> bool:
    """Whether a node makes codes of values."""
    return node.op == "call_function" and node.target is QUANTIZE


def is_dequantize(node: Node) -> bool:
    """Whether a node makes values of codes."""
    return node.op == "call_function" and node.target is DEQUANTIZE
