"""The CUDA kernel in Triton: one launch forward, one launch backward, for every granularity.

Imported only where there is a CUDA tensor and Triton. A tensor is walked as a matrix: its rows are
the runs of neighbours that share everything, or, where runs are short, its columns are one period
after which ranges and gates repeat. Each program sums its tile; the sums are added up in a fixed
order, so that results repeat exactly.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: ANN001, ANN202, N803

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cgmq_fx.passes.grid import grid
from cgmq_fx.passes.placement import Places, like, nested, per_range, places

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SHORT_RUN = 128
_TILE = 1024
_MOST = 2**31 - 1 - _TILE


class Walk(NamedTuple):
    """A tensor as a matrix.

    Attributes:
        rows: Its rows.
        columns: Its columns.
        ranges: Where ranges belong.
        gates: Where gates belong.
        own: Whether every element has a gate.
        repeated: Whether parameters depend on the column, not on the row.
    """

    rows: int
    columns: int
    ranges: Places
    gates: Places
    own: bool
    repeated: bool

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns that one program takes."""
        if not self.repeated:
            return 1, min(_TILE, triton.next_power_of_2(self.columns))
        wide = min(64, triton.next_power_of_2(self.columns))
        return 4 * _TILE // wide, wide

    @property
    def programs(self) -> tuple[int, int]:
        """Programs along rows and columns."""
        high, wide = self.tile
        return triton.cdiv(self.rows, high), triton.cdiv(self.columns, wide)


@lru_cache(maxsize=4096)
def walk_of(
    shape: tuple[int, ...], strides: tuple[int, ...], limit: tuple[int, ...], bits: tuple[int, ...]
) -> Walk | None:
    """How to walk a tensor, or None if the reference has to do it."""
    size = prod(shape)
    ranges, gates = places(shape, strides, limit), places(shape, strides, bits)
    if ranges is None or gates is None or not nested(ranges, gates) or not 0 < size <= _MOST:
        return None
    own = gates.values == size > 1
    spread = [p for p in (ranges, gates) if p.values > 1 and not (own and p is gates)]
    run = min((p.inner for p in spread), default=size)
    period = max((p.inner * p.values for p in spread), default=size)
    if run >= _SHORT_RUN or period == size or own:
        return Walk(size // run, run, ranges, gates, own, False)
    return Walk(size // period, period, ranges, gates, own, True)


@triton.jit
def _grid(limit, bits, SIGNED: tl.constexpr):
    codes = (1 << tl.minimum(bits, 16)) - 1
    intervals = tl.maximum(codes, 1).to(tl.float32)
    if SIGNED:
        high = (tl.maximum(codes - 1, 0) >> 1).to(tl.float32)
        return tl.div_rn(2 * limit, intervals), -high, high
    high = codes.to(tl.float32)
    return tl.div_rn(limit, intervals), high * 0, high


@triton.jit
def _nearest(code, low, high):
    code = tl.where(code < low, low, code)
    code = tl.where(code > high, high, code)
    return (code + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds ties to even


@triton.jit
def _place(rows, columns, TALL: tl.constexpr, WIDE: tl.constexpr):
    across = tl.cdiv(columns, WIDE)
    row = (tl.program_id(0) // across) * TALL + tl.arange(0, TALL)[:, None]
    column = (tl.program_id(0) % across) * WIDE + tl.arange(0, WIDE)[None, :]
    return row * columns + column, (row < rows) & (column < columns)


@triton.jit
def _forward(
    x_ptr,
    y_ptr,
    limit_ptr,
    bits_ptr,
    rows,
    columns,
    range_inner,
    ranges,
    gate_inner,
    gates,
    SIGNED: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    at, inside = _place(rows, columns, TALL, WIDE)
    x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    limit = tl.load(limit_ptr + (at // range_inner) % ranges, inside, 1.0)
    bits = tl.load(bits_ptr + (at // gate_inner) % gates, inside, 0).to(tl.int32)
    step, low, high = _grid(limit, bits, SIGNED)
    y = tl.where(bits >= 32, x, _nearest(tl.div_rn(x, step), low, high) * step)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _backward(
    g_ptr,
    x_ptr,
    out_ptr,
    limit_ptr,
    bits_ptr,
    adjacent_ptr,
    range_ptr,
    change_ptr,
    rows,
    columns,
    range_inner,
    ranges,
    gate_inner,
    gates,
    SIGNED: tl.constexpr,
    CHANGE: tl.constexpr,
    OWN: tl.constexpr,
    REPEATED: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    at, inside = _place(rows, columns, TALL, WIDE)
    g = tl.load(g_ptr + at, inside, 0.0).to(tl.float32)
    x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    limit = tl.load(limit_ptr + (at // range_inner) % ranges, inside, 1.0)
    bits = tl.load(bits_ptr + (at // gate_inner) % gates, inside, 0).to(tl.int32)
    step, low, high = _grid(limit, bits, SIGNED)
    code = tl.div_rn(x, step)
    near = _nearest(code, low, high)
    end = -limit if SIGNED else limit * 0
    within = ((x >= end) & (x <= limit)) | (bits >= 32)
    tl.store(out_ptr + at, tl.where(within, g, 0.0).to(out_ptr.dtype.element_ty), inside)
    on_grid = inside & (bits > 0) & (bits < 32)
    error = tl.where(
        on_grid, g * (near - tl.where(within, code, 0.0)) * tl.div_rn(step, limit), 0.0
    )
    if REPEATED:
        across = tl.cdiv(columns, WIDE)
        column = (tl.program_id(0) % across) * WIDE + tl.arange(0, WIDE)
        sums_at = (tl.program_id(0) // across) * columns + column
        tl.store(range_ptr + sums_at, tl.sum(error, 0), column < columns)
    else:
        tl.store(range_ptr + tl.program_id(0), tl.sum(tl.sum(error, 1), 0))
    if CHANGE:
        next_bits = tl.load(adjacent_ptr + bits, inside, 0)
        next_step, next_low, next_high = _grid(limit, next_bits, SIGNED)
        next_near = _nearest(tl.div_rn(x, next_step), next_low, next_high) * next_step
        here = tl.where(bits >= 32, x, near * step)
        moved = (tl.where(next_bits >= 32, x, next_near) - here) * g
        change = tl.where(inside, moved * moved, 0.0)
        if OWN:
            tl.store(change_ptr + at, change, inside)
        elif REPEATED:
            tl.store(change_ptr + sums_at, tl.sum(change, 0), column < columns)
        else:
            tl.store(change_ptr + tl.program_id(0), tl.sum(tl.sum(change, 1), 0))


def forward(x: Tensor, limit: Tensor, bits: Tensor, signed: bool) -> Tensor | None:
    """`fake_quantize` of `kernel.py`, or None where the reference has to do it."""
    y = torch.empty_like(x)
    walk = _walk(y, limit, bits)
    if walk is None:
        return None
    down, across = walk.programs
    _forward[(down * across,)](
        like(x, y),
        y,
        limit.detach().float().contiguous(),
        bits.contiguous(),
        *(walk.rows, walk.columns, *walk.ranges, *walk.gates),
        signed,
        *walk.tile,
    )
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    limit: Tensor,
    bits: Tensor,
    adjacent: Tensor | None,
    signed: bool,
    batched: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`fake_quantize_backward` with the statistic `CHANGE` if `adjacent` is given.

    Returns:
        Gradients of the tensor, the range and the gates, or None where the reference has to do it.
    """
    out = torch.empty_like(x)
    walk = _walk(out, limit, bits)
    if walk is None or grad.dtype != x.dtype:
        return None
    grad, x = like(grad, out), like(x, out)
    down, across = walk.programs
    size = (down, walk.columns) if walk.repeated else (walk.rows, across)
    beta = limit.detach().float().contiguous()
    range_sums = torch.empty(size, dtype=torch.float32, device=x.device)
    changes = torch.empty(x.numel() if walk.own else size, dtype=torch.float32, device=x.device)
    widths = bits.contiguous()
    _backward[(down * across,)](
        *(grad, x, out, beta, widths),
        widths if adjacent is None else adjacent.contiguous(),
        *(range_sums, changes),
        *(walk.rows, walk.columns, *walk.ranges, *walk.gates),
        *(signed, adjacent is not None, walk.own, walk.repeated),
        *walk.tile,
    )
    reported = changes.new_empty((0, *bits.shape))
    if adjacent is not None:
        per_gate = changes if walk.own else _collected(walk, changes, walk.gates)
        reported = per_gate.reshape(1, *bits.shape)
    high = grid(beta.new_ones(()), widths, signed).high.mean().clamp(min=1.0)
    summed = _collected(walk, range_sums, walk.ranges).reshape(limit.shape)
    range_grad = summed / (per_range(x, limit, batched) * high).sqrt()
    return out, range_grad.to(limit.dtype), reported.to(limit.dtype)


def _walk(x: Tensor, limit: Tensor, bits: Tensor) -> Walk | None:
    if x.dtype not in _DTYPES:
        return None
    return walk_of(tuple(x.shape), x.stride(), tuple(limit.shape), tuple(bits.shape))


def _collected(walk: Walk, sums: Tensor, at: Places) -> Tensor:
    """The sums of tiles, added up for every value of a parameter."""
    if at.values == 1:
        return sums.sum()
    if walk.repeated:
        return sums.sum(0).view(-1, at.values, at.inner).sum((0, 2))
    rows = sums.sum(1)
    return rows.view(-1, at.values, at.inner // walk.columns).sum((0, 2))
