"""How many bits codes have: what can be told from integers, whatever a file says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cgmq_fx.cost_models.errors import ArtifactError
from cgmq_fx.passes.grid import MAX_GRID_BITS, PASS_THROUGH

Array: TypeAlias = npt.NDArray[Any]
Shape: TypeAlias = tuple[int, ...]

_ALL_WIDTHS = tuple(range(2, MAX_GRID_BITS + 1))


@dataclass(frozen=True)
class Layout:
    """How a quantized tensor's bits are meant to be read.

    Attributes:
        widths: The bit-widths that a gate could take, ascending.
        gates: Shape of the gates.
        power_of_two: Whether steps are powers of two.
    """

    widths: tuple[int, ...] = _ALL_WIDTHS
    gates: Shape = ()
    power_of_two: bool = False


def weight_bits(codes: Array, ranges: Shape, layout: Layout) -> Array:
    """The fewest of the allowed bits with which every gate of a weight can hold its codes.

    Codes are whole steps of the finest grid that is used within a range; a coarser grid of `b` bits
    has every `r`-th of them, with `r` the ratio of the steps.

    Args:
        codes: The integer tensor.
        ranges: Shape of the steps, broadcastable against the codes.
        layout: The bit-widths, and the shape of the gates.

    Raises:
        ArtifactError: If no allowed width holds the codes.
    """
    sizes = np.abs(codes.astype(np.int64))
    widths = [b for b in layout.widths if b < PASS_THROUGH]
    finest = _finest(_largest(sizes, ranges), widths)
    chosen: Array = np.full(_largest(sizes, layout.gates).shape, PASS_THROUGH, np.int64)
    for width in reversed(widths):
        ratio = _ratio(sizes, finest, width, layout)
        whole = (ratio > 0) & (sizes % np.maximum(ratio, 1) == 0)
        held = whole & (sizes <= np.maximum(ratio, 1) * _highest(width))
        chosen[_largest((~held).astype(np.int8), layout.gates) == 0] = width
    if (chosen == PASS_THROUGH).any():
        raise ArtifactError(f"a weight holds codes up to {int(sizes.max())}, too many for {widths}")
    return chosen


def _largest(values: Array, groups: Shape) -> Array:
    """The largest value in each group; a dimension of size 1 is one group."""
    if groups and len(groups) != values.ndim:
        raise ArtifactError(f"gates of shape {groups} do not fit a tensor of shape {values.shape}")
    shape = groups or (1,) * values.ndim
    if any(g not in (1, size) for g, size in zip(shape, values.shape, strict=True)):
        raise ArtifactError(f"gates of shape {groups} do not fit a tensor of shape {values.shape}")
    axes = tuple(i for i, size in enumerate(shape) if size == 1)
    found: Array = values.max(axis=axes, keepdims=True, initial=0)
    return found


def _highest(width: int) -> int:
    return (1 << (width - 1)) - 1 if width else 0


def _finest(most: Array, widths: Sequence[int]) -> Array:
    """The width of the finest grid in use, per range."""
    found = np.full(most.shape, max(widths, default=0), np.int64)
    for width in sorted(widths, reverse=True):
        found[most <= _highest(width)] = width
    return found


def _ratio(sizes: Array, finest: Array, width: int, layout: Layout) -> Array:
    """How many finest steps a step of `width` bits is; 0 where it is no whole number.

    Where all codes of a range would fit into fewer bits, `width` may be what they were rounded to;
    zeros are on every grid.
    """
    if width == 0:
        return np.ones_like(finest)
    if layout.power_of_two:
        groups = _largest(sizes, layout.gates)
        needed = np.ceil(np.log2(np.maximum(groups, 1) / _highest(width)))
        return (2 ** np.maximum(needed, 0)).astype(np.int64)
    fine, coarse = (1 << finest) - 1, (1 << width) - 1
    return np.where((fine > 0) & (fine % coarse == 0), fine // coarse, fine < coarse)


def activation_bits(low: Array, high: Array, layout: Layout) -> Array:
    """The fewest of the allowed bits that hold codes from `low` to `high`, elementwise; 0 for none.

    Raises:
        ArtifactError: If no allowed width does.
    """
    chosen = np.full(np.shape(low), PASS_THROUGH, np.int64)
    for width in reversed([b for b in layout.widths if b < PASS_THROUGH]):
        signed = (low >= -_highest(width)) & (high <= _highest(width))
        unsigned = (low >= 0) & (high <= (1 << width) - 1)
        chosen[signed | unsigned] = width
    chosen[(low == 0) & (high == 0)] = 0
    if (chosen == PASS_THROUGH).any():
        raise ArtifactError(
            f"codes from {int(np.min(low))} to {int(np.max(high))} are too many for {layout.widths}"
        )
    return chosen
