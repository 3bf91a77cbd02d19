"""The end of a run: whether its last state is the one to return, and what there is to say."""

from __future__ import annotations

import logging
from collections.abc import Callable
from statistics import fmean

from torch.fx import GraphModule

from cgmq_fx.health import dead_layers, lowest_step, surely_lower
from cgmq_fx.history import History
from cgmq_fx.rescue import Rescue
from cgmq_fx.result import Result

_LOG = logging.getLogger(__name__)


def verdict(
    result: Result, rescue: Rescue, history: History, losses: Callable[[GraphModule], list[float]]
) -> tuple[str, tuple[str, ...]]:
    """Whether another state than the last one is to be returned, because training has done harm.

    Where the training loss is not lowest at the end, or a layer is silent, the result is measured
    against the best epoch and against what there would be without training. That alone tells: the
    loss is low at the beginning, where bits are high.

    Args:
        result: What the last state gives.
        rescue: The other states.
        history: What was recorded.
        losses: The losses of a model on batches of the training data, always the same.

    Returns:
        The name of the other state, or "", and what there is to say. That is logged, too.
    """
    dead = dead_layers(result.model, history.epochs)
    lowest_at = lowest_step(history)
    if not dead and lowest_at is None:
        return "", ()
    own = losses(result.model)
    lowest, label, start = own, "", own
    for name, other in rescue.others(len(history.epochs)):
        start = losses(other.model)
        if surely_lower(start, own) and fmean(start) < fmean(lowest):
            lowest, label = start, name
    told = list(dead)
    if own and not surely_lower(own, start):
        batches = "batches" if len(own) > 1 else "batch"
        told.append(
            f"training has not lowered the loss: on {len(own)} {batches} it is {fmean(own):.4g} "
            f"after step {len(history.steps)}, and {fmean(start):.4g} within the same budget "
            "without training"
            + (f"; in training it was lowest about step {lowest_at}" if lowest_at else "")
        )
    if label:
        told.append(
            f"the result is that of {label}, whose loss there is {fmean(lowest):.4g}; pass an "
            "optimizer= with a smaller learning rate, or train for longer"
        )
    for text in told:
        _LOG.log(logging.WARNING if label or dead else logging.INFO, text)
    return label, tuple(told)
