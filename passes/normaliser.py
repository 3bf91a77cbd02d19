"""Batch norm while training, behind a layer that it has been folded into."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cgmq_fx.passes.quantizer import BiasQuantizer, kept_channels

_FEWEST, _SAMPLES = 16, 8
"""Values per channel, and samples, below which a batch does not tell what mean and variance are."""

_LEAST_FACTOR = 1e-8


def is_telling(x: Tensor) -> bool:
    """Whether mean and variance per channel of (batch, channels, ...) tell those of other data."""
    return x.numel() >= _FEWEST * x.shape[1] and x.shape[0] >= _SAMPLES


@final
class Normaliser(nn.Module):
    """Normalises what a layer without bias gives, then scales and shifts it.

    In training mode by mean and variance of the batch, where it is not too small for that, in
    evaluation mode by their moving averages. Then both together are the layer with its weight times
    `factor` and the bias `folded`, which is what is deployed. That bias is rounded to the grid of
    its accumulator; the error of that is in the output here, too.

    Each of several processes normalises by its own part of the batch, as PyTorch's batch norm does.

    Rounding moves means and variances of all layers, and with few bits by much; what follows need
    not unlearn that, and the weights may move faster.

    Args:
        mean: Of the layer's output without bias, shape (channels,).
        variance: Likewise.
        rounding: Rounds the deployed bias; None if that is in float.
        momentum: Weight of a batch in the moving averages.

    Attributes:
        gain: What the normalised output is multiplied with, shape (channels,); trained. The shift
            is the parameter that was the layer's bias.
        told: Whether the batches that it was calibrated with were large enough to normalise by.
    """

    mean: Tensor
    variance: Tensor
    told: Tensor

    def __init__(
        self, mean: Tensor, variance: Tensor, rounding: BiasQuantizer | None, momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.rounding = rounding
        self.momentum = momentum
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
        by_batch = self.training and is_telling(x)
        if self.rounding is not None:
            shift = self._rounded(shift, grids, by_batch)
        return F.batch_norm(
            x, self.mean, self.variance, self.gain, shift, by_batch, self.momentum, self.eps
        )

    def _rounded(self, shift: Tensor, grids: tuple[Tensor, ...], by_batch: bool) -> Tensor:
        """The shift with the error that rounding the folded bias will make."""
        assert self.rounding is not None
        input_log_range, input_bits, weight_log_range, weight_bits = grids
        with torch.no_grad():
            factor, bias = self.factor, self.folded(shift)
            log_factor = factor.abs().log().to(weight_log_range.dtype)
            log_range = weight_log_range + log_factor.reshape(weight_log_range.shape)
            rounded = self.rounding(bias, input_log_range, input_bits, log_range, weight_bits)
            error = rounded - bias
        shift = shift + error
        if by_batch and self.rounding.axis is not None:  # pruned, the mean of the batch is zero
            shift = shift * kept_channels(weight_bits, self.rounding.axis).to(shift.dtype)
        return shift

    def extra_repr(self) -> str:
        """The number of channels."""
        return f"channels={self.mean.numel()}"
