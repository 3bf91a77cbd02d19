"""What one level more or less of each gate would cost, kept up to date as gates move."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cgmq_fx.cost_models import GraphFacts, Ledger
from cgmq_fx.gates import GateLayout, Levels

_REFRESH = 0.005
"""Share of the search after which costs are computed again, if bits have changed."""

_TURNS = 16
"""Quantizers per step whose share of a total that is no sum over nodes is computed again."""


class Marginals:
    """Per gate, the cost that one level less frees and one more takes, as shares of the bounds.

    What can be looked up, mostly quantizers with one gate, is, all at once. Of the others, where
    costs are sums over nodes, only gates that meet what has moved are computed again; else all are,
    in turns, so that a step stays cheap however many there are.

    Args:
        layout: The gates.
        ledger: The running costs.
        steps: Length of the search.
    """

    def __init__(self, layout: GateLayout, ledger: Ledger, steps: int) -> None:
        self._layout = layout
        self._ledger = ledger
        self._wait = max(1, int(_REFRESH * steps))
        widths = layout.widths.numpy()
        lookup = ~np.isnan(ledger.alone(widths[:, 0])).any(0)
        self._looked_up = np.flatnonzero(lookup)
        self._first = np.array(layout.starts[:-1], dtype=np.intp)  # every quantizer's first gate
        self._last = layout.count.numpy()[self._first] - 1
        self._neighbours = _neighbours(ledger.graph, layout, set(np.flatnonzero(~lookup).tolist()))
        self._moved = True
        everything = range(len(layout.quantizers))
        self._stale = set(np.flatnonzero(~lookup).tolist())
        self._turns = deque(everything)
        self._waiting: set[int] = set()
        size = (len(ledger.limits), int(layout.starts[-1]))
        self._costs: dict[int, npt.NDArray[np.float64]] = {s: np.zeros(size) for s in (-1, 1)}
        self._violated: tuple[int, ...] = ()
        self._current: tuple[Tensor, Tensor] | None = None

    def moved(self, changed: Tensor) -> None:
        """Take note that the bits of some gates, shape (gates,), have changed."""
        self._moved = True
        if self._neighbours:
            owners = self._layout.owner[changed].unique().tolist()
            for index in self._neighbours.keys() & owners:
                self._stale |= self._neighbours[index]
        if not self._ledger.additive:
            self._waiting = set(self._turns)

    def at(self, levels: Levels, step: int) -> tuple[Tensor, Tensor]:
        """The cost freed in the violated constraints, and the cost taken in all.

        Args:
            levels: The current levels.
            step: Number of the step; not in every step costs are computed again.

        Returns:
            Two tensors of shape (gates,).
        """
        violated = self._ledger.violated
        other = self._current is None or violated != self._violated
        due = step % self._wait == 0 and bool(self._moved or self._stale or self._waiting)
        if self._current is None or due:
            self._refresh(levels)
        if self._current is None or other or due:
            counted = list(violated or range(len(self._ledger.limits)))
            freed, taken = self._costs[-1][counted].sum(0), self._costs[1].sum(0)
            self._current = torch.from_numpy(freed).float(), torch.from_numpy(taken).float()
            self._violated = violated
        return self._current

    def state_dict(self) -> dict[str, Any]:
        """What has been computed and what waits for it, by name."""
        return {
            "freed": torch.from_numpy(self._costs[-1].copy()),
            "taken": torch.from_numpy(self._costs[1].copy()),
            "stale": sorted(self._stale),
            "waiting": sorted(self._waiting),
            "turns": list(self._turns),
            "violated": list(self._violated),
            "current": None if self._current is None else list(self._current),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: If the state is that of another graph or budget.
        """
        costs = {-1: state["freed"].numpy().copy(), 1: state["taken"].numpy().copy()}
        current, turns = state["current"], state["turns"]
        known = set(range(len(self._layout.quantizers)))
        gates = [] if current is None else [tuple(c.shape) for c in current]
        if (
            any(own.shape != costs[step].shape for step, own in self._costs.items())
            or set(turns) != known
            or not known >= {*state["stale"], *state["waiting"]}
            or any(shape != self._costs[1].shape[1:] for shape in gates)
        ):
            raise ValueError("the costs in the state are not those of this graph and budget")
        self._costs, self._turns = costs, deque(turns)
        self._stale, self._waiting, self._moved = set(state["stale"]), set(state["waiting"]), True
        self._violated = tuple(state["violated"])
        self._current = None if current is None else (current[0].clone(), current[1].clone())

    def _refresh(self, levels: Levels) -> None:
        for _ in range(min(len(self._waiting), _TURNS * self._wait)):
            while self._turns[0] not in self._waiting:
                self._turns.rotate(-1)
            self._waiting.discard(self._turns[0])
            self._stale.add(self._turns[0])
        limits = np.array(self._ledger.limits)
        limits[limits == 0] = 1.0  # a share of a cost that is always 0
        if self._moved:
            self._look_up(levels, limits)
        for index in self._stale:
            self._measure(index, levels, limits)
        self._stale, self._moved = set(), False

    def _look_up(self, levels: Levels, limits: npt.NDArray[np.float64]) -> None:
        """The costs of the quantizers whose one gate is all that has to be known."""
        chosen, here = self._looked_up, levels[self._first]
        widths, rows = self._layout.widths.numpy(), np.arange(here.size)
        for step, costs in self._costs.items():
            change = self._ledger.alone(widths[rows, np.clip(here + step, 0, self._last)])
            costs[:, self._first[chosen]] = np.abs(change[:, chosen]) / limits[:, None]

    def _measure(self, index: int, levels: Levels, limits: npt.NDArray[np.float64]) -> None:
        facts = self._layout.quantizers[index]
        part = slice(*self._layout.starts[index : index + 2])
        own = levels[part]
        for level in np.unique(own).tolist() if own.size > 1 else own.tolist():
            at = own == level
            one = int(at.argmax())
            for step, costs in self._costs.items():
                share = np.zeros(limits.size)
                if 0 <= level + step < len(facts.bit_widths):
                    moved = own.copy()
                    moved[one] += step
                    bits = self._layout.bits_of(index, moved)
                    share = np.abs(self._ledger.change(facts.name, bits)) / limits
                costs[:, part][:, at] = share[:, None]


def _neighbours(graph: GraphFacts, layout: GateLayout, asked: set[int]) -> dict[int, set[int]]:
    """For every quantizer, those of `asked` that some node reads together with it, or itself."""
    number = {q.name: i for i, q in enumerate(layout.quantizers)}
    of_node: dict[int, set[int]] = {}
    for name, nodes in graph.readers.items():
        for node in nodes:
            of_node.setdefault(node, set()).add(number[name])
    met = {
        i: asked & {i}.union(*(of_node[node] for node in graph.readers[q.name]))
        for i, q in enumerate(layout.quantizers)
    }
    return {i: found for i, found in met.items() if found}
