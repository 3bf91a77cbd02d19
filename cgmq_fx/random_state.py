"""The state of everything random that training can draw from, to be resumed later."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader


@dataclass(frozen=True)
class RandomState:
    """The states of all generators at one moment.

    Attributes:
        torch: The default generator of PyTorch.
        cuda: Those of the CUDA devices, if any has been used.
        python: The one of Python's `random`.
        numpy: The one of numpy's global functions.
        loaders: Those that data loaders and their samplers own.
    """

    torch: Tensor
    cuda: list[Tensor]
    python: tuple[Any, ...]
    numpy: dict[str, Any]
    loaders: list[Tensor]

    @staticmethod
    def of(sources: Iterable[Any]) -> RandomState:
        """The states now.

        Args:
            sources: What batches come from; of a `DataLoader` the generators are known.
        """
        return RandomState(
            torch.get_rng_state(),
            torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            random.getstate(),
            dict(np.random.get_state(legacy=False)),
            [generator.get_state() for generator in _generators(sources)],
        )

    def restore(self, sources: Iterable[Any]) -> None:
        """Put every generator back to where it was.

        Raises:
            ValueError: If there are not as many generators, or one has another kind of state.
        """
        torch.set_rng_state(self.torch)
        if self.cuda and torch.cuda.is_initialized():
            torch.cuda.set_rng_state_all(self.cuda)
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        for generator, state in zip(_generators(sources), self.loaders, strict=True):
            generator.set_state(state)


def _generators(sources: Iterable[Any]) -> Iterator[torch.Generator]:
    """The generators of every `DataLoader`, each once."""
    owners: list[Any] = []
    for source in sources:
        if isinstance(source, DataLoader):
            batches = source.batch_sampler
            owners += [source, source.sampler, batches, getattr(batches, "sampler", None)]
    found = [getattr(owner, "generator", None) for owner in owners]
    yield from {id(g): g for g in found if isinstance(g, torch.Generator)}.values()
