"""Projection: from any assignment to one that satisfies the budget and leaves no slack.

Gates fall one level at a time, the one with the least estimated loss per cost freed first, until
the budget holds; then gates rise, the one with the most loss saved per cost taken first, until none
fits any more. Quantizers with many gates move them in portions. Costs are monotone in the bits, so
what did not fit once never fits later, and the first half always ends: at the latest with every
gate at its lowest level, which satisfies any budget that was accepted.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np
import numpy.typing as npt

from cgmq_fx.cost_models.ledger import Ledger
from cgmq_fx.gates import GateLayout, Levels

_PORTIONS = 64
_EXHAUSTIVE = 256
_SAMPLE = 16
_ZERO = 1e-300

Move = tuple[int, int]
"""Quantizer number and the level that its gates leave."""


@dataclass
class Projection:
    """An assignment being moved into the budget.

    Attributes:
        layout: The gates.
        ledger: The costs, at the bits of `levels`.
        levels: One entry per gate; changed in place.
        sensitivity: Estimated loss per squared step, one entry per gate.
    """

    layout: GateLayout
    ledger: Ledger
    levels: Levels
    sensitivity: npt.NDArray[np.float64]
    _noise: npt.NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self._noise = self.layout.noise.double().numpy()

    def run(self) -> Levels:
        """Project and fill; the levels that satisfy the budget."""
        self.lower()
        self.fill()
        return self.levels

    def lower(self) -> None:
        """Lower gates until the budget holds."""
        heap = [entry for move in self._moves(-1) if (entry := self._entry(move, -1))]
        heapq.heapify(heap)
        while not self.ledger.satisfied and heap:
            entry = self._entry(heapq.heappop(heap)[1], -1)
            if entry is None:
                continue
            if heap and entry[0] > heap[0][0]:
                heapq.heappush(heap, entry)
                continue
            move = entry[1]
            self._apply(move, -1, self._chosen(move, -1))
            for follow in (move, (move[0], move[1] - 1)):
                if follow != move or self._count(move):
                    heapq.heappush(heap, (-inf, follow))

    def fill(self) -> None:
        """Raise gates while the budget still holds afterwards."""
        heap = [entry for move in self._moves(1) if (entry := self._entry(move, 1))]
        heapq.heapify(heap)
        while heap:
            entry = self._entry(heapq.heappop(heap)[1], 1)
            if entry is None:
                continue
            if heap and entry[0] > heap[0][0]:
                heapq.heappush(heap, entry)
                continue
            move = entry[1]
            if self._raise(move):
                heapq.heappush(heap, (-inf, move))
                heapq.heappush(heap, (-inf, (move[0], move[1] + 1)))

    def _moves(self, step: int) -> list[Move]:
        return [
            (i, level)
            for i, q, _ in self.layout
            for level in range(len(q.bit_widths))
            if 0 <= level + step < len(q.bit_widths)
        ]

    def _part(self, move: Move) -> Levels:
        starts = self.layout.starts
        return self.levels[starts[move[0]] : starts[move[0] + 1]]

    def _count(self, move: Move) -> int:
        return int(np.count_nonzero(self._part(move) == move[1]))

    def _chosen(self, move: Move, step: int, most: int | None = None) -> npt.NDArray[np.intp]:
        """The gates to move: a portion, those with the least loss down or the most loss up."""
        part = self._part(move)
        at_level = np.flatnonzero(part == move[1])
        portion = most or max(1, part.size // _PORTIONS)
        if at_level.size <= portion:
            return at_level
        start = self.layout.starts[move[0]]
        weight = self.sensitivity[start + at_level] * -step
        return at_level[np.argpartition(weight, portion - 1)[:portion]]

    def _entry(self, move: Move, step: int) -> tuple[float, Move] | None:
        """Priority (smallest first) of a move at the current costs, or None if it is void."""
        widths = self.layout.quantizers[move[0]].bit_widths
        if not 0 <= move[1] + step < len(widths):
            return None
        chosen = self._chosen(move, step)
        if chosen.size == 0:
            return None
        loss = self._loss(move, step, chosen)
        cost = self._cost(self._trial(move, step, chosen), step)
        if step < 0:
            return (loss / cost if cost > 0 else 1e300 * (1 + loss)), move
        return -(loss / max(cost, _ZERO)), move

    def _loss(self, move: Move, step: int, chosen: npt.NDArray[np.intp]) -> float:
        """Loss added by falling, or saved by rising."""
        noise = self._noise[move[0]]
        start = self.layout.starts[move[0]]
        change = abs(noise[move[1] + step] - noise[move[1]])
        return float(self.sensitivity[start + chosen].sum() * change)

    def _cost(self, totals: Sequence[float], step: int) -> float:
        """Cost freed in violated constraints, or taken in all, as a share of the bounds."""
        ledger = self.ledger
        counted = ledger.violated if step < 0 else range(len(ledger.limits))
        limits = ledger.limits
        return sum(abs(totals[c] - ledger.totals[c]) / limits[c] for c in counted if limits[c])

    def _moved(self, move: Move, step: int, chosen: npt.NDArray[np.intp]) -> Levels:
        part = self._part(move).copy()
        part[chosen] += step
        return part

    def _trial(self, move: Move, step: int, chosen: npt.NDArray[np.intp]) -> tuple[float, ...]:
        name = self.layout.quantizers[move[0]].name
        bits = self.layout.bits_of(move[0], self._moved(move, step, chosen))
        return self.ledger.trial(name, bits)

    def _apply(self, move: Move, step: int, chosen: npt.NDArray[np.intp]) -> None:
        self._part(move)[:] = self._moved(move, step, chosen)
        name = self.layout.quantizers[move[0]].name
        self.ledger.move(name, self.layout.bits_of(move[0], self._part(move)))

    def _raise(self, move: Move) -> bool:
        """Raise as large a portion as fits; False if not even one gate does."""
        chosen = self._chosen(move, 1)
        while chosen.size:
            if self.ledger.fits(self._trial(move, 1, chosen)):
                self._apply(move, 1, chosen)
                return True
            if chosen.size == 1:
                return self._raise_any(move)
            chosen = self._chosen(move, 1, chosen.size // 2)
        return False

    def _raise_any(self, move: Move) -> bool:
        """Raise any one gate that fits: gates of one quantizer can differ in what they meet.

        Of very many gates only some are tried, spread over the tensor.
        """
        at_level = np.flatnonzero(self._part(move) == move[1])
        if at_level.size > _EXHAUSTIVE:
            at_level = at_level[:: at_level.size // _SAMPLE]
        for gate in at_level:
            chosen = np.array([gate])
            if self.ledger.fits(self._trial(move, 1, chosen)):
                self._apply(move, 1, chosen)
                return True
        return False
