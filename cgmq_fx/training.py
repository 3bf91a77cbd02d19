"""The parts of training that the driver puts together: losses, schedules, optimizers, metrics."""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils import _pytree as pytree

from cgmq_fx.cost_models.errors import DataError
from cgmq_fx.passes.quantizer import Quantizer

Loss: TypeAlias = Callable[[Any, Any], Tensor]
Metric: TypeAlias = Callable[[Any, Any], "Tensor | float"]
OptimizerFactory: TypeAlias = Callable[[list[dict[str, Any]]], Optimizer]

_WEIGHT_RATE = 1e-3
_RANGE_RATE = 1e-2
_WARMUP = 0.02
_SEARCH_SHARE = 0.4


def default_optimizer(groups: list[dict[str, Any]]) -> Optimizer:
    """Adam, whose steps do not depend on the scale of the loss."""
    half = any(p.dtype is torch.float16 for group in groups for p in group["params"])
    return Adam(groups, eps=1e-4 if half else 1e-8)  # in float16 the usual one is 0


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights in one group, ranges in another; a rate on log-ranges is a relative one."""
    quantizers = [m for m in model.modules() if isinstance(m, Quantizer)]
    ranges = [q.log_range for q in quantizers]
    own = {id(p) for p in ranges}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    groups = [
        {"params": weights, "lr": _WEIGHT_RATE},
        {"params": ranges, "lr": _RANGE_RATE, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def search_steps(total: int) -> int:
    """How many of `total` steps search bit-widths; the rest tunes."""
    return max(1, round(_SEARCH_SHARE * total))


def schedule(search: int, total: int) -> Callable[[int], float]:
    """The factor on every learning rate by step: warm-up, constant in the search, cosine to 0."""
    warm = max(1, round(_WARMUP * total))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        if step < search:
            return 1.0
        return 0.5 * (1 + cos(pi * min(1.0, (step - search) / max(1, total - search))))

    return factor


def imitation(output: Any, target: Any) -> Tensor:
    """How far an output is from the teacher's: mean over tensors of the relative squared error.

    Args:
        output: The student's output, any structure.
        target: The teacher's, of the same structure.

    Raises:
        DataError: If there is no floating-point tensor to compare.
    """
    pairs = zip(pytree.tree_leaves(output), pytree.tree_leaves(target), strict=True)
    errors = [
        (a - b).square().mean() / b.square().mean().clamp(min=1e-12)
        for a, b in pairs
        if isinstance(a, Tensor) and a.is_floating_point() and a.numel()
    ]
    if not errors:
        raise DataError("the model's output has no floating-point tensor to learn from; pass loss=")
    return torch.stack(errors).mean()


def accuracy(output: Any, target: Any) -> Tensor | None:
    """Share of right classes, if output and target look like classification; else None.

    Args:
        output: Shape (batch, classes), floating point, to be recognised.
        target: Shape (batch,), integer, to be recognised.
    """
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        return None
    if output.dim() != 2 or target.dim() != 1 or target.is_floating_point():
        return None
    return (output.argmax(1) == target).float().mean()
