"""The parts of training that the driver puts together: losses, schedules, optimizers, metrics."""

from __future__ import annotations

from collections.abc import Callable
from math import cos, isfinite, log2, pi
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Adam, Optimizer
from torch.utils import _pytree as pytree

from cgmq_fx.cost_models.errors import DataError, OptionError
from cgmq_fx.passes.norms import normalised_weights
from cgmq_fx.passes.quantizer import Quantizer

Loss: TypeAlias = Callable[[Any, Any], Tensor]
Metric: TypeAlias = Callable[[Any, Any], "Tensor | float"]
OptimizerFactory: TypeAlias = Callable[[list[dict[str, Any]]], Optimizer]

_SHARE = 0.01
"""Learning rate of a weight as a share of the root mean square of its tensor."""

_LEAST_RATE = 1e-4
_WEIGHT_RATE = 1e-3
_NORMALISED = 3.0
"""By how much faster weights move whose scale a batch norm undoes."""

_RANGE_RATE = 1e-2
_WARMUP = 0.02
_SEARCH_SHARE = 0.4


def made_by(factory: OptimizerFactory, groups: list[dict[str, Any]]) -> Optimizer:
    """The optimizer that a user's function makes of the parameter groups.

    Raises:
        OptionError: If it makes none, or one that a driver cannot step.
    """
    try:
        made = factory(groups)
    except Exception as error:
        raise OptionError(f"optimizer(groups) failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, Optimizer):
        raise OptionError(f"optimizer(groups) must return an optimizer, not {made!r}")
    if isinstance(made, LBFGS):
        raise OptionError("LBFGS computes the loss itself, several times a step; take another one")
    return made


def default_optimizer(groups: list[dict[str, Any]]) -> Optimizer:
    """Adam, whose steps do not depend on the scale of the loss."""
    half = any(p.dtype is torch.float16 for group in groups for p in group["params"])
    return Adam(groups, eps=1e-4 if half else 1e-8)  # in float16 the usual one is 0


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights in groups of about equal size, and the ranges in one of their own.

    Adam moves every number by about its learning rate in a step, so the rate is a share of what the
    weights of a tensor are like (Shazeer and Stern, Adafactor, ICML 2018, section 8): layers with
    small weights do not lose in a few steps what they had learned. A rate on log-ranges is a
    relative one as it is.
    """
    quantizers = [m for m in model.modules() if isinstance(m, Quantizer)]
    normalised = normalised_weights(model)
    ranges = [q.log_range for q in quantizers]
    own = {id(p) for p in ranges}
    by_rate: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in own:
            rate = _rate(parameter) * (_NORMALISED if id(parameter) in normalised else 1.0)
            by_rate.setdefault(rate, []).append(parameter)
    groups: list[dict[str, Any]] = [{"params": p, "lr": r} for r, p in sorted(by_rate.items())]
    if ranges:
        groups.append({"params": ranges, "lr": _RANGE_RATE, "weight_decay": 0.0})
    return groups


@torch.no_grad()
def _rate(weight: Tensor) -> float:
    """The learning rate of a tensor; few different ones, so that there are few groups."""
    size = float(weight.float().square().mean().sqrt()) if weight.numel() else 0.0
    rate = _SHARE * 2.0 ** round(log2(size)) if isfinite(size) and size > 0 else 0.0
    return min(max(rate, _LEAST_RATE), _WEIGHT_RATE)


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
