"""The gates of a graph as one flat vector, and what levels mean in bits and in noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cgmq_fx.calibrate import RangeTable
from cgmq_fx.cost_models.bits import BitArray
from cgmq_fx.cost_models.facts import QuantizerFacts

_TINY = 1e-30

Levels = npt.NDArray[np.int64]
"""Per gate, the index of its bit-width: 0 is the smallest that its quantizer allows."""


@dataclass(frozen=True, slots=True)
class Slopes:
    """Differences of squared steps, one entry per gate.

    Attributes:
        down: From the current level to the next lower one; 0 at the lowest.
        up: From the next higher level to the current one; 0 at the highest.
        change: Towards the level that `Statistic.CHANGE` compares with.
    """

    down: Tensor
    up: Tensor
    change: Tensor


@dataclass(frozen=True)
class GateLayout:
    """Which stretch of the flat vector belongs to which quantizer, and the tables by level.

    Attributes:
        quantizers: The quantizers, in order.
        starts: Where each one's gates start, and the total at the end.
        owner: Shape (gates,): index of the quantizer of each gate.
        count: Shape (gates,): number of levels of each gate.
        widths: Shape (quantizers, most levels): bit-width of each level, the last one repeated.
        noise: Shape (rows, most levels): mean squared step of each level, the last one repeated.
        row: Shape (gates,): the row of `noise` of each gate.
        elements: Shape (gates,): elements that share the gate.
        harm: Like `noise`: what the loss is taken to be proportional to. Where the distortion of
            the output was measured, that of the level, higher in rows with more noise; else noise.
        share: Shape (rows,): the noise of a row by that of its quantizer; None where `harm` is
            the noise.
    """

    quantizers: tuple[QuantizerFacts, ...]
    starts: tuple[int, ...]
    owner: Tensor
    count: Tensor
    widths: Tensor
    noise: Tensor
    row: Tensor
    elements: Tensor
    harm: Tensor
    share: Tensor | None = None

    @staticmethod
    def of(
        quantizers: Mapping[str, QuantizerFacts], tables: Mapping[str, RangeTable]
    ) -> GateLayout:
        """Lay out the gates of `quantizers`."""
        facts = tuple(quantizers.values())
        sizes = torch.tensor([q.gates for q in facts])
        most = max(len(q.bit_widths) for q in facts)
        widths = [[*q.bit_widths, *[q.bit_widths[-1]] * (most - len(q.bit_widths))] for q in facts]
        noise = [_padded(tables[q.name].noise.cpu(), most) for q in facts]
        first = np.cumsum([0, *(len(rows) for rows in noise)]).tolist()
        row = [
            _rows(tables[q.name], q.gates) + start for q, start in zip(facts, first, strict=False)
        ]
        owner = torch.repeat_interleave(torch.arange(len(facts)), sizes)
        per_gate = torch.tensor([q.elements / q.gates for q in facts], dtype=torch.float32)
        levels = torch.tensor([len(q.bit_widths) for q in facts])
        harm, share = torch.cat(noise), None
        if all(tables[q.name].distortion is not None for q in facts):
            measured = [_measured(tables[q.name], q.bit_widths) for q in facts]
            harm = torch.cat([_padded(rows, most) for rows, _ in measured])
            share = torch.cat([row for _, row in measured])
        return GateLayout(
            facts,
            (0, *np.cumsum(sizes.numpy()).tolist()),
            owner,
            levels[owner],
            torch.tensor(widths),
            torch.cat(noise),
            torch.cat(row),
            per_gate[owner],
            harm,
            share,
        )

    def __iter__(self) -> Iterator[tuple[int, QuantizerFacts, slice]]:
        """Index, facts and stretch of every quantizer."""
        for i, q in enumerate(self.quantizers):
            yield i, q, slice(self.starts[i], self.starts[i + 1])

    def bits_of(self, index: int, levels: Levels) -> BitArray:
        """The bits of quantizer number `index` at `levels` (one entry per gate)."""
        return self.widths[index].numpy()[levels]

    def assignment(self, levels: Levels) -> dict[str, BitArray]:
        """The bits of the quantizers at `levels` (one entry per gate, all quantizers)."""
        return {q.name: self.bits_of(i, levels[part]) for i, q, part in self}

    def widths_at(self, levels: Tensor) -> Tensor:
        """The bit-width of each gate at `levels`."""
        return self.widths.take(self._width_of + levels)

    def slopes(self, levels: Tensor) -> Slopes:
        """What one level less adds and one more saves, and by what the noise changes."""
        return Slopes(*self._slopes.index_select(1, self._noise_of + levels))

    def loss(self, levels: Tensor, worth: Tensor) -> float:
        """The loss that `levels` is estimated to add: `worth` times harm, summed."""
        harm = self.harm.take(self._noise_of + levels)
        return float((worth.double() * harm.double()).sum())

    def worth(self, sensitivity: Tensor) -> Tensor:
        """The loss per unit of harm of every gate, shape (gates,).

        Where the distortion of the output was measured, it tells what a quantizer as a whole is
        worth, and sensitivities how that is shared by its gates; else they tell all.

        Args:
            sensitivity: Shape (gates,), not negative: loss per squared step.
        """
        if self.share is None:
            return sensitivity
        known = sensitivity.clamp(min=_TINY)
        total = torch.bincount(self.owner, known * self.share[self.row], len(self.quantizers))
        return (known / total.to(known)[self.owner]).to(sensitivity)

    @cached_property
    def _width_of(self) -> Tensor:
        """Where the first level of each gate stands in the tables of widths."""
        return self.owner * self.widths.shape[1]

    @cached_property
    def _noise_of(self) -> Tensor:
        """Likewise in the tables of noise."""
        return self.row.long() * self.noise.shape[1]

    @cached_property
    def _slopes(self) -> Tensor:
        """The fields of `Slopes` at every level of every row of `noise`, shape (3, entries)."""
        none = torch.zeros_like(self.noise[:, :1])
        falls, noise = (t[:, :-1] - t[:, 1:] for t in (self.harm, self.noise))
        change = torch.cat([noise[:, :1], noise], 1) if noise.numel() else none
        tables = (torch.cat([none, falls], 1), torch.cat([falls, none], 1), change)
        return torch.stack([t.clamp(min=0).reshape(-1) for t in tables])


def _measured(table: RangeTable, widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The harm, shape (levels, rows), and the share, shape (rows,), of a measured quantizer."""
    assert table.distortion is not None
    noise = table.noise.cpu().reshape(len(widths), -1)
    mean = noise.mean(1, keepdim=True)
    shares = torch.where(mean > 0, noise / mean.clamp(min=_TINY), torch.ones_like(noise))
    lowest = next((level for level, bits in enumerate(widths) if bits > 0), 0)
    return shares * table.distortion.to(noise)[:, None], shares[lowest]


def _padded(noise: Tensor, size: int) -> Tensor:
    """Shape (rows, size) of a table of shape (levels, rows) or (levels,)."""
    rows = noise.reshape(noise.shape[0], -1).t()
    return torch.cat([rows, rows[:, -1:].expand(-1, size - rows.shape[1])], 1)


def _rows(table: RangeTable, gates: int) -> Tensor:
    return torch.zeros(gates, dtype=torch.int32) if table.rows is None else table.rows


def level_of(gates: Tensor, count: Tensor) -> Tensor:
    """The level of each gate: the k-th bit-width (counted from 0) iff `k < gate <= k + 1`.

    Args:
        gates: Shape (gates,), within 1/2 and `count + 1/2`.
        count: Shape (gates,): number of levels of each.
    """
    return torch.minimum((gates.ceil().long() - 1).clamp(min=0), count - 1)
