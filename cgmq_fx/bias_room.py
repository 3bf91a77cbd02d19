"""Weights of a layer that hardly depends on its input: their steps must leave room for its bias.

A channel whose batch norm has shut it off has weights near zero and a bias that is not. The bias is
an int32 number of steps of input times weight, and with a range that fits such weights it would
take more than 2^31 of them. A wider range rounds these weights to zero, which costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import GraphModule

from cgmq_fx.calibrate import RangeTable
from cgmq_fx.passes.bias import roundings
from cgmq_fx.passes.grid import finest_step
from cgmq_fx.passes.quantizer import INT32_CODES, Quantizer

_WIDEST = 8
"""Most bits of both factors for which a runtime with int32 sums is assumed."""

_ROOM = 4.0
"""What a bias and the ranges may grow by in training."""


def with_room_for_biases(
    module: GraphModule, quantizers: Mapping[str, Quantizer], tables: Mapping[str, RangeTable]
) -> dict[str, RangeTable]:
    """Tables whose ranges of weights, up to 8 bits, are wide enough for int32 biases.

    Args:
        module: The graph, with bias quantizers.
        quantizers: Its quantizers by name.
        tables: What calibration found.
    """
    found = dict(tables)
    for rounding in roundings(module):
        first, second = rounding.input, rounding.weight
        if first not in tables or second not in tables:
            continue
        inputs = _steps(quantizers[first], tables[first])
        if not inputs:
            continue
        finest = torch.stack([step.amin() for step in inputs.values()]).amin()
        least = _ROOM * rounding.bias.abs().float() / (INT32_CODES * finest)
        found[second] = _widened(quantizers[second], found[second], least)
    return found


def _steps(quantizer: Quantizer, table: RangeTable) -> dict[int, Tensor]:
    """The steps at every bit-width that runtimes sum up in int32, by its number."""
    spec, found = quantizer.spec, {}
    for level, bits in enumerate(spec.bit_widths):
        if 0 < bits <= _WIDEST:
            logs = table.log_ranges[level]
            width = torch.tensor(bits, dtype=torch.int32, device=logs.device)
            found[level] = finest_step(logs, width, quantizer.signed, spec.power_of_two)
    return found


def _widened(quantizer: Quantizer, table: RangeTable, least: Tensor) -> RangeTable:
    """A table with no step below `least`, which has an element for every channel."""
    logs = table.log_ranges.clone()
    for level, step in _steps(quantizer, table).items():
        floor = least.reshape(step.shape) if step.numel() == least.numel() else least.amax()
        logs[level] += (floor / step).clamp(min=1.0).log()
    return replace(table, log_ranges=logs)
