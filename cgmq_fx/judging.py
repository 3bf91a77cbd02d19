"""What losses and metrics say, checked to be numbers, and their means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cgmq_fx.calibrate import unchanged_buffers
from cgmq_fx.cost_models.errors import DataError
from cgmq_fx.random_state import RandomState
from cgmq_fx.together import summed
from cgmq_fx.training import Loss, Metric


class Means:
    """Running means by name."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, name: str, value: Tensor | float | None, count: int) -> None:
        """Take a mean of `count` samples into account; None is none."""
        if value is not None:
            total, seen = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + float(value) * count, seen + count)

    def result(self) -> dict[str, float]:
        """The mean of everything, by name, over all processes."""
        return {name: total / count for name, (total, count) in summed(self._sums).items() if count}


def judged(name: str, function: Loss | Metric, output: Any, target: Any) -> Tensor | float:
    """What the user's loss or metric says: one number."""
    try:
        value = function(output, target)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise DataError(
            f"{name}(output, target) failed: {type(error).__name__}: {error}; the output is "
            f"{shapes_of(output)}, the target {shapes_of(target)}"
        ) from error
    if not isinstance(value, Tensor | float | int) or torch.as_tensor(value).numel() != 1:
        kind = "" if isinstance(value, Tensor | float | int) else f" (a {type(value).__name__})"
        raise DataError(
            f"{name}(output, target) must return one number, not {shapes_of(value)}{kind}"
        )
    return value


def copied(metric: Metric | None) -> Metric | None:
    """A metric that may be asked on trial: some keep what they have seen. None if there is none."""
    try:
        return deepcopy(metric)
    except Exception:  # noqa: BLE001 - whatever its members say to being copied
        return None


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Give back a model's buffers and mode, and the random state, as they were."""
    before, training = RandomState.of(()), model.training
    try:
        with unchanged_buffers(model):
            yield
    finally:
        model.train(training)
        before.restore(())


def shapes_of(value: Any) -> str:
    """The shapes and dtypes in any structure, as text."""
    leaves = [x for x in pytree.tree_leaves(value) if x is not None]
    found = [
        f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
        if isinstance(x, Tensor)
        else type(x).__name__
        for x in leaves[:6]
    ]
    return ", ".join(found) or "nothing"
