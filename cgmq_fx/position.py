"""Where a run stands in its epochs and its data, so that it can go on from there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from cgmq_fx.random_state import RandomState


@dataclass
class Position:
    """A place in the data.

    Attributes:
        total: Sum of the losses of this epoch so far.
        sources: What batches come from, for training and for validation.
        epoch: The epoch, counted from 1.
        batch: Batches of it that are done.
        last: The last one that was.
    """

    total: Tensor
    sources: Sequence[Any] = ()
    epoch: int = 1
    batch: int = 0
    last: Any = None
    _start: RandomState | None = field(default=None, init=False)
    _resumed: RandomState | None = field(default=None, init=False)

    def batches(self, data: Iterable[Any]) -> Iterator[Any]:
        """The batches of this epoch that are not done.

        After `load_state_dict` the epoch is begun again from the random state that it began with,
        and what was done is skipped, so that a shuffled loader goes on with the same order.
        """
        if isinstance(data, DataLoader) and isinstance(data.sampler, DistributedSampler):
            data.sampler.set_epoch(self.epoch)  # its order depends on that alone
        if self._start is None or self._resumed is None:
            self._start = RandomState.of(self.sources)
            return iter(data)
        self._start.restore(self.sources)
        batches = iter(data)
        for batch in islice(batches, self.batch):
            self.last = batch
        self._resumed.restore(self.sources)
        return batches

    def advance(self) -> None:
        """Go to the beginning of the next epoch."""
        self.total, self.batch = torch.zeros_like(self.total), 0
        self.epoch, self.last = self.epoch + 1, None
        self._start = self._resumed = None

    def state_dict(self) -> dict[str, Any]:
        """This place and the random states now and at the beginning of the epoch."""
        return {
            "total": self.total,
            "epoch": self.epoch,
            "batch": self.batch,
            "start": None if self._start is None else asdict(self._start),
            "now": asdict(RandomState.of(self.sources)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the place that `state_dict` gave, in the same data.

        Raises:
            ValueError: If the data has other generators.
        """
        self.total = state["total"].to(self.total.device)
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])
        now = RandomState(**state["now"])
        now.restore(self.sources)
        if state["start"] is not None:
            self._start, self._resumed = RandomState(**state["start"]), now
