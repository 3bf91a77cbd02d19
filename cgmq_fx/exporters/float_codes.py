"""Weights that runtimes keep as float numbers although they lie on a grid: the codes they are."""

from __future__ import annotations

import numpy as np

from cgmq_fx.exporters.code_bits import Array

_HIGHEST = 127
_SAMPLE = 256
_OFF = 1e-4
"""How far from a whole number of steps rounding to float32 may put a number."""


def float_codes(values: Array) -> tuple[Array, Array] | None:
    """The codes and steps of numbers that are multiples of a step in every row.

    Args:
        values: A tensor of float numbers, its output channels along the first axis.

    Returns:
        8-bit codes of the same shape and one step per row, the largest steps that there are; None
        if a row has no step of which all its numbers are at most 127 times.
    """
    if values.ndim < 2 or not values.size or not np.isfinite(values).all():
        return None
    rows = values.reshape(len(values), -1).astype(np.float64)
    most = np.abs(rows).max(1, keepdims=True)
    scaled = rows / np.where(most == 0, 1, most)
    highest = np.zeros(len(rows), np.int64)
    for code in range(1, _HIGHEST + 1):
        open_rows = np.flatnonzero(highest == 0)
        if not open_rows.size:
            break
        fits = open_rows[_whole(scaled[open_rows, :_SAMPLE] * code)]
        highest[fits[_whole(scaled[fits] * code)]] = code
    if not highest.all():
        return None
    steps = np.where(most[:, 0] == 0, 1, most[:, 0]) / highest
    codes = np.rint(scaled * highest[:, None]).astype(np.int8)
    return codes.reshape(values.shape), steps


def _whole(rows: Array) -> Array:
    """Which rows are whole numbers."""
    found: Array = (np.abs(rows - np.rint(rows)) < _OFF).all(1)
    return found
