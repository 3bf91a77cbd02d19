"""Pairing: the gates of two factors, laid out so that those that meet stand beside each other."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from cgmq_fx.passes.following import MOST
from cgmq_fx.passes.optable import Layout


@dataclass(frozen=True, slots=True)
class Met:
    """How the gates of one factor stand where they meet those of the other, see `Operand`."""

    shape: tuple[int, ...] = ()
    order: bytes = b""


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor of a compute node.

    Attributes:
        gates: Number of its gates.
        shape: Its shape.
        numbers: The number of the gate of each element; None where they cannot be told apart.
    """

    gates: int
    shape: tuple[int, ...]
    numbers: Tensor | None

    @property
    def placed(self) -> Tensor:
        """The numbers; one for all, where they cannot be told apart."""
        if self.numbers is None:
            return torch.zeros((), dtype=torch.int32).expand(self.shape)
        return self.numbers


def pair(layout: Layout, groups: int, first: Factor, second: Factor) -> tuple[Met, Met]:
    """How gates in any order meet: those of the activation and those of the weight.

    A factor whose gates cannot be told apart counts with the most bits that any of them has.
    """
    if first.gates == second.gates == 1:
        return Met(), Met()
    spaces = product_space(layout, groups, first.placed, second.placed)
    if spaces is None or _is_too_large(*spaces):
        first = Factor(first.gates, first.shape, None)
        spaces = product_space(layout, groups, first.placed, second.placed)
    if spaces is None:
        return Met(), Met()
    shapes = [tuple(space.shape) for space in spaces]
    if _are_apart(*spaces):
        parts = [_parts(s, f.gates) for s, f in zip(spaces, (first, second), strict=True)]
        shapes, spaces = [(1, parts[0].numel()), (parts[1].numel(), 1)], (parts[0], parts[1])
    found = [
        Met(shape, _order(space, factor.gates)) if factor.numbers is not None else Met()
        for shape, space, factor in zip(shapes, spaces, (first, second), strict=True)
    ]
    return found[0], found[1]


def product_space(
    layout: Layout, groups: int, first: Tensor, second: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The numbers of two factors over the products that a compute node forms.

    Both have as many axes and broadcast; axes along which nothing changes have size 1. None where
    the numbers change over the space of an image: how often each place is met is not told there;
    and where shapes do not fit.
    """
    if layout in (Layout.CONV, Layout.CONV_TRANSPOSE):
        line, inputs = _channels(first, second.dim() - 2), second.shape[0]
        if layout is Layout.CONV:
            inputs = second.shape[1] * groups
        if line is None or line.numel() != inputs or second.shape[0] % groups:
            return None
        if layout is Layout.CONV:  # (group, out, in, kernel)
            weight = second.reshape(groups, -1, second.shape[1], prod(second.shape[2:]))
            return _same_rank(line.reshape(groups, 1, -1, 1), weight)
        return _same_rank(line.reshape(-1, 1, 1), second.flatten(2))
    if layout is Layout.LINEAR:  # (..., out, in)
        return _same_rank(first.unsqueeze(-2), second)
    rows = first if first.dim() > 1 else first[None]
    columns = second if second.dim() > 1 else second[:, None]
    return _same_rank(rows.unsqueeze(-1), columns.unsqueeze(-3))  # (..., row, contracted, column)


def _channels(numbers: Tensor, spatial: int) -> Tensor | None:
    """The number of every channel of images; None if there are several."""
    rows = numbers.movedim(numbers.dim() - 1 - spatial, -1)
    line = rows[(0,) * (rows.dim() - 1)]
    return line if bool((rows == line).all()) else None


def _same_rank(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    rank = max(first.dim(), second.dim())
    found = [s.reshape((1,) * (rank - s.dim()) + s.shape) for s in (first, second)]
    return _narrowed(found[0]), _narrowed(found[1])


def _narrowed(numbers: Tensor) -> Tensor:
    for axis, size in enumerate(numbers.shape):
        first = numbers.narrow(axis, 0, 1)
        if size > 1 and (numbers.stride(axis) == 0 or bool((numbers == first).all())):
            numbers = first
    return numbers


def _are_apart(first: Tensor, second: Tensor) -> bool:
    """Whether every gate of one meets every gate of the other."""
    return all(1 in sizes for sizes in zip(first.shape, second.shape, strict=True))


def _is_too_large(first: Tensor, second: Tensor) -> bool:
    size = prod(torch.broadcast_shapes(first.shape, second.shape))
    return size > MOST and not _are_apart(first, second)


def _parts(numbers: Tensor, gates: int) -> Tensor:
    """Few numbers in which every gate has the same share as in `numbers`."""
    counts = torch.bincount(numbers.flatten(), minlength=gates)
    shares = counts // int(np.gcd.reduce(counts.numpy()))
    return torch.arange(gates, dtype=torch.int32).repeat_interleave(shares)


def _order(numbers: Tensor, gates: int) -> bytes:
    """Which gate stands where, as `Operand` keeps it."""
    flat = numbers.flatten()
    if torch.equal(flat, torch.arange(gates, dtype=torch.int32)):
        return b""
    return flat.numpy().astype(np.int32).tobytes()
