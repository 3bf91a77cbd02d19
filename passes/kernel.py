"""The fake-quantize kernel: one op forward, one op backward, for every granularity.

Bit-widths and ranges are tensors, so a gate that moves recompiles nothing and waits for no device.
The backward op also returns what gates are steered by: the gradient with respect to `probe` is not
a derivative but the statistic of a `Statistic`, so that saliencies come out of the one backward
pass, add up over micro-batches like gradients, and need no second pass over activations.
"""

from __future__ import annotations

import logging
from enum import IntEnum
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cgmq_fx.passes import native
from cgmq_fx.passes.grid import PASS_THROUGH, grid, round_to_grid
from cgmq_fx.passes.placement import per_range

logger = logging.getLogger(__name__)


class Statistic(IntEnum):
    """What the backward pass reports for every gate.

    NONE: nothing.
    CHANGE: one row, the sum over the gate's elements of `(gradient * change)^2`, where `change` is
        what moving to the adjacent bit-width would do to the element: the diagonal of the empirical
        Fisher information along that move.
    MAGNITUDES: three rows, the mean over the gate's elements of `|gradient|`, of `|value|`, and of
        their product, where activations are first averaged over the batch (Van Baelen and
        Karsmakers, arXiv 2409.20138).
    """

    NONE = 0
    CHANGE = 1
    MAGNITUDES = 2

    @property
    def rows(self) -> int:
        """Numbers per gate."""
        return (0, 1, 3)[self]


_LAYOUTS = (torch.Tag.flexible_layout,)
"""Compiled, the ops are given tensors in the order in which the convolutions have them."""

_LIBRARY = torch.library.Library("cgmq_fx", "FRAGMENT")  # its wrappers cost less than custom_op's
_LIBRARY.define(
    "fake_quantize(Tensor x, Tensor limit, Tensor bits, Tensor? adjacent, Tensor? probe, "
    "bool signed, bool batched, int statistic) -> Tensor",
    tags=_LAYOUTS,
)
_LIBRARY.define(
    "fake_quantize_backward(Tensor grad, Tensor x, Tensor limit, Tensor bits, Tensor? adjacent, "
    "bool signed, bool batched, int statistic) -> (Tensor, Tensor, Tensor)",
    tags=_LAYOUTS,
)
fake_quantize: Any = torch.ops.cgmq_fx.fake_quantize.default
fake_quantize_backward: Any = torch.ops.cgmq_fx.fake_quantize_backward.default


@torch.library.impl(_LIBRARY, "fake_quantize", "CompositeExplicitAutograd")
def _forward(
    x: Tensor,
    limit: Tensor,
    bits: Tensor,
    adjacent: Tensor | None,
    probe: Tensor | None,
    signed: bool,
    batched: bool,
    statistic: int,
) -> Tensor:
    """Round `x` to the grid of range `limit` at `bits`.

    Straight-through gradient inside the range, zero outside; the range gets the gradient of LSQ
    (Esser et al., ICLR 2020) scaled by `1/sqrt(elements per range * highest code)`.

    Args:
        x: Any shape, floating point.
        limit: Range, broadcastable against `x`.
        bits: Bit-widths, integer, broadcastable against `x`.
        adjacent: Shape (33,): by bit-width, the one to compare with (`adjacent_widths`); needed for
            `Statistic.CHANGE`.
        probe: Shape (rows of the statistic, *bits.shape); only its gradient matters.
        signed: Whether codes below zero exist.
        batched: Whether dimension 0 of `x` is the batch.
        statistic: A `Statistic`.

    Returns:
        A tensor like `x`; contiguous if `x` has gaps or repeats, so that products read it as it is.
    """
    x = _dense(x)
    fused = _fused(x)
    found: Tensor | None = fused and fused.forward(x, limit, bits, signed)
    return reference(x, limit, bits, signed) if found is None else found


def _foretold(
    x: Tensor,
    limit: Tensor,
    bits: Tensor,
    adjacent: Tensor | None,
    probe: Tensor | None,
    signed: bool,
    batched: bool,
    statistic: int,
) -> Tensor:
    return torch.empty_like(_dense(x))


@torch.library.impl(_LIBRARY, "fake_quantize_backward", "CompositeExplicitAutograd")
def _gradients(
    grad: Tensor,
    x: Tensor,
    limit: Tensor,
    bits: Tensor,
    adjacent: Tensor | None,
    signed: bool,
    batched: bool,
    statistic: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `fake_quantize` with respect to `x`, `limit` and `probe`."""
    kind, x = Statistic(statistic), _dense(x)
    next_bits = adjacent if kind is Statistic.CHANGE else None
    if next_bits is not None and next_bits.shape != (PASS_THROUGH + 1,):
        raise ValueError(f"adjacent is a table of {PASS_THROUGH + 1} bit-widths")
    fused = _fused(x)
    found: tuple[Tensor, Tensor, Tensor] | None = fused and fused.backward(
        grad, x, limit, bits, next_bits, signed, batched
    )
    if found is None:
        return reference_backward(grad, x, limit, bits, adjacent, signed, batched, kind)
    if kind is Statistic.MAGNITUDES:
        reported = _magnitudes(_wide(grad), _wide(x), bits, batched)
        return *found[:2], reported.to(limit.dtype).contiguous()
    return found


def _foretold_gradients(
    grad: Tensor,
    x: Tensor,
    limit: Tensor,
    bits: Tensor,
    adjacent: Tensor | None,
    signed: bool,
    batched: bool,
    statistic: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = Statistic(statistic).rows
    reported = limit.new_empty((rows, *bits.shape))
    return torch.empty_like(_dense(x), dtype=grad.dtype), limit.new_empty(limit.shape), reported


def reference(x: Tensor, limit: Tensor, bits: Tensor, signed: bool) -> Tensor:
    """What `fake_quantize` is, in plain operators."""
    y = _wide(x)
    return round_to_grid(y, limit.to(y.dtype), bits, signed).to(x.dtype)


def reference_backward(
    grad: Tensor,
    x: Tensor,
    limit: Tensor,
    bits: Tensor,
    adjacent: Tensor | None,
    signed: bool,
    batched: bool,
    statistic: Statistic,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `fake_quantize_backward` is, in plain operators."""
    wide, beta = _wide(x), limit.to(_wide(x).dtype)
    g = grad.to(wide.dtype)
    step, low, high = grid(beta, bits, signed)
    passed = bits >= PASS_THROUGH
    rangeless = passed | (bits == 0)
    inside = (wide.abs() <= beta) if signed else (wide >= 0) & (wide <= beta)
    inside = inside | passed
    codes = wide / step
    zero = torch.zeros_like(codes)
    error = codes.round().clamp_(low, high) - torch.where(inside, codes, zero)
    error = torch.where(rangeless, zero, error)
    summed = (g * error * (step / beta)).sum_to_size(limit.shape)
    count = per_range(x, limit, batched) * high.mean().clamp(min=1.0)
    grad_limit = (summed / count.sqrt()).to(limit.dtype).contiguous()
    grad_x = torch.empty_like(x, dtype=grad.dtype)
    torch.where(inside, grad, torch.zeros_like(grad), out=grad_x)
    reported = _statistic(g, wide, beta, bits, adjacent, signed, batched, statistic)
    return grad_x, grad_limit, reported.to(limit.dtype).contiguous()


def _dense(x: Tensor) -> Tensor:
    """`x`, or a contiguous copy if it does not fill its memory: then its strides are not kept."""
    return x if x.is_contiguous() or torch.empty_like(x).stride() == x.stride() else x.contiguous()


def _fused(x: Tensor) -> Any:
    """The module with the fused kernels for the device of `x`, if there is one."""
    return _triton() if x.is_cuda else native


@lru_cache(maxsize=1)
def _triton() -> ModuleType | None:
    try:
        from cgmq_fx.passes import triton_kernel
    except ImportError as error:
        logger.warning(
            "fake quantization on CUDA falls back to plain PyTorch operators, which are slower: %s",
            error,
        )
        return None
    return triton_kernel


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _statistic(
    g: Tensor,
    x: Tensor,
    limit: Tensor,
    bits: Tensor,
    adjacent: Tensor | None,
    signed: bool,
    batched: bool,
    statistic: Statistic,
) -> Tensor:
    if statistic is Statistic.CHANGE and adjacent is not None:
        here = round_to_grid(x, limit, bits, signed)
        change = round_to_grid(x, limit, adjacent[bits.long()], signed).sub_(here).mul_(g)
        return change.square_().sum_to_size(bits.shape).unsqueeze(0)
    if statistic is Statistic.MAGNITUDES:
        return _magnitudes(g, x, bits, batched)
    return x.new_empty((0, *bits.shape))


def _magnitudes(g: Tensor, x: Tensor, bits: Tensor, batched: bool) -> Tensor:
    if batched:
        g, x = g.mean(0, keepdim=True), x.mean(0, keepdim=True)
    g, x = g.abs(), x.abs()
    share = max(bits.numel(), 1) / max(x.numel(), 1)
    return torch.stack([t.sum_to_size(bits.shape) * share for t in (g, x, g * x)])


class _FakeQuantize(torch.autograd.Function):
    """`fake_quantize`, recorded for the backward pass."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, limit, bits, adjacent, probe, signed, batched, statistic = inputs
        ctx.save_for_backward(x, limit, bits, adjacent)
        ctx.options = (signed, batched, statistic if probe is not None else 0)
        return _unrecorded(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_limit, reported = fake_quantize_backward(
            grad, *ctx.saved_tensors, *ctx.options
        )
        probed = reported if ctx.options[-1] else None
        return grad_x, grad_limit, None, None, probed, None, None, None


@torch.library.impl(_LIBRARY, "fake_quantize", "Autograd")
def _recorded(
    x: Tensor,
    limit: Tensor,
    bits: Tensor,
    adjacent: Tensor | None,
    probe: Tensor | None,
    signed: bool,
    batched: bool,
    statistic: int,
) -> Tensor:
    inputs = (x, limit, bits, adjacent, probe, signed, batched, statistic)
    leaves = (x, limit) if probe is None else (x, limit, probe)
    if torch.is_grad_enabled() and any(t.requires_grad for t in leaves):
        found: Tensor = _FakeQuantize.apply(*inputs)  # type: ignore[no-untyped-call]
        return found
    return _unrecorded(*inputs)


def _unrecorded(*inputs: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        found: Tensor = fake_quantize(*inputs)
        return found


torch.library.register_fake("cgmq_fx::fake_quantize", _foretold, lib=_LIBRARY)
torch.library.register_fake("cgmq_fx::fake_quantize_backward", _foretold_gradients, lib=_LIBRARY)
