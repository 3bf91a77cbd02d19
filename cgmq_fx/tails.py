"""Tails: what a sample misses and a cap cuts off, where that is more than a few wild values.

Ranges are found on a sample that counts values as capped, so that one wild value cannot stretch
them. Where the tail holds a good part of the power, as with a token that all others attend to or a
cloud of points with far ones, that clips what matters; and a grid of more than 8 bits loses nothing
by a wider range. So the largest values of all are kept exactly, and tell what is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cgmq_fx.passes.grid import MAX_GRID_BITS, PASS_THROUGH, power_of_two_range, round_to_grid

_MOST = 256
"""How many of the largest values are kept for each range."""

_BLOCK = 64
"""Values that are compared as one in the search for the largest."""

LARGEST = 1e15
"""What is larger is no value of a network that works: squares of what is beyond overflow."""

_HEAVY = 1e-3
"""Share of the mean square above which what a cap cuts off makes a tail heavy."""

_COARSE = 8
"""Bits up to which only heavy tails count: finer grids hold all values, where they can, for what
they would lose to the rest is nothing."""

_ROUNDING = 1e-2
"""Share of the mean square of capped values that rounding may cost for the sake of a tail: what 4
bits cost normally distributed values."""

_GAIN = 0.5
"""Part of the error that may be left where a range is extended; else it stays."""

_CANDIDATES = 12
"""Ranges that are tried for a tail, beyond the one that is best without it."""

_LEAST_NOISE = 0.01
"""Values may be on the grid by chance, all zero before training for one, and do not stay there."""


@dataclass(frozen=True, slots=True)
class Extremes:
    """The largest values by magnitude.

    Attributes:
        values: Shape (ranges, at most 256): them.
        count: Among how many, per range.
    """

    values: Tensor
    count: int

    @staticmethod
    def of(values: Tensor) -> Extremes:
        """Those of `values`, shape (ranges, values); what is not finite or huge is left out."""
        count = values.shape[1]
        if count and not bool(values.abs().amax() <= LARGEST):
            values = torch.where(values.abs() <= LARGEST, values, torch.zeros_like(values))
        return Extremes(_largest(values).float(), count)

    def merged(self, other: Extremes) -> Extremes:
        """Those of both together."""
        both = torch.cat([self.values, other.values], 1)
        return Extremes(_largest(both), self.count + other.count)

    def top(self, signed: bool) -> Tensor:
        """The largest that a grid can hold, shape (ranges,); 0 if none is positive."""
        return (self.values.abs() if signed else self.values.clamp(min=0)).amax(1)


def _largest(values: Tensor) -> Tensor:
    blocks = values.shape[1] // _BLOCK
    if blocks > _MOST:  # they are in the blocks with the largest maxima; `topk` of all is slow
        grouped = values[:, : blocks * _BLOCK].unflatten(1, (blocks, _BLOCK))
        at = grouped.abs().amax(2).topk(_MOST, 1, sorted=False).indices
        kept = grouped.gather(1, at[:, :, None].expand(-1, -1, _BLOCK)).flatten(1)
        values = torch.cat([kept, values[:, blocks * _BLOCK :]], 1)
    at = values.abs().topk(min(_MOST, values.shape[1]), 1, sorted=False).indices
    return values.gather(1, at)


def noise(values: Tensor, limit: Tensor, bits: int, signed: bool) -> Tensor:
    """12 times the mean squared error of rounding `values`, shape (ranges,)."""
    if bits == 0:
        return 12 * values.square().mean(1)
    if bits >= PASS_THROUGH:
        return torch.zeros_like(limit)
    width = torch.tensor(bits, dtype=torch.int32, device=values.device)
    error = round_to_grid(values, limit[:, None], width, signed).sub_(values).square().mean(1)
    return torch.maximum(12 * error, _LEAST_NOISE * _step(limit, bits, signed).square())


def _step(limit: Tensor, bits: int, signed: bool) -> Tensor:
    codes: int = 2**bits - 1
    return limit * (2 if signed else 1) / codes


class Tail:
    """A sample together with the largest of all values.

    Args:
        sample: Shape (ranges, samples), finite.
        extremes: The largest of the values that the sample is of.
        cap: Where the search for ranges caps the sample, shape (ranges,).
        signed: Whether the grid has codes below zero.

    Attributes:
        heavy: Whether the cap cuts off a good part of the values' power, shape (ranges,).
    """

    def __init__(self, sample: Tensor, extremes: Extremes, cap: Tensor, signed: bool) -> None:
        self._sample, self._signed = sample, signed
        self._size = sample.abs() if signed else sample.clamp(min=0)
        values = extremes.values
        self._known = values.abs().amin(1)  # of larger ones, none is missing
        self._largest = values.abs() if signed else values.clamp(min=0)
        self._count = extremes.count
        self._cap = torch.minimum(cap, self._size.amax(1))  # 0 where the sample has met nothing
        self.heavy = self.lost(self._cap) > _HEAVY * self.power

    @property
    def power(self) -> Tensor:
        """Mean square of what the grid can hold, shape (ranges,)."""
        return self.lost(torch.zeros_like(self._known))

    def lost(self, limit: Tensor) -> Tensor:
        """Mean square of what clipping at `limit` cuts off, shape (ranges,)."""
        known = torch.maximum(self._known, limit)
        size = torch.minimum(self._size, known[:, None])
        return (size - limit[:, None]).clamp_(min=0).square().mean(1) + self._beyond(known, limit)

    def noise(self, limit: Tensor, bits: int) -> Tensor:
        """12 times the mean squared error of rounding all values, shape (ranges,)."""
        if bits >= PASS_THROUGH:
            return torch.zeros_like(limit)
        if bits == 0:
            limit = torch.zeros_like(limit)
        known = torch.maximum(self._known, limit)[:, None]
        sample = torch.minimum(torch.maximum(self._sample, -known), known)
        return noise(sample, limit, bits, self._signed) + 12 * self._beyond(known[:, 0], limit)

    def extended(self, limit: Tensor, bits: int, power_of_two: bool) -> Tensor:
        """The range of least error from `limit` on where it is worth it, else `limit`.

        It is worth it if the error of all values halves, and rounding costs those within the cap
        little: a wild value that few bits cannot hold does not stretch their range.

        Args:
            limit: Shape (ranges,): the ranges without the tail.
            bits: Bit-width, 2 or more.
            power_of_two: Whether steps are powers of two.
        """
        bits = min(bits, MAX_GRID_BITS)
        wide = self._widest(limit, bits, power_of_two)
        free = wide > limit
        if bits <= _COARSE:
            free &= self.heavy
        if not bool(free.any()):
            return limit
        best, least = limit, _GAIN * self.noise(limit, bits)
        for wider in _between(limit, wide, power_of_two):
            error = self.noise(wider, bits)
            better = free & (error < least)
            best, least = torch.where(better, wider, best), torch.where(better, error, least)
        return best

    def _widest(self, limit: Tensor, bits: int, power_of_two: bool) -> Tensor:
        """The range that clips nothing, as far as values within the cap can afford it."""
        bulk = torch.minimum(self._size, self._cap[:, None]).square().mean(1)
        room = limit * (12 * _ROUNDING * bulk).sqrt() / _step(limit, bits, self._signed)
        reach = (2**bits - 1) / (2**bits - 2) if self._signed else 1.0
        top = self._largest.amax(1) * reach
        if power_of_two:
            width = torch.tensor(bits, dtype=torch.int32, device=limit.device)
            top = power_of_two_range(top * 2**0.5, width, self._signed)
        return torch.maximum(torch.minimum(top, room), limit)

    def _beyond(self, known: Tensor, limit: Tensor) -> Tensor:
        """By how much values beyond `known` add to the mean square of the distance to `limit`."""
        size = torch.maximum(self._largest, known[:, None])
        added = (size - limit[:, None]).square() - (known - limit).square()[:, None]
        return added.sum(1) / self._count


def _between(limit: Tensor, top: Tensor, power_of_two: bool) -> list[Tensor]:
    """Ranges from `limit`, which is not among them, to `top`."""
    if power_of_two:
        doubled = [limit * 2**k for k in range(1, _CANDIDATES + 1)]
        return [torch.where(wider <= top, wider, limit) for wider in doubled]
    return [limit * (top / limit) ** (i / _CANDIDATES) for i in range(1, _CANDIDATES + 1)]
