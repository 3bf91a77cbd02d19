"""Projection: from any assignment to one that satisfies the budget and leaves no slack.

Gates fall one level at a time, the one with the least estimated loss per cost freed first, until
the budget holds; then gates rise, the one with the most loss saved per cost taken first, until none
fits any more. Quantizers with many gates move them in portions. Costs are monotone in the bits, so
what did not fit once never fits later, and the first part always ends: at the latest with every
gate at its lowest level, which satisfies any budget that was accepted.

Greedy moves leave a large tensor low when the last small ones have taken what it needs. So in the
end gates are exchanged: one that matters rises, and others fall for it, while that reduces the
loss. Budget and lack of slack hold after every exchange.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
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
_ROUNDS = 32
_WORK = 50_000
"""Most trials of all exchanges together; one of a quantizer with many gates counts as several."""

_UNIT = 2048
_LEAST = 1e-3
"""Least share of the loss that an exchange must be able to save to be tried."""

_HOPE = 2.0
"""Tried if the gates that must fall are estimated to lose at most so many times what is saved."""

Move = tuple[int, int]
"""Quantizer number and the level that its gates leave."""

Entry = tuple[float, Move]
"""Priority of a move, the smallest first, and the move."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Falls:
    """What the moves down by one level do, measured one by one.

    Attributes:
        moves: The moves.
        owner: Shape (moves,): the quantizer.
        loss: Shape (moves,): loss that is added.
        freed: Shape (moves, constraints): cost that is freed, as a share of the bounds.
    """

    moves: list[Move]
    owner: npt.NDArray[np.intp]
    loss: Floats
    freed: Floats

    def cheapest(self, missing: Floats, without: int) -> tuple[list[Entry], float]:
        """The moves by loss per cost freed, and a floor of the loss of freeing what is missing.

        The floor leaves out the last move that is needed.

        Args:
            missing: Shape (constraints,): what is above each bound, as a share of it.
            without: A quantizer that shall stay.
        """
        over = missing > 0
        freed = self.freed[:, over]
        total = np.where(self.owner == without, 0.0, freed.sum(1))
        useful = np.flatnonzero(total > 0)
        score = self.loss[useful] / total[useful]
        order = np.argsort(score, kind="stable")
        enough = (freed[useful[order]].cumsum(0) >= missing[over]).all(1)
        count = int(enough.argmax()) if enough.any() else order.size
        entries = [(float(score[i]), self.moves[useful[i]]) for i in order]
        return entries, float(self.loss[useful[order[:count]]].sum())


@dataclass
class Projection:
    """An assignment being moved into the budget.

    Attributes:
        layout: The gates.
        ledger: The costs, at the bits of `levels`.
        levels: One entry per gate; changed in place.
        sensitivity: Estimated loss per unit of the layout's harm, one entry per gate.
    """

    layout: GateLayout
    ledger: Ledger
    levels: Levels
    sensitivity: Floats
    _harm: Floats = field(init=False)
    _owner: npt.NDArray[np.int64] = field(init=False)
    _row: npt.NDArray[np.int32] = field(init=False)
    _shares: Floats = field(init=False)
    _work: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._harm = self.layout.harm.double().numpy()
        self._owner = self.layout.owner.numpy()
        self._row = self.layout.row.numpy()
        limits = np.array(self.ledger.limits)
        self._shares = 1 / np.where(limits > 0, limits, 1.0)

    def run(self) -> Levels:
        """Project, fill and exchange; the levels that satisfy the budget."""
        self.lower()
        self.fill()
        self.exchange()
        return self.levels

    def lower(self) -> None:
        """Lower gates until the budget holds."""
        self._lower([entry for move in self._moves(-1) if (entry := self._entry(move, -1))], inf)

    def exchange(self) -> None:
        """Raise gates and lower others for them, while that reduces the loss."""
        end = self._work + _WORK
        for _ in range(_ROUNDS):
            falls, least, improved = self._falls(), _LEAST * self._total(), False
            rises = [(self._loss(m, s, self._chosen(m, s)), m, s) for m, s in self._rises()]
            for gain, move, step in sorted(rises, reverse=True):
                if gain <= least or self._work > end:
                    break
                improved |= self._exchanged(move, step, falls)
            if not improved:
                return
            self.fill()

    def _rises(self) -> list[tuple[Move, int]]:
        """Every move up with its step; by several levels where there is one gate."""
        return [
            ((i, level), step)
            for i, q, _ in self.layout
            for level in range(len(q.bit_widths) - 1)
            if self._count((i, level))
            for step in range(1, len(q.bit_widths) - level if q.gates == 1 else 2)
        ]

    def _falls(self) -> _Falls:
        before = np.array(self.ledger.totals)
        moves = [m for m in self._moves(-1) if self._count(m)]
        chosen = [self._chosen(m, -1) for m in moves]
        after = [self._trial(m, -1, c) for m, c in zip(moves, chosen, strict=True)]
        freed = (before - np.array(after).reshape(len(moves), before.size)) * self._shares
        loss = [self._loss(m, -1, c) for m, c in zip(moves, chosen, strict=True)]
        owner = np.array([m[0] for m in moves], dtype=np.intp)
        return _Falls(moves, owner, np.array(loss), freed)

    def _exchanged(self, move: Move, step: int, falls: _Falls) -> bool:
        """Raise by `step`, lower others until the budget holds; undone unless that pays."""
        chosen = self._chosen(move, step)
        if not chosen.size:
            return False
        gain = self._loss(move, step, chosen)
        missing = (np.array(self._trial(move, step, chosen)) - self.ledger.limits) * self._shares
        heap, loss = falls.cheapest(missing, move[0])
        if loss > _HOPE * gain:
            return False
        saved, before = self.levels.copy(), self._total()
        self._apply(move, step, chosen)
        fallen = self._lower(heap, gain)
        if self.ledger.satisfied:
            self.fill((i, level - 1) for i, level in fallen)
            if self._total() < before * (1 - _LEAST):
                return True
        self._restore(saved)
        return False

    def _restore(self, saved: Levels) -> None:
        for index in np.unique(self._owner[self.levels != saved]).tolist():
            part = slice(*self.layout.starts[index : index + 2])
            self.levels[part] = saved[part]
            name = self.layout.quantizers[index].name
            self.ledger.move(name, self.layout.bits_of(index, saved[part]))

    def _total(self) -> float:
        """The loss that the levels are estimated to add."""
        return float((self.sensitivity * self._harm[self._row, self.levels]).sum())

    def _lower(self, heap: list[Entry], most: float) -> list[Move]:
        """Lower gates until the budget holds, by moves that together lose less than `most`."""
        heapq.heapify(heap)
        made, lost = [], 0.0
        while not self.ledger.satisfied and heap:
            entry = self._entry(heapq.heappop(heap)[1], -1)
            if entry is None:
                continue
            if heap and entry[0] > heap[0][0]:
                heapq.heappush(heap, entry)
                continue
            move = entry[1]
            chosen = self._chosen(move, -1)
            loss = self._loss(move, -1, chosen)
            if lost + loss >= most:
                continue
            lost += loss
            made.append(move)
            self._apply(move, -1, chosen)
            for follow in (move, (move[0], move[1] - 1)):
                if follow != move or self._count(move):
                    heapq.heappush(heap, (-inf, follow))
        return made

    def fill(self, moves: Iterable[Move] | None = None) -> None:
        """Raise gates while the budget still holds afterwards: all, or those of some moves."""
        wanted = self._moves(1) if moves is None else dict.fromkeys(moves)
        heap = [entry for move in wanted if (entry := self._entry(move, 1))]
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
        weight = self._losses(move, step, at_level) * (1 if step < 0 else -1)
        return at_level[np.argpartition(weight, portion - 1)[:portion]]

    def _entry(self, move: Move, step: int) -> Entry | None:
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
        return float(self._losses(move, step, chosen).sum())

    def _losses(self, move: Move, step: int, chosen: npt.NDArray[np.intp]) -> Floats:
        """Loss added or saved by each gate."""
        gates = self.layout.starts[move[0]] + chosen
        noise = self._harm[self._row[gates]]
        change = np.abs(noise[:, move[1] + step] - noise[:, move[1]])
        found: Floats = self.sensitivity[gates] * change
        return found

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
        facts = self.layout.quantizers[move[0]]
        self._work += 1 + facts.gates // _UNIT
        bits = self.layout.bits_of(move[0], self._moved(move, step, chosen))
        return self.ledger.trial(facts.name, bits)

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
