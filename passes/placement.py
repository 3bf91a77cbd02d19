"""Where the values of ranges and gates belong in a tensor as it lies in memory."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from cgmq_fx.passes.processes import process_count


class Places(NamedTuple):
    """How the values of a parameter repeat along a tensor in memory.

    Attributes:
        inner: Neighbours that share a value.
        values: Number of values.
    """

    inner: int
    values: int


@lru_cache(maxsize=4096)
def places(
    shape: tuple[int, ...], strides: tuple[int, ...], parameter: tuple[int, ...]
) -> Places | None:
    """Where the values of a contiguous parameter belong in a tensor that it broadcasts against.

    Args:
        shape: Shape of the tensor.
        strides: Its strides.
        parameter: Shape of the parameter.

    Returns:
        None if the tensor is not dense, or if the parameter's order in memory is another one.
    """
    order = sorted((d for d in range(len(shape)) if shape[d] > 1), key=lambda d: -strides[d])
    inside = {}
    size = 1
    for d in reversed(order):
        if strides[d] != size:
            return None
        inside[d] = size
        size *= shape[d]
    offset = len(shape) - len(parameter)
    own = [d + offset for d, n in enumerate(parameter) if n > 1]
    if offset < 0 or any(parameter[d - offset] != shape[d] for d in own):
        return None
    if not own:
        return Places(size, 1)
    first = order.index(own[0])
    if order[first : first + len(own)] != own:
        return None
    count = 1
    for d in own:
        count *= shape[d]
    return Places(inside[own[-1]], count)


def nested(a: Places, b: Places) -> bool:
    """Whether all repeats after the longer period, and the shorter runs fill the longer ones."""
    if a.values == 1 or b.values == 1:
        return True
    spans = sorted(p.inner * p.values for p in (a, b))
    inners = sorted(p.inner for p in (a, b))
    return spans[1] % spans[0] == 0 and inners[1] % inners[0] == 0


def per_range(x: Tensor, limit: Tensor, batched: bool) -> float:
    """Elements per range, at least 1; where `x` is a part of a batch, those of the whole batch."""
    parts = process_count() if batched else 1
    return max(x.numel(), 1) * parts / max(limit.numel(), 1)


def like(x: Tensor, dense: Tensor) -> Tensor:
    """`x` itself, or a copy of it that lies in memory as `dense` does."""
    return x if x.stride() == dense.stride() else torch.empty_like(dense).copy_(x)
