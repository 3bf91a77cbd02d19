"""Data parallel training: what processes must agree on before gates are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, distributed
from torch.autograd import Variable

from cgmq_fx.cost_models.errors import OptionError


def process_count() -> int:
    """Processes that train together; 1 without `torch.distributed`."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


class Averages:
    """Has gradients of functions of parameters averaged over the processes, all in one exchange.

    DistributedDataParallel averages the gradients of parameters when backward has passed them. The
    statistic of a weight's gate is a square, so it needs the average itself, to be the one of the
    whole batch. Nothing in backward waits for that: gradients are kept until its end, averaged
    together, and reported then.
    """

    def __init__(self) -> None:
        self._task = -1
        self._waiting: list[tuple[Tensor, Callable[[Tensor], None]]] = []

    def watch(self, y: Tensor, report: Callable[[Tensor], None]) -> None:
        """Call `report` with the average of the gradient of `y` when a backward pass ends.

        Args:
            y: A function of parameters alone, the same in all processes.
            report: Takes a tensor like `y`.
        """
        y.register_hook(partial(self._wait, report))

    def _wait(self, report: Callable[[Tensor], None], grad: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task:  # what an interrupted pass has left is dropped
            self._task, self._waiting = task, []
            Variable._execution_engine.queue_callback(self._exchange)
        self._waiting.append((grad, report))

    @torch.no_grad()
    def _exchange(self) -> None:
        waiting, self._waiting = self._waiting, []
        flat = torch.cat([grad.reshape(-1) for grad, _ in waiting])
        distributed.all_reduce(flat)
        flat /= process_count()
        parts = flat.split([grad.numel() for grad, _ in waiting])
        for (grad, report), part in zip(waiting, parts, strict=True):
            report(part.view(grad.shape).to(grad.dtype))


def average_across_processes(y: Tensor) -> None:
    """Have the gradient of `y` averaged before backward goes on, for graphs that are compiled."""
    y.register_hook(_average)


def _average(grad: Tensor) -> Tensor:
    grad = grad.contiguous()
    distributed.all_reduce(grad)
    return grad / process_count()


def refuse_sharded(parameters: Iterable[Tensor]) -> None:
    """Refuse parameters of which every process holds a part.

    Raises:
        OptionError: If there is one.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    from torch.distributed.tensor import DTensor  # slow to import

    if any(isinstance(p, DTensor) for p in parameters):
        raise OptionError(
            "the parameters have been sharded (FSDP); gates need whole tensors to measure, so "
            "train the prepared model under DistributedDataParallel instead"
        )
