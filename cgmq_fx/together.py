"""`quantize` in several processes: what they agree on, and what only the first of them does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import distributed

from cgmq_fx.cost_models.errors import CgmqError, OptionError, TrainingError
from cgmq_fx.identity import difference
from cgmq_fx.passes.processes import process_count

_T = TypeVar("_T")


def is_first() -> bool:
    """Whether this is the process that writes files and speaks; true where there is only one."""
    return process_count() == 1 or distributed.get_rank() == 0


def shared(make: Callable[[], _T]) -> _T:
    """What `make` gives in the first process, in all of them; the library's errors as well."""
    if process_count() == 1:
        return make()
    made: list[Any] = [None, None]
    if is_first():
        try:
            made[0] = make()
        except CgmqError as error:
            made[1] = error
    _answered(lambda: distributed.broadcast_object_list(made, src=0))
    if made[1] is not None:
        raise made[1]
    value: _T = made[0]
    return value


def agreed(call: Mapping[str, Any]) -> None:
    """Check that all processes make the same call.

    Raises:
        OptionError: If they do not; the message names the first difference.
    """
    calls = _gathered(dict(call))
    for rank, other in enumerate(calls):
        found = difference(calls[0], other)
        if found is not None:
            raise OptionError(
                f"process {rank} makes another call than process 0: in the latter, {found}; every "
                "process needs the same call and as many batches, each its own part of the data"
            )


def mean(value: float) -> float:
    """The mean of a number over the processes."""
    values = _gathered(value)
    return float(sum(values)) / len(values)


def summed(sums: Mapping[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
    """Totals and counts by name, added up over the processes."""
    found: dict[str, tuple[float, int]] = {}
    for own in _gathered(dict(sums)):
        for name, (total, count) in own.items():
            before = found.get(name, (0.0, 0))
            found[name] = before[0] + total, before[1] + count
    return found


def _gathered(value: _T) -> list[_T]:
    """The values of all processes, in their order."""
    values: list[Any] = [value] * process_count()
    if len(values) > 1:
        _answered(lambda: distributed.all_gather_object(values, value))
    return values


def _answered(exchange: Callable[[], None]) -> None:
    try:
        exchange()
    except RuntimeError as error:  # the backends have no class of their own for it
        raise TrainingError(f"another process did not answer: {error}") from error
