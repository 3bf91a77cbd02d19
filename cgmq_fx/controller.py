"""The controller: moves gates step by step so that the budget holds in the end.

Per step, while a constraint is violated, every gate that its cost depends on falls with a speed
between `SLOWEST` and 1; while all hold, gates rise. The step length follows from the length of the
search, so that the slowest gate crosses its whole range within half of it: the bound is reached
after at most `reach` steps, whatever the model, the loss scale or the batch size.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cgmq_fx.calibrate import RangeTable
from cgmq_fx.cost_models import (
    Assignment,
    BitArray,
    Budget,
    ConstraintState,
    GraphFacts,
    Ledger,
    idle_gates,
    lowest_bits,
    relevance,
)
from cgmq_fx.cost_models.errors import CheckpointError, OptionError
from cgmq_fx.directions import Direction, GateView, speeds
from cgmq_fx.gates import GateLayout, Levels, level_of
from cgmq_fx.marginals import Marginals
from cgmq_fx.passes.kernel import Statistic
from cgmq_fx.passes.processes import Averages
from cgmq_fx.passes.quantizer import Quantizer
from cgmq_fx.projection import Projection
from cgmq_fx.readout import Readout
from cgmq_fx.settings import Settings

SLOWEST = 0.25
"""Speed of the slowest falling gate as a share of the fastest possible."""

_REACH = 0.5
"""Share of the search within which the slowest gate crosses its whole range."""

_MEMORY = 0.05
"""Share of the search over which sensitivities are smoothed."""

_TINY = 1e-30


class Controller:
    """Owns the gates and moves them.

    Args:
        quantizers: The quantizers of the graph by name.
        facts: The graph's facts.
        budget: What must hold; it has been checked to be feasible.
        tables: The calibrated ranges of every quantizer.
        direction: Which way gates move.
        steps: Length of the search.
    """

    def __init__(
        self,
        quantizers: Mapping[str, Quantizer],
        facts: GraphFacts,
        budget: Budget,
        tables: Mapping[str, RangeTable],
        direction: Direction,
        steps: int,
    ) -> None:
        if steps < 1:
            raise OptionError(f"the search needs at least one step, not {steps}")
        self.direction = direction
        self.steps = steps
        self.layout = GateLayout.of(facts.quantizers, tables)
        self._quantizers = [quantizers[q.name] for q in self.layout.quantizers]
        self._tables = [tables[q.name] for q in self.layout.quantizers]
        averages = Averages()
        for quantizer in self._quantizers:
            quantizer.observe(direction.statistic, averages)
        count = self.layout.count
        self.gates = count.float()
        self._levels = count - 1
        self._pace = float(count.max()) / (SLOWEST * _REACH * steps)
        relevant = relevance(facts, budget)
        flags = torch.tensor([relevant[q.name] for q in self.layout.quantizers])
        self._relevant = flags[self.layout.owner]
        self._helping: dict[tuple[int, ...], Tensor] = {}
        self._sensitivity = self._prior()
        self.taken = 0
        self._best: Levels | None = None
        self.frozen = False
        self.ledger = Ledger(facts, budget, self.layout.assignment(self._levels.numpy()))
        self._marginals = Marginals(self.layout, self.ledger, steps)
        self._readout = Readout(self._quantizers, direction.statistic)
        self._slopes = self.layout.slopes(self._levels)
        self._ceiling = self._reachable()
        self._settings = Settings(self._quantizers, self._tables, self.layout)
        self._settings.write(self._levels)

    @property
    def reach(self) -> int:
        """Steps after which the budget holds at the latest, counted from any state."""
        return ceil(float(self.layout.count.max()) / (SLOWEST * self._pace))

    @property
    def satisfied(self) -> bool:
        """Whether the budget holds for the current bits."""
        return self.ledger.satisfied

    @property
    def states(self) -> tuple[ConstraintState, ...]:
        """The current measurement of every constraint."""
        return self.ledger.states()

    @property
    def levels(self) -> Levels:
        """The level of every gate."""
        return self._levels.numpy()

    @property
    def assignment(self) -> dict[str, BitArray]:
        """The current bits of every quantizer."""
        return self.layout.assignment(self._levels.numpy())

    @property
    def sensitivity(self) -> Tensor:
        """Smoothed estimate of the loss per unit of the layout's harm, one entry per gate."""
        return self.layout.worth(self._sensitivity)

    def start(self, bits: Assignment) -> None:
        """Put the gates where they give these bits; those of quantizers without any stay."""
        levels = self._levels.clone()
        for _, facts, part in self.layout:
            if facts.name in bits and bits[facts.name].size == facts.gates:
                found = np.searchsorted(facts.bit_widths, bits[facts.name])
                levels[part] = torch.from_numpy(np.minimum(found, len(facts.bit_widths) - 1))
        self.gates = levels + 0.5
        self._settle(levels)

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes while gates move: tensors, numbers and None, by name."""
        return {
            "gates": self.gates.clone(),
            "levels": self._levels.clone(),
            "sensitivity": self._sensitivity.clone(),
            "best": None if self._best is None else torch.from_numpy(self._best.copy()),
            "marginals": self._marginals.state_dict(),
            "readout": self._readout.state_dict(),
            "taken": self.taken,
            "frozen": self.frozen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` of a controller of the same graph and budget gave.

        Quantizers get their bits; ranges move along their tables, trained offsets are the graph's.

        Raises:
            ValueError: If the state is that of another graph.
            CheckpointError: If its bit-widths are frozen outside of the budget.
        """
        levels, gates, sensitivity = state["levels"], state["gates"], state["sensitivity"]
        best = state["best"]
        flat = [levels, gates, sensitivity, *([] if best is None else [best])]
        if any(t.shape != self.gates.shape for t in flat):
            raise ValueError("the gates in the state are not those of this graph")
        if bool(((levels < 0) | (levels >= self.layout.count)).any()):
            raise ValueError("the state has levels that no gate can take")
        if state["frozen"] is True:
            self._check_frozen(levels)
        self._settle(levels)
        self.gates, self._sensitivity = gates.clone(), sensitivity.clone()
        self._best = None if best is None else best.numpy().copy()
        self._marginals.load_state_dict(state["marginals"])
        self._readout.load_state_dict(state["readout"])
        self.taken = int(state["taken"])
        if state["frozen"] is True:
            self._end()

    def step(self) -> None:
        """Move the gates by what the last backward pass reported; after the search, freeze."""
        if self.frozen:
            return
        view = self._view(self._readout.take())
        self._smooth(self.direction.sensitivity(view))
        view = self._view(view.rows)
        self.gates = self._bounded(self.gates - self._pace * self._speed(view))
        self._settle(level_of(self.gates, self.layout.count))
        self.taken += 1
        if self.taken >= self.steps:
            self.freeze()

    def fix(self, bits: Mapping[str, npt.ArrayLike]) -> None:
        """End the search with bit-widths of one's own.

        Raises:
            OptionError: If they do not satisfy the budget, if they are not bit-widths that the
                quantizers of these names may have, or if the search has ended already. Gates stay
                as they were then.
        """
        if self.frozen:
            raise OptionError("the bit-widths are frozen already")
        given = self._checked(bits)
        if broken := self._broken({**self.assignment, **given}):
            raise OptionError(f"these bit-widths do not satisfy the budget: {broken}")
        self.start(given)
        self._settle(torch.from_numpy(self._without_pruned(self.levels)))
        self._end()

    def _broken(self, assignment: Assignment) -> str:
        """The constraints that an assignment breaks, in words; empty if it satisfies all."""
        states = Ledger(self.ledger.graph, self.ledger.budget, assignment).states()
        return ", ".join(str(state) for state in states if not state.satisfied)

    def _check_frozen(self, levels: Tensor) -> None:
        if broken := self._broken(self.layout.assignment(levels.numpy())):
            raise CheckpointError(
                "the state is that of another budget: its bit-widths are frozen, and do not "
                f"satisfy this one: {broken}; load it before they are frozen, or where the budget "
                "is the same"
            )

    def _checked(self, bits: Mapping[str, npt.ArrayLike]) -> dict[str, BitArray]:
        if not isinstance(bits, Mapping):
            raise OptionError(f"bit-widths are given by the names of quantizers, not as {bits!r}")
        known = self.ledger.graph.quantizers
        found = {}
        for name, own in bits.items():
            if name not in known:
                close = get_close_matches(name, known, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise OptionError(f"there is no quantizer named {name!r}{hint}")
            facts, given = known[name], np.asarray(own)
            if given.size not in (1, facts.gates):
                raise OptionError(
                    f"{name} has {facts.gates} gates; bit-widths for {given.size} were given"
                )
            if not np.isin(given, facts.bit_widths).all():
                raise OptionError(
                    f"the bit-widths of {name} are {facts.bit_widths}, not {given.tolist()}"
                )
            found[name] = np.full(facts.gates, given.reshape(-1), dtype=np.int64)
        return found

    def freeze(self) -> None:
        """End the search with the best assignment that satisfies the budget and leaves no slack."""
        if self.frozen:
            return
        starts = (
            [self._levels.numpy()] if self._best is None else [self._levels.numpy(), self._best]
        )
        projected = [self._projected(levels) for levels in starts]
        worth = self.sensitivity
        best = min(projected, key=lambda p: self.layout.loss(torch.from_numpy(p), worth))
        self._settle(torch.from_numpy(self._without_pruned(best)))
        self._end()

    def _without_pruned(self, levels: Levels) -> Levels:
        """The levels with the gates that meet only pruned channels at their lowest.

        They carry nothing, but would set the grid of the biases behind them.
        """
        levels = levels.copy()
        parts = {facts.name: part for _, facts, part in self.layout}
        for node in self.ledger.graph.nodes:
            for name, idle in idle_gates(node, self.layout.assignment(levels)):
                levels[parts[name]][idle] = 0
        return levels

    def _end(self) -> None:
        for quantizer in self._quantizers:
            quantizer.observe(Statistic.NONE)
        self._settings.release()
        self.frozen = True

    def _projected(self, levels: Levels) -> Levels:
        levels = levels.copy()
        ledger = Ledger(self.ledger.graph, self.ledger.budget, self.layout.assignment(levels))
        weight = self.sensitivity.double().numpy()
        return Projection(self.layout, ledger, levels, weight).run()

    def _prior(self) -> Tensor:
        """Sensitivities before the first backward pass: errors count relative to the values."""
        power = torch.tensor([max(t.power, _TINY) for t in self._tables], dtype=torch.float32)
        gates = torch.tensor([q.gates for q in self.layout.quantizers], dtype=torch.float32)
        return (1 / (power * gates))[self.layout.owner]

    def _reachable(self) -> Tensor:
        """Per gate, the highest value at which the budget holds with all others at their lowest.

        A gate that rises further could only be taken back: nothing that satisfies has it there.
        """
        lowest = Ledger(self.ledger.graph, self.ledger.budget, lowest_bits(self.ledger.graph))
        ceiling = torch.ones_like(self.gates)
        for index, facts, part in self.layout:
            levels = np.zeros(facts.gates, dtype=np.int64)
            for level in range(len(facts.bit_widths)):
                levels[0] = level
                if not lowest.fits(lowest.trial(facts.name, self.layout.bits_of(index, levels))):
                    break
                ceiling[part] = level + 1
        return torch.where(ceiling == self.layout.count, ceiling + 0.5, ceiling)

    def _view(self, rows: Tensor) -> GateView:
        down, up = self._marginals.at(self._levels.numpy(), self.taken)
        slopes, worth = self._slopes, self.sensitivity
        return GateView(
            rows=rows,
            sensitivity=worth,
            loss_down=worth * slopes.down,
            loss_up=worth * slopes.up,
            cost_down=down,
            cost_up=up,
            change=slopes.change,
            elements=self.layout.elements,
        )

    def _smooth(self, estimate: Tensor) -> None:
        rate = max(1 / (self.taken + 1), 1 / max(1.0, _MEMORY * self.steps))
        estimate = torch.nan_to_num(estimate, posinf=3e38).clamp(min=0)
        self._sensitivity = torch.lerp(self._sensitivity, estimate, rate)

    def _speed(self, view: GateView) -> Tensor:
        """Positive where gates fall, negative where they rise, 0 where they stay."""
        violated = self.ledger.violated
        if violated:
            if violated not in self._helping:
                self._helping[violated] = self._relevant[:, list(violated)].any(1).float()
            return self._helping[violated] * speeds(self.direction.fall(view), SLOWEST)
        return -speeds(self.direction.rise(view), 0.0)

    def _bounded(self, gates: Tensor) -> Tensor:
        """Within half a level of either end, and not risen to a level that nothing can pay for."""
        risen = torch.minimum(gates, torch.maximum(self.gates, self._ceiling))
        return torch.minimum(risen.clamp(min=0.5), self.layout.count + 0.5)

    def _settle(self, levels: Tensor) -> None:
        """Take over new levels: costs, bits, ranges, and the best state so far."""
        changed = levels != self._levels
        if not bool(changed.any()):
            return
        self._levels = levels
        self._slopes = self.layout.slopes(levels)
        self.ledger.assign(self.layout.widths_at(levels).numpy())
        self._marginals.moved(changed)
        self._settings.write(levels)
        if self.ledger.satisfied and self._better(levels):
            self._best = levels.numpy().copy()

    def _better(self, levels: Tensor) -> bool:
        if self._best is None:
            return True
        worth = self.sensitivity
        best = self.layout.loss(torch.from_numpy(self._best), worth)
        return self.layout.loss(levels, worth) <= best
