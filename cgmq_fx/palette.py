"""Colours of bit-widths, told apart by people who are colour-blind and on light and dark pages."""

from __future__ import annotations

from itertools import pairwise
from math import log2

STOPS = {2: "#b2182b", 4: "#ef8a62", 8: "#f5d76e", 16: "#67a9cf", 32: "#2166ac"}
"""The colours of some bit-widths, ascending; between them they are mixed."""

WEIGHT, ACTIVATION = "#4a86c5", "#e0656f"
"""The colours of weights and activations in plots, on light and dark pages alike."""

PRUNED = "#8a8a8a"
"""The colour of 0 bits."""


def color_of(bits: float | None) -> str:
    """The colour of a (mean) bit-width as `#rrggbb`; none for what has no bits."""
    if bits is None:
        return "none"
    if bits <= 0:
        return PRUNED
    clamped = min(max(bits, min(STOPS)), max(STOPS))
    for low, high in pairwise(STOPS):
        if clamped <= high:
            share = (log2(clamped) - log2(low)) / (log2(high) - log2(low))
            return _mixed(STOPS[low], STOPS[high], share)
    return STOPS[max(STOPS)]


def _mixed(one: str, other: str, share: float) -> str:
    parts = [(int(one[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in parts)
