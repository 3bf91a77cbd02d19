"""Batch norm while training, behind a layer that it has been folded into."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from cgmq_fx.passes.processes import process_count
from cgmq_fx.passes.quantizer import BiasQuantizer, kept_channels

_FEWEST, _SAMPLES = 16, 8
"""Values per channel, and samples, below which a batch does not tell what mean and variance are."""

_LEAST_FACTOR = 1e-8


def is_telling(x: Tensor, processes: int = 1) -> bool:
    """Whether mean and variance per channel of (batch, channels, ...) tell those of other data.

    Args:
        x: The batch, or the part of it of one of so many processes.
        processes: How many have a part of that size.
    """
    return processes * x.numel() >= _FEWEST * x.shape[1] and processes * x.shape[0] >= _SAMPLES


class _Sum(torch.autograd.Function):
    """The sum over all processes, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        found = x.clone()
        distributed.all_reduce(found)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        found = grad.contiguous().clone()
        distributed.all_reduce(found)
        return found


@final
class Normaliser(nn.Module):
    """Normalises what a layer without bias gives, then scales and shifts it.

    In training mode by mean and variance of the batch, where it is not too small for that, in
    evaluation mode by their moving averages. Then both together are the layer with its weight times
    `factor` and the bias `folded`, which is what is deployed. That bias is rounded to the grid of
    its accumulator; the error of that is in the output here, too.

    Each of several processes normalises by its own part of the batch, as PyTorch's batch norm does,
    or all of them by the whole of it, if it is `shared`, as PyTorch's `SyncBatchNorm` does. The
    processes are then asked for their sums in every layer, which takes longer.

    Rounding moves means and variances of all layers, and with few bits by much; what follows need
    not unlearn that, and the weights may move faster.

    Args:
        mean: Of the layer's output without bias, shape (channels,).
        variance: Likewise.
        rounding: Rounds the deployed bias; None if that is in float.
        momentum: Weight of a batch in the moving averages.
        shared: Whether processes that train together normalise by the batches of all.

    Attributes:
        gain: What the normalised output is multiplied with, shape (channels,); trained. The shift
            is the parameter that was the layer's bias.
        told: Whether the batches that it was calibrated with were large enough to normalise by.
    """

    mean: Tensor
    variance: Tensor
    told: Tensor

    def __init__(
        self,
        mean: Tensor,
        variance: Tensor,
        rounding: BiasQuantizer | None,
        momentum: float = 0.1,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.rounding = rounding
        self.momentum = momentum
        self.shared = shared
        self.eps = 1e-5 * float(variance.mean()) + 1e-30
        self.register_buffer("mean", mean.clone())
        self.register_buffer("variance", variance.clone())
        self.register_buffer("told", torch.zeros((), dtype=torch.bool, device=mean.device))
        self.gain = nn.Parameter(self._deviation())

    def _deviation(self) -> Tensor:
        return (self.variance + self.eps).sqrt()

    @property
    def factor(self) -> Tensor:
        """What the weight is multiplied with when all is folded into the layer: (channels,)."""
        factor = self.gain / self._deviation()
        small = factor.abs() < _LEAST_FACTOR
        return torch.where(small, _LEAST_FACTOR, factor)

    def folded(self, shift: Tensor) -> Tensor:
        """The bias of the layer when all is folded into it, before it is rounded."""
        return shift - self.factor * self.mean

    @torch.no_grad()
    def restart(self, mean: Tensor, variance: Tensor, shift: Tensor) -> None:
        """Take up other statistics, changing `gain` and `shift` so that nothing else changes."""
        factor, bias = self.factor, self.folded(shift)
        self.mean.copy_(mean)
        self.variance.copy_(variance)
        self.gain.copy_(factor * self._deviation())
        shift.copy_(bias + factor * self.mean)

    def forward(self, x: Tensor, shift: Tensor, *grids: Tensor) -> Tensor:
        """The normalised output.

        Args:
            x: Shape (batch, channels, ...).
            shift: Shape (channels,).
            grids: What `BiasQuantizer.forward` takes besides the bias, if there is a grid.
        """
        kept = None
        if self.rounding is not None:
            shift = shift + self._error(shift, grids)
            if self.rounding.axis is not None:  # pruned, the mean of the batch is zero
                kept = kept_channels(grids[3], self.rounding.axis).to(shift.dtype)
        if self.training and self.shared and process_count() > 1:
            return self._together(x, shift, kept)
        by_batch = self.training and is_telling(x)
        if by_batch and kept is not None:
            shift = shift * kept
        return F.batch_norm(
            x, self.mean, self.variance, self.gain, shift, by_batch, self.momentum, self.eps
        )

    @torch.no_grad()
    def _error(self, shift: Tensor, grids: tuple[Tensor, ...]) -> Tensor:
        """The error that rounding the folded bias will make."""
        assert self.rounding is not None
        input_log_range, input_bits, weight_log_range, weight_bits = grids
        factor, bias = self.factor, self.folded(shift)
        log_factor = factor.abs().log().to(weight_log_range.dtype)
        log_range = weight_log_range + log_factor.reshape(weight_log_range.shape)
        rounded: Tensor = self.rounding(bias, input_log_range, input_bits, log_range, weight_bits)
        return rounded - bias

    def _together(self, x: Tensor, shift: Tensor, kept: Tensor | None) -> Tensor:
        """By mean and variance of the batches of all processes, if these are not too small."""
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        wide = torch.promote_types(x.dtype, torch.float32)
        about = self.mean.to(wide, copy=True)  # sums of squares about it lose no digits
        moved = x.to(wide) - about.reshape(shape)
        channels, samples = x.shape[1], x.shape[0]
        size = moved.new_tensor([x.numel() // max(1, channels), samples])
        own = torch.cat([moved.sum(dims), moved.square().sum(dims), size])
        total: Tensor = _Sum.apply(own)  # type: ignore[no-untyped-call]
        first, second, size = total.split([channels, channels, 2])
        values, samples = size.detach().unbind()
        first = first / values.clamp(min=1.0)
        variance = (second / values.clamp(min=1.0) - first.square()).clamp(min=0.0)
        told = (values >= _FEWEST) & (samples >= _SAMPLES)
        first = torch.where(told, first, torch.zeros_like(first))
        variance = torch.where(told, variance, self.variance.to(wide))
        if kept is not None:
            shift = torch.where(told, shift * kept, shift)
        with torch.no_grad():
            weight = self.momentum * told.to(wide)
            self.mean.copy_(torch.lerp(about, about + first, weight))
            unbiased = variance * (values / (values - 1.0).clamp(min=1.0))
            self.variance.copy_(torch.lerp(self.variance.to(wide), unbiased, weight))
        factor = self.gain * (variance + self.eps).rsqrt()
        y = moved * factor.reshape(shape) + (shift - first * factor).reshape(shape)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """The number of channels."""
        return f"channels={self.mean.numel()}"
