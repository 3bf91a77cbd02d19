"""What the bits of one tensor are worth: how far they alone move the output of the network.

Gradients tell how the loss answers to small errors that do not depend on each other. Few bits make
large ones that do, and not alike in weights and activations. So at calibration every quantizer is
given each of its low bit-widths in turn, with all others open, and the change of the output is
measured. Nothing but inputs is needed: no labels, and no loss. Batch norms that normalise in
training do so here: what they take back at once does not count.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from cgmq_fx.calibrate import RangeTable
from cgmq_fx.passes.grid import PASS_THROUGH
from cgmq_fx.passes.inputs import ExampleInputs
from cgmq_fx.passes.norms import normalised_batches
from cgmq_fx.passes.quantizer import Quantizer

_LOG = logging.getLogger(__name__)

_SAMPLES = 64
_MOST_CALLS = 600
"""Most calls of the model; where there are more quantizers, gradients alone have to tell."""

_WIDEST = 8
"""Bits above which errors are small enough for what is known of their size."""

_LARGEST = 1e6


def with_distortion(
    module: GraphModule,
    quantizers: Mapping[str, Quantizer],
    tables: Mapping[str, RangeTable],
    inputs: ExampleInputs,
    dynamic: bool,
) -> dict[str, RangeTable]:
    """The tables with `distortion` measured, as far as it can be.

    Args:
        module: The graph.
        quantizers: Its quantizers by name.
        tables: Their calibrated ranges.
        inputs: What to call it with; the first samples are enough.
        dynamic: Whether any number of samples will do.
    """
    low = {n: _low_levels(q) for n, q in quantizers.items()}
    if sum(map(len, low.values())) > _MOST_CALLS:
        low = {name: levels[-1:] for name, levels in low.items()}
    if sum(map(len, low.values())) > _MOST_CALLS:
        return dict(tables)
    meter = _Meter(module, quantizers, tables, _few(inputs) if dynamic else inputs)
    found = meter.measure(low)
    return {n: replace(t, distortion=_completed(t, found.get(n, {}))) for n, t in tables.items()}


def _low_levels(quantizer: Quantizer) -> list[int]:
    """The levels to be measured, the fewest bits last; 0 bits as well, and at least one level."""
    widths = quantizer.spec.bit_widths
    return [level for level in reversed(range(len(widths))) if widths[level] <= _WIDEST] or [0]


def _few(inputs: ExampleInputs) -> ExampleInputs:
    batch = inputs.batch
    if batch is None or batch <= _SAMPLES:
        return inputs
    return inputs.rows(0, _SAMPLES)


def _completed(table: RangeTable, found: Mapping[int, float]) -> Tensor | None:
    """The distortion at every level, from some: between and beyond them it is as the noise."""
    if not found:
        return None
    noise = table.noise.double().mean(1).tolist()
    lowest = min(found)
    rows = []
    for level, own in enumerate(noise):
        known = max((k for k in found if k <= level), default=lowest)
        like = found[known] * own / noise[known] if noise[known] else 0.0
        rows.append(found.get(level, like))
    # one batch may by chance have less error with fewer bits
    return torch.tensor(rows, dtype=torch.float32).flip(0).cummax(0).values.flip(0)


class _Meter:
    """A graph with all quantizers open, one of which is closed at a time."""

    def __init__(
        self,
        module: GraphModule,
        quantizers: Mapping[str, Quantizer],
        tables: Mapping[str, RangeTable],
        inputs: ExampleInputs,
    ) -> None:
        self._module, self._quantizers, self._tables = module, quantizers, tables
        self._inputs = inputs

    @torch.no_grad()
    def measure(self, levels: Mapping[str, list[int]]) -> dict[str, dict[int, float]]:
        """By quantizer and level, the relative squared error of the output; {} if there is none."""
        training = self._module.training
        kept = {n: (q.bits.clone(), q.log_range.clone()) for n, q in self._quantizers.items()}
        self._module.eval()
        try:
            for quantizer in self._quantizers.values():
                quantizer.bits.fill_(PASS_THROUGH)
            with normalised_batches(self._module):
                return self._errors(levels)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:  # depends on values
            _LOG.info("what bit-widths do to the output cannot be measured: %s", error)
            return {}
        finally:
            for name, quantizer in self._quantizers.items():
                bits, log_range = kept[name]
                quantizer.bits.copy_(bits)
                quantizer.log_range.copy_(log_range)
            self._module.train(training)

    def _errors(self, levels: Mapping[str, list[int]]) -> dict[str, dict[int, float]]:
        before = self._outputs()
        if not before or not all(bool(t.isfinite().all()) for t in before):
            return {}
        return {
            name: {level: self._error(name, level, before) for level in own}
            for name, own in levels.items()
        }

    def _error(self, name: str, level: int, before: list[Tensor]) -> float:
        quantizer = self._quantizers[name]
        quantizer.bits.fill_(quantizer.spec.bit_widths[level])
        quantizer.log_range.copy_(self._tables[name].log_ranges[level])
        errors = [
            (a - b).square().mean() / b.square().mean().clamp(min=1e-12)
            for a, b in zip(self._outputs(), before, strict=True)
        ]
        quantizer.bits.fill_(PASS_THROUGH)
        worst = torch.stack(errors).mean()
        return float(torch.nan_to_num(worst, nan=_LARGEST, posinf=_LARGEST).clamp(max=_LARGEST))

    def _outputs(self) -> list[Tensor]:
        """What the graph gives, as far as it is made of numbers."""
        output: Any = self._module(*self._inputs.args, **self._inputs.kwargs)
        leaves = pytree.tree_leaves(output)
        return [
            t.float()
            for t in leaves
            if isinstance(t, Tensor) and t.is_floating_point() and t.numel()
        ]
