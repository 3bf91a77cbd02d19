"""The modules that passes put into a graph: quantizers of tensors and of biases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor, nn

from cgmq_fx.cost_models.facts import Role
from cgmq_fx.passes.grid import (
    BITS_DTYPE,
    PASS_THROUGH,
    adjacent_widths,
    finest_step,
    power_of_two_range,
)
from cgmq_fx.passes.kernel import Statistic, fake_quantize, fake_quantize_backward
from cgmq_fx.passes.processes import Averages, average_across_processes, process_count
from cgmq_fx.passes.recompute import remember

INT32_CODES = 2147483520.0  # the largest float32 below 2^31


@dataclass(frozen=True, slots=True)
class QuantizerSpec:
    """What is fixed about a quantizer when it is inserted.

    Attributes:
        role: Weight or activation.
        signed: Whether the grid has codes below zero.
        bit_widths: The bit-widths that its gates may take, ascending.
        gate_shape: Shape of the gates, broadcastable against the tensor: () for one gate.
        range_shape: Shape of the range, broadcastable against the tensor.
        batched: Whether dimension 0 of the tensor is the batch.
        power_of_two: Whether steps are powers of two: the one nearest to what the range asks for.
    """

    role: Role
    signed: bool
    bit_widths: tuple[int, ...]
    gate_shape: tuple[int, ...] = ()
    range_shape: tuple[int, ...] = ()
    batched: bool = False
    power_of_two: bool = False


@final
class Quantizer(nn.Module):
    """Rounds a tensor to a grid with a learnable range and bit-widths that a controller sets.

    Attributes:
        spec: What is fixed.
        signed: Whether the grid has codes below zero; calibration may clear it for an input that
            is never negative.
        log_range: Natural logarithm of the range, shape `spec.range_shape`; trained.
        bits: Bit-widths, int8, shape `spec.gate_shape`.
        adjacent: By bit-width, the one that `Statistic.CHANGE` compares with, shape (33,).
        probe: Shape (rows, *spec.gate_shape); its `.grad` is the statistic. None when frozen.

    `adjacent` and `probe` are no buffers: they come and go with the search, while averages of
    weights and wrappers count on the same buffers throughout.
    """

    log_range: nn.Parameter
    bits: Tensor
    adjacent: Tensor | None
    probe: Tensor | None

    def __init__(self, spec: QuantizerSpec, device: torch.device | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.signed = spec.signed
        self.statistic = Statistic.NONE
        self.averages = Averages()
        self.log_range = nn.Parameter(
            torch.zeros(spec.range_shape, device=device, dtype=torch.float32)
        )
        shape = spec.gate_shape
        self.register_buffer(
            "bits", torch.full(shape, PASS_THROUGH, dtype=BITS_DTYPE, device=device)
        )
        self.adjacent = self.probe = None

    @property
    def limit(self) -> Tensor:
        """The range that values are rounded and clipped with, differentiable.

        Its shape is `spec.range_shape`; with steps of powers of two it depends on the bits, and is
        what that and `spec.gate_shape` broadcast to.
        """
        limit = self.log_range.exp()
        if not self.spec.power_of_two:
            return limit
        return power_of_two_range(limit, self.bits, self.signed)

    @property
    def passes_all(self) -> bool:
        """Whether it never rounds: 32 bits are all that its gates may take."""
        return self.spec.bit_widths == (PASS_THROUGH,)

    def forward(self, x: Tensor) -> Tensor:
        """The rounded tensor, of the same shape and dtype."""
        limit, bits, compiling = self.limit, self.bits, torch.compiler.is_compiling()
        probe = self.probe if torch.is_grad_enabled() else None
        shared = probe is not None and self.spec.role is Role.WEIGHT and process_count() > 1
        y: Tensor = fake_quantize(
            x,
            limit,
            bits,
            self.adjacent,
            None if shared and not compiling else probe,
            self.signed,
            self.spec.batched,
            int(self.statistic),
        )
        if not compiling and y.requires_grad:
            value, signed = (x.detach(), limit.detach(), bits), self.signed
            remember(y, lambda: fake_quantize(*value, None, None, signed, False, 0))
        if shared and y.requires_grad:
            if compiling:
                average_across_processes(y)
            else:
                self.averages.watch(y, partial(self._report, x.detach(), limit.detach()))
        return y

    def _report(self, x: Tensor, limit: Tensor, grad: Tensor) -> None:
        """Add to the probe's gradient what the backward pass would have, for another gradient."""
        assert self.probe is not None
        *_, reported = fake_quantize_backward(
            grad,
            x,
            limit,
            self.bits,
            self.adjacent,
            self.signed,
            self.spec.batched,
            int(self.statistic),
        )
        if self.probe.grad is None:
            self.probe.grad = reported
        else:
            self.probe.grad += reported

    def observe(self, statistic: Statistic, averages: Averages | None = None) -> None:
        """Report `statistic` from every backward pass, or nothing for `Statistic.NONE`.

        Args:
            statistic: What to report.
            averages: Averages gradients over processes; shared by quantizers, they are averaged in
                one exchange.
        """
        self.statistic = statistic
        self.averages = averages or Averages()
        if statistic is Statistic.NONE:
            self.adjacent = self.probe = None
            return
        self.adjacent = adjacent_widths(self.spec.bit_widths).to(self.bits.device)
        shape = (statistic.rows, *self.spec.gate_shape)
        self.probe = torch.zeros(
            shape, device=self.bits.device, dtype=torch.float32
        ).requires_grad_()

    def extra_repr(self) -> str:
        """Role, sign and bit-widths."""
        sign = "signed" if self.signed else "unsigned"
        bits = self.bits.unique().tolist()
        step = ", power_of_two" if self.spec.power_of_two else ""
        return f"{self.spec.role.value}, {sign}, bits={bits}, gates={self.bits.numel()}{step}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.adjacent is not None:
            self.adjacent = fn(self.adjacent)
        if self.probe is not None:  # stay a leaf, so that its gradient is kept after a move
            self.probe = fn(self.probe.detach()).requires_grad_()
        return self


def kept_channels(bits: Tensor, axis: int) -> Tensor:
    """Which channels of a weight have any bits left, from the bits of its gates.

    Args:
        bits: One gate, or gates that broadcast against the weight.
        axis: The axis of the weight that runs over the channels.

    Returns:
        Booleans, one element or one per channel.
    """
    kept = bits > 0
    if kept.dim() == 0:
        return kept.reshape(1)
    return kept.movedim(axis, 0).reshape(kept.shape[axis], -1).any(1)


def bias_step(step: Tensor, bias: Tensor) -> Tensor:
    """The grid of a bias: that of its accumulator, or the next coarser one by powers of two.

    Args:
        step: Input step times weight step, one element or one per channel, not zero.
        bias: Shape (channels,).

    Returns:
        The step with which int32 holds the bias, of the shape of `step`, of the type of `bias`.
    """
    step = step.to(bias.dtype)
    excess = bias.detach().abs() / (step * INT32_CODES)
    if step.numel() == 1:
        excess = excess.amax(0, keepdim=True) if excess.numel() else excess.new_zeros(1)
    return step * excess.log2().ceil().clamp(min=0.0).exp2()


def bias_codes(bias: Tensor, step: Tensor) -> Tensor:
    """Whole numbers of steps that are nearest to a bias, within int32."""
    return (bias / step).round_().clamp_(-INT32_CODES, INT32_CODES)


@final
class BiasQuantizer(nn.Module):
    """Rounds a bias to the int32 grid of its accumulator: input step times weight step.

    Runtimes do this silently to a float bias; doing it during training makes the trained network
    the one that runs. A bias that is too large for int32 there (products of 16 by 16 bits have fine
    steps) lies on a grid that is coarser by a power of two. Straight-through gradient; where an
    operand is float, the bias passes. Where all weights of a channel have 0 bits, its bias is zero
    as well: the channel is pruned.

    Args:
        input_signed: Whether the input's grid has codes below zero.
        weight_signed: Whether the weight's grid has.
        power_of_two: Whether steps are powers of two.
        axis: The axis of the weight that runs over the channels; None if it cannot be pruned.
    """

    def __init__(
        self,
        input_signed: bool,
        weight_signed: bool,
        power_of_two: bool = False,
        axis: int | None = None,
    ) -> None:
        super().__init__()
        self.axis = axis
        self.input_signed = input_signed
        self.weight_signed = weight_signed
        self.power_of_two = power_of_two

    def forward(
        self,
        bias: Tensor,
        input_log_range: Tensor,
        input_bits: Tensor,
        weight_log_range: Tensor,
        weight_bits: Tensor,
    ) -> Tensor:
        """The rounded bias.

        Args:
            bias: Shape (channels,).
            input_log_range: Range of the input's quantizer, one element.
            input_bits: Its bits.
            weight_log_range: Range of the weight's quantizer, one or `channels` elements.
            weight_bits: Its bits.
        """
        with torch.no_grad():
            step = self.accumulator_step(input_log_range, input_bits, weight_log_range, weight_bits)
            wide = bias if bias.dtype is torch.float64 else bias.float()  # codes exceed float16
            safe = bias_step(torch.where(step > 0, step, torch.ones_like(step)), wide)
            codes = bias_codes(wide, safe)
            change = torch.where(step > 0, codes * safe - wide, torch.zeros_like(wide))
        rounded = bias + change.detach().to(bias.dtype)
        if self.axis is None:
            return rounded
        return rounded * kept_channels(weight_bits, self.axis).to(bias.dtype)

    def accumulator_step(
        self,
        input_log_range: Tensor,
        input_bits: Tensor,
        weight_log_range: Tensor,
        weight_bits: Tensor,
    ) -> Tensor:
        """Input step times weight step, one or `channels` elements; as in `forward`."""
        power = self.power_of_two
        inputs = finest_step(input_log_range, input_bits, self.input_signed, power)
        weights = finest_step(weight_log_range, weight_bits, self.weight_signed, power)
        return inputs.reshape(-1) * weights.reshape(-1)

    def extra_repr(self) -> str:
        """The signs of the two grids, and what their steps are."""
        signs = f"input_signed={self.input_signed}, weight_signed={self.weight_signed}"
        return f"{signs}, power_of_two" if self.power_of_two else signs


@final
class TrainingFlag(nn.Module):
    """The node that tells dropout and batch norm whether the graph is in training mode."""

    def forward(self) -> bool:
        """Whether this module is in training mode."""
        return self.training
