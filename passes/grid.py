"""The uniform grids that nest: what a range, a sign and a bit-width mean in numbers.

For a range `beta > 0` and `b` bits (van Baalen et al., Bayesian Bits, NeurIPS 2020):

- signed: codes `-(2^(b-1)-1) .. 2^(b-1)-1`, step `2*beta/(2^b-1)`;
- unsigned: codes `0 .. 2^b-1`, step `beta/(2^b-1)`;
- 0 bits: only the code 0; 32 bits: no grid, values pass through.

Where steps must be powers of two, the step is rounded to the nearest one, and the range follows.

For bit-widths that double, a step is an odd multiple of the next finer one, so the coarse grid is
part of the fine one; powers of two nest for all bit-widths.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

PASS_THROUGH = 32
"""The bit-width at which values pass through unchanged."""

BITS_DTYPE = torch.int8
"""Of the bit-widths of gates: one byte, for a weight may have as many gates as values."""

_HALFWAY = 0.5**0.5
"""The mantissa, from 1/2 to 1, that is as far from the power of two below as from that above."""

MAX_GRID_BITS = 16
"""The finest grid; float32 cannot tell the codes of a much finer one apart."""

DEFAULT_BIT_WIDTHS = (2, 4, 8, 16, 32)


def adjacent_widths(bit_widths: tuple[int, ...]) -> Tensor:
    """By bit-width, the one that a step away from it would lead to.

    Args:
        bit_widths: Those that may be taken, ascending.

    Returns:
        Shape (33,), int32: the next lower bit-width, for the lowest the next higher one; itself for
        the only one, and for those that may not be taken.
    """
    found = torch.arange(PASS_THROUGH + 1, dtype=torch.int32)
    for lower, higher in pairwise(bit_widths):
        found[higher] = lower
    if len(bit_widths) > 1:
        found[bit_widths[0]] = bit_widths[1]
    return found


class Grid(NamedTuple):
    """A grid as tensors that broadcast against the quantized tensor.

    Attributes:
        step: Distance between neighbouring values.
        low: Smallest code.
        high: Largest code.
    """

    step: Tensor
    low: Tensor
    high: Tensor


def allowed_bit_width(bits: int) -> bool:
    """Whether a quantizer can take `bits`: 0 (prune), 2 to 16, or 32 (float)."""
    return bits in (0, PASS_THROUGH) or 2 <= bits <= MAX_GRID_BITS


def grid(limit: Tensor, bits: Tensor, signed: bool) -> Grid:
    """The grid of the range `limit` at `bits`; at 32 bits that of 16, which nobody must use.

    Args:
        limit: Range beta, positive, of a shape that broadcasts against `bits`.
        bits: Bit-widths, integer.
        signed: Whether codes below zero exist.

    Returns:
        Step, lowest and highest code, in the dtype of `limit`.
    """
    codes = (1 << bits.clamp(max=MAX_GRID_BITS).int()) - 1
    intervals = codes.clamp(min=1).to(limit.dtype)
    if signed:
        high = ((codes - 1).clamp(min=0) // 2).to(limit.dtype)
        return Grid(2 * limit / intervals, -high, high)
    high = codes.to(limit.dtype)
    return Grid(limit / intervals, torch.zeros_like(high), high)


def power_of_two_range(limit: Tensor, bits: Tensor, signed: bool) -> Tensor:
    """The range whose step is the power of two that is nearest to the step of `limit`.

    Steps are compared by their ratio. The gradient goes straight through on a logarithmic scale:
    the result grows by as many per cent as `limit` does.

    Args:
        limit: Range, positive, of a shape that broadcasts against `bits`.
        bits: Bit-widths, integer.
        signed: Whether codes below zero exist.

    Returns:
        The range per bit-width, of the shape that both broadcast to. `grid` gives the exact power
        of two for it, in float32 or wider; a range in half precision comes back in float32.
    """
    wide = limit.float() if limit.dtype in (torch.float16, torch.bfloat16) else limit
    with torch.no_grad():
        step, _, high = grid(wide, bits, signed)
        mantissa = torch.frexp(step).mantissa
        power = step / mantissa  # the mantissa is the step but for this factor: exact
        power = torch.where(mantissa < _HALFWAY, power / 2, power)
        snapped = power * (high + 0.5 if signed else high.clamp(min=1))
    return snapped + (wide - wide.detach()) * (snapped / wide.detach())


def round_to_grid(x: Tensor, limit: Tensor, bits: Tensor, signed: bool) -> Tensor:
    """The value on the grid that is nearest to each element of `x` (ties to even codes).

    Args:
        x: Any shape, floating point.
        limit: Range, broadcastable against `x`.
        bits: Bit-widths, broadcastable against `x`.
        signed: Whether codes below zero exist.

    Returns:
        A new tensor like `x`.
    """
    on_cpu = bits.device.type == "cpu"
    if on_cpu and bool((bits >= PASS_THROUGH).all()):
        return x.clone()
    step, low, high = grid(limit, bits, signed)
    y = (x / step).round_().clamp_(low, high).mul_(step)
    if on_cpu and not bool((bits >= PASS_THROUGH).any()):
        return y
    return torch.where(bits >= PASS_THROUGH, x, y, out=y)  # keeps the memory format of `x`


def finest_step(
    log_range: Tensor, bits: Tensor, signed: bool, power_of_two: bool = False
) -> Tensor:
    """The step of the finest grid in use, per range; 0 where something passes through.

    Because grids nest, every value of a tensor with mixed bit-widths lies on this one.

    Args:
        log_range: Natural logarithm of the range, of the range's shape.
        bits: Bit-widths of the gates, of a shape that broadcasts against the range.
        signed: Whether codes below zero exist.
        power_of_two: Whether steps are powers of two.

    Returns:
        A tensor of the shape of `log_range`.
    """
    limit = log_range.exp()
    used = power_of_two_range(limit, bits, signed) if power_of_two else limit
    step = grid(used, bits, signed).step
    step = torch.where(bits >= PASS_THROUGH, torch.zeros_like(step), step)
    while step.dim() > limit.dim():
        step = step.amin(0)
    for axis in range(step.dim()):
        if step.shape[axis] != limit.shape[axis]:
            step = step.amin(axis, keepdim=True)
    return step
