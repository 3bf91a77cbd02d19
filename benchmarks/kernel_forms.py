"""Fake quantization in several forms, to be timed side by side: forward, and with backward."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cgmq_fx.passes.grid import BITS_DTYPE, adjacent_widths
from cgmq_fx.passes.kernel import Statistic, fake_quantize

GRANULARITIES = ("tensor", "channel", "element")
BITS = 4
_CODES = 7
_CHANNELS = 64


@dataclass(frozen=True)
class Inputs:
    """A tensor of shape (channels, rest) with its range, gates and an upstream gradient."""

    x: Tensor
    grad: Tensor
    limit: Tensor
    bits: Tensor
    adjacent: Tensor
    probe: Tensor

    @staticmethod
    def of(size: int, granularity: str) -> "Inputs":
        channels = min(_CHANNELS, size // 16)
        shape = (channels, size // channels)
        gates = {"tensor": (), "channel": (channels, 1), "element": shape}[granularity]
        ranges = () if granularity == "tensor" else (channels, 1)
        bits = torch.full(gates, BITS, dtype=BITS_DTYPE)
        if granularity == "element":
            bits = 2 ** torch.randint(2, 5, gates, dtype=BITS_DTYPE)  # 4, 8 or 16 bits
        return Inputs(
            torch.randn(shape).requires_grad_(),
            torch.randn(shape),
            torch.full(ranges, 2.0).requires_grad_(),
            bits,
            adjacent_widths((2, 4, 8, 16)),
            torch.zeros((1, *gates)).requires_grad_(),
        )


def ours(inputs: Inputs) -> Tensor:
    """The op of this library, with the statistic that gates are steered by."""
    y: Tensor = fake_quantize(
        inputs.x,
        inputs.limit,
        inputs.bits,
        inputs.adjacent,
        inputs.probe,
        True,
        False,
        int(Statistic.CHANGE),
    )
    return y


def aten(inputs: Inputs) -> Tensor:
    """PyTorch's fused learnable fake quantize; it has no gates and no granularity per element."""
    scale = inputs.limit * (2 / (2**BITS - 1))
    if inputs.limit.dim() == 0:
        return torch._fake_quantize_learnable_per_tensor_affine(
            inputs.x, scale.reshape(1), torch.zeros(1), -_CODES, _CODES, 1.0
        )
    return torch._fake_quantize_learnable_per_channel_affine(
        inputs.x, scale.reshape(-1), torch.zeros(scale.numel()), 0, -_CODES, _CODES, 1.0
    )


def composite(inputs: Inputs) -> Tensor:
    """Plain operators with straight-through rounding."""
    high = 2.0 ** (inputs.bits - 1) - 1
    step = inputs.limit * 2 / (2.0**inputs.bits - 1)
    codes = inputs.x / step
    clipped = torch.minimum(torch.maximum(codes, -high), high)
    return (clipped + (clipped.round() - clipped).detach()) * step


def residual(inputs: Inputs) -> Tensor:
    """The gated sum of residuals of Bayesian Bits, from 2 to 16 bits."""
    x = torch.minimum(torch.maximum(inputs.x, -inputs.limit), inputs.limit)
    total, gate = torch.zeros_like(x), torch.ones((), dtype=torch.float32)
    for width in (2, 4, 8, 16):
        gate = gate * (inputs.bits >= width)
        step = inputs.limit * 2 / (2.0**width - 1)
        codes = (x - total.detach()) / step
        total = total + gate * step * (codes + (codes.round() - codes).detach())
    return total


FORMS: dict[str, Callable[[Inputs], Tensor]] = {
    "ours": ours,
    "aten": aten,
    "composite": composite,
    "residual": residual,
}


def available(form: str, granularity: str) -> bool:
    """Whether a form can have gates of a granularity."""
    return form != "aten" or granularity != "element"


def copy(inputs: Inputs) -> Tensor:
    """What a form is measured against: read the tensor once and write it once."""
    return inputs.x.detach().clone()


def traffic(inputs: Inputs, backward: bool) -> None:
    """What no form can do without: read every input once, write every output once, fresh.

    Forward reads the tensor; backward reads it again, and the gradient. A gate per element adds its
    bit-widths to what is read, and in backward its statistic to what is written.
    """
    x, own = inputs.x.detach(), inputs.bits.shape == inputs.x.shape
    read = inputs.bits.view(torch.float32).sum if own else x.new_empty
    kept = [x.clone(), read(())]
    if backward:
        kept += [torch.mul(inputs.grad, x), read(())]
    if backward and own:
        kept.append(torch.ones_like(x))


def forward(form: str, inputs: Inputs) -> None:
    """The forward pass alone."""
    with torch.no_grad():
        FORMS[form](inputs)


def forward_backward(form: str, inputs: Inputs) -> None:
    """Both passes, with the gradient of the range and what else the form reports."""
    leaves = [inputs.x, inputs.limit, *([inputs.probe] if form == "ours" else [])]
    torch.autograd.grad(FORMS[form](inputs), leaves, inputs.grad)
