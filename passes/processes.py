"""Data parallel training: what processes must agree on before gates are measured."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, distributed

from cgmq_fx.cost_models.errors import OptionError


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
