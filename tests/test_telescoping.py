"""The grid in one rounding is the gated sum of residuals, and its gradients are the composite's."""

from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cgmq_fx.passes.grid import grid, round_to_grid
from cgmq_fx.passes.kernel import fake_quantize

WIDTHS = (2, 4, 8, 16)


def residual_chain(x: Tensor, limit: Tensor, bits: int, signed: bool) -> Tensor:
    """`x_2 + e_4 + e_8 + ...` up to `bits`, as Bayesian Bits writes it, in float64."""
    x = x.double().clamp(-limit if signed else torch.zeros_like(limit), limit)
    total = torch.zeros_like(x)
    for width in WIDTHS[: WIDTHS.index(bits) + 1]:
        step, low, high = grid(limit.double(), torch.tensor(width), signed)
        error = step * ((x - total) / step).round()
        total = (total + error).clamp(low * step, high * step)
    return total


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-3, 3, allow_subnormal=False), min_size=1, max_size=40),
    limit=st.floats(0.125, 2.5),
    bits=st.sampled_from(WIDTHS),
    signed=st.booleans(),
)
def test_the_sum_of_residuals_telescopes(
    values: list[float], limit: float, bits: int, signed: bool
) -> None:
    x, beta = torch.tensor(values).double(), torch.tensor(limit).double()
    direct = round_to_grid(x, beta, torch.tensor(bits), signed)
    gap = (residual_chain(x, beta, bits, signed) - direct).abs()
    step = grid(beta, torch.tensor(bits), signed).step
    ties = torch.stack([_near_tie(x, beta, width, signed) for width in WIDTHS]).any(0)
    assert bool((gap[~ties] <= 1e-6 * step).all())


def _near_tie(x: Tensor, limit: Tensor, bits: int, signed: bool) -> Tensor:
    codes = x / grid(limit, torch.tensor(bits), signed).step
    return ((codes - codes.floor()) - 0.5).abs() < 1e-6


def composite(x: Tensor, limit: Tensor, bits: Tensor, signed: bool) -> Tensor:
    """Clip, scale, round with a straight-through gradient, scale back: plain autograd."""
    step, low, high = grid(limit, bits, signed)
    clipped = torch.maximum(torch.minimum(x, limit), -limit if signed else limit * 0)
    codes = clipped / step
    rounded = codes + (codes.round().clamp(low, high) - codes).detach()
    return rounded * step


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(
    ("limits", "widths"), [((), ()), ((4, 1), ()), ((4, 1), (4, 1)), ((4, 1), (4, 9)), ((), (4, 9))]
)
def test_gradients_are_those_of_the_composite_form(
    limits: tuple[int, ...], widths: tuple[int, ...], bits: int, signed: bool
) -> None:
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(4, 9, generator=generator, dtype=torch.float64).requires_grad_()
    limit = (torch.rand(limits, generator=generator, dtype=torch.float64) + 0.5).requires_grad_()
    width, weight = torch.full(widths, bits), torch.randn(4, 9, generator=generator).double()
    outputs = (
        fake_quantize(x, limit, width, None, None, signed, False, 0),
        composite(x, limit, width, signed),
    )
    assert torch.allclose(*outputs, rtol=0, atol=1e-12)
    own, plain = (torch.autograd.grad((y * weight).sum(), (x, limit)) for y in outputs)
    high = grid(limit.detach(), width, signed).high.mean()
    scale = sqrt(x.numel() / max(limit.numel(), 1) * float(high))  # LSQ: 1 / sqrt(n * q_max)
    assert torch.allclose(own[0], plain[0], rtol=0, atol=1e-12)
    assert torch.allclose(own[1] * scale, plain[1], rtol=1e-9, atol=1e-12)
