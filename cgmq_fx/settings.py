"""The bits and ranges of all quantizers, written at once however many there are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cgmq_fx.calibrate import RangeTable
from cgmq_fx.gates import GateLayout
from cgmq_fx.passes.quantizer import Quantizer


class Settings:
    """Flat tensors, of which the quantizers' bits and ranges are views while gates move.

    Ranges move along their calibrated tables; what training adds to them stays.

    Args:
        quantizers: The quantizers, in the order of the layout; their ranges are overwritten.
        tables: Their calibrated ranges.
        layout: The gates.
    """

    def __init__(
        self, quantizers: Sequence[Quantizer], tables: Sequence[RangeTable], layout: GateLayout
    ) -> None:
        self._quantizers, self._tables, self._layout = quantizers, tables, layout
        self._sizes = [q.log_range.numel() for q in quantizers]
        most = layout.widths.shape[1]
        self._log_ranges = torch.cat([_by_level(t.log_ranges.cpu(), most) for t in tables], 1)
        self._range = torch.arange(sum(self._sizes))
        self._gate = torch.cat([_gates(q, layout.starts[i]) for i, q in enumerate(quantizers)])
        self._several = [i for i, q in enumerate(quantizers) if _shares(q)]
        self._offsets = torch.zeros(sum(self._sizes), dtype=torch.float32)
        for quantizer in quantizers:
            quantizer.log_range.detach().zero_()  # an earlier controller's ranges are no offset
        self._bind()

    @torch.no_grad()
    def write(self, levels: Tensor) -> None:
        """Give quantizers the bits of `levels`, one entry per gate, and the ranges for them."""
        if not self._is_bound():
            self._bind()
        self._bits.copy_(self._layout.widths_at(levels))
        row = levels.take(self._gate) * self._range.numel()
        offsets = self._log_ranges.take(row + self._range)
        parts = offsets.split(self._sizes) if self._several else ()
        for index in self._several:
            own = levels[slice(*self._layout.starts[index : index + 2])]
            shaped = own.reshape(self._quantizers[index].bits.shape)
            parts[index].copy_(_mean(self._tables[index].log_ranges.cpu(), shaped).reshape(-1))
        self._flat.add_((offsets - self._offsets).to(self._flat))
        self._offsets = offsets

    def release(self) -> None:
        """Give every quantizer tensors of its own."""
        for quantizer in self._quantizers:
            quantizer.bits = quantizer.bits.clone()
            quantizer.log_range.data = quantizer.log_range.detach().clone()

    def _is_bound(self) -> bool:
        """Whether quantizers still have the views: not after a model was moved, as a whole."""
        first = self._quantizers[0]
        pairs = ((first.log_range, self._flat), (first.bits, self._bits))
        return all(own.data_ptr() == flat.data_ptr() for own, flat in pairs)

    def _bind(self) -> None:
        quantizers = self._quantizers
        self._bits = torch.cat([q.bits.reshape(-1) for q in quantizers])
        self._flat = torch.cat([q.log_range.detach().reshape(-1) for q in quantizers])
        gates = [q.bits.numel() for q in quantizers]
        bits, ranges = self._bits.split(gates), self._flat.split(self._sizes)
        for quantizer, own, log_range in zip(quantizers, bits, ranges, strict=True):
            quantizer.bits = own.view(quantizer.bits.shape)
            quantizer.log_range.data = log_range.view(quantizer.log_range.shape)


def _shares(quantizer: Quantizer) -> bool:
    """Whether several gates share a range."""
    ranges = quantizer.log_range.shape
    return bool(torch.broadcast_shapes(quantizer.bits.shape, ranges) != ranges)


def _gates(quantizer: Quantizer, start: int) -> Tensor:
    """For every range the number of its gate; of the first one if there are several."""
    shape = quantizer.log_range.shape
    if _shares(quantizer):
        return torch.full((quantizer.log_range.numel(),), start)
    own = torch.arange(start, start + quantizer.bits.numel()).view(quantizer.bits.shape)
    return own.expand(shape).reshape(-1)


def _by_level(table: Tensor, most: int) -> Tensor:
    """Shape (most, ranges): a row per level, the last one repeated."""
    rows = table.reshape(table.shape[0], -1)
    return torch.cat([rows, rows[-1:].expand(most - rows.shape[0], -1)])


def _mean(table: Tensor, levels: Tensor) -> Tensor:
    """The calibrated log-range at `levels`, averaged over the gates that share a range."""
    total = torch.zeros_like(table[0])
    for level in range(table.shape[0]):
        at = (levels == level).to(table.dtype)
        at = at.sum_to_size(table[0].shape) * (table[0].numel() / at.numel())
        total = total + at * table[level]
    return total
