"""Data parallel training: what processes must agree on before gates are measured."""

from __future__ import annotations

from torch import Tensor, distributed


def process_count() -> int:
    """Processes that train together; 1 without `torch.distributed`."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def average_across_processes(y: Tensor) -> None:
    """Have the gradient of `y`, a function of parameters alone, averaged before it is used.

    DistributedDataParallel averages the gradients of parameters when backward has passed them. The
    statistic of a weight's gate is a square, so it needs the average before that, to be the one of
    the whole batch.
    """
    if process_count() > 1:
        y.register_hook(_average)


def _average(grad: Tensor) -> Tensor:
    grad = grad.contiguous()
    distributed.all_reduce(grad)
    return grad / process_count()
