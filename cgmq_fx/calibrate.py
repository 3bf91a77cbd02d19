"""Calibration: where every range starts, for every bit-width, from a few batches.

The best range depends on the bit-width: few bits want to clip. So each quantizer gets a table with
the range of least squared error per bit-width; when a gate moves, the range moves along the table
and keeps what it has learned on top.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from cgmq_fx.cost_models.errors import DataError
from cgmq_fx.cost_models.facts import Role
from cgmq_fx.passes.grid import MAX_GRID_BITS, PASS_THROUGH, power_of_two_range, round_to_grid
from cgmq_fx.passes.inputs import ExampleInputs
from cgmq_fx.passes.quantizer import Quantizer, QuantizerSpec
from cgmq_fx.tails import LARGEST, Extremes, Tail, noise

_PER_BATCH = 8192
_PER_WEIGHT = 8192
_CANDIDATES = 48
_HALVINGS = 7
_QUANTILE = 0.999
_TAIL = 3.0
_SMALLEST = 1e-25
"""What is smaller counts as zero: the steps of its grid could not be held."""

_GOLDEN = 0.6180339887498949


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Give back the buffers that a model's forward writes into, as they were."""
    before = [(tensor, tensor.detach().clone()) for tensor in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, kept in before:
                tensor.copy_(kept)


@dataclass(frozen=True, slots=True)
class RangeTable:
    """The ranges of one quantizer over its bit-widths.

    Attributes:
        log_ranges: Shape (bit-widths, *range shape): natural logarithm of the best range.
        noise: Shape (bit-widths, rows): 12 times the mean squared error there, clipping included:
            the square of the step if values are spread evenly. Heavy tails count in full, also
            where the sample misses them. It falls with the bit-width, to 0 at 32 bits. A row per
            range where gates have ranges of their own, else one.
        power: Mean square of the values.
        rows: Shape (gates,): the row of each gate; None where all have the first.
        distortion: Shape (bit-widths,): the relative squared error of the network's output when
            this quantizer alone has these bits; None where it was not measured.
    """

    log_ranges: Tensor
    noise: Tensor
    power: float
    rows: Tensor | None = None
    distortion: Tensor | None = None


def best_range(
    values: Tensor,
    bits: int,
    signed: bool,
    power_of_two: bool = False,
    empty: float = 1.0,
    seen: Tensor | float = 0.0,
) -> Tensor:
    """The range of least squared rounding error, robust against a few wild values.

    Values beyond three times the 99.9 % quantile count as if they stood there, so that one outlier
    cannot stretch the range. Where they hold much of the power, `range_table` goes further.

    Args:
        values: Shape (ranges, samples), finite.
        bits: Bit-width, 2 or more.
        signed: Whether the grid has codes below zero.
        power_of_two: Whether steps are powers of two; the range is then one of such a step.
        empty: The range where all values are zero.
        seen: Shape (ranges,): the largest of what `values` are a sample of, which counts where the
            sample is of zeros alone.

    Returns:
        Shape (ranges,), positive.
    """
    cap = _cap(values, signed, empty, seen)
    bits = min(bits, MAX_GRID_BITS)
    codes = 2**bits - 1
    reach = codes / (codes - 1) if signed else 1.0
    width = torch.tensor(bits, dtype=torch.int32, device=values.device)
    widest = cap * reach
    if power_of_two:  # the next one up: the nearest could clip
        widest = power_of_two_range(widest * 2**0.5, width, signed)
    if bits >= MAX_GRID_BITS:
        return widest
    clipped = torch.minimum(torch.maximum(values, -cap[:, None]), cap[:, None])
    best, least = widest, torch.full_like(cap, torch.inf)
    for share in _shares(power_of_two):
        limit = widest * share
        error = (round_to_grid(clipped, limit[:, None], width, signed) - clipped).square().mean(1)
        better = error < least
        best, least = torch.where(better, limit, best), torch.where(better, error, least)
    return best


def _cap(values: Tensor, signed: bool, empty: float, seen: Tensor | float) -> Tensor:
    """Where values are capped, shape (ranges,), positive."""
    size = values.abs() if signed else values.clamp(min=0)
    top = size.amax(1)
    top = torch.where(top > 0, top, seen)
    cap = torch.minimum(top, _TAIL * _quantile(size))
    cap = torch.where(cap > 0, cap, top)
    fallback = top.max() if bool(top.max() > 0) else torch.full_like(top.max(), empty)
    return torch.where(cap > 0, cap, fallback)


def _shares(power_of_two: bool) -> list[float]:
    """What shares of the widest range are tried."""
    if power_of_two:
        return [2.0**-halvings for halvings in range(_HALVINGS)]
    return torch.linspace(1.0, 1.0 / _CANDIDATES, _CANDIDATES).tolist()


def range_table(
    quantizer: Quantizer, values: Tensor, extremes: Extremes | None = None
) -> RangeTable:
    """The table of a quantizer.

    Ranges are those of `best_range`. Where the tail that it caps, or that the sample misses, holds
    more than a thousandth of the power, they are wider, as far as the other values can afford it;
    so are those of more than 8 bits, which clip nothing that they can hold. A sample of zeros alone
    can afford all: sparse inputs, of which it has met none, are not clipped.

    Args:
        quantizer: Its sign, bit-widths and range shape count.
        values: Shape (ranges, samples), finite.
        extremes: The largest of all values that `values` are a sample of; None if they are all.
    """
    shape, spec = quantizer.log_range.shape, quantizer.spec
    rows = _rows(spec)
    # a weight that starts at zero grows to what layers are usually initialised with
    empty = values.shape[1] ** -0.5 if spec.role is Role.WEIGHT else 1.0
    signed, power_of_two = quantizer.signed, spec.power_of_two
    extremes = extremes or Extremes.of(values)
    seen = extremes.top(signed)
    seen = torch.where(seen < _SMALLEST, 0.0, seen)
    cap = _cap(values, signed, empty, seen)
    tail = Tail(values, extremes, cap, signed)
    heavy = tail.heavy
    logs, errors = [], []
    for bits in spec.bit_widths:
        limit = best_range(values, max(bits, 2), signed, power_of_two, empty, seen)
        limit = tail.extended(limit, max(bits, 2), power_of_two)
        error = torch.where(heavy, tail.noise(limit, bits), noise(values, limit, bits, signed))
        logs.append(limit.log().reshape(shape))
        errors.append(error)
    table = torch.stack(errors)
    if rows is None:
        table = table.mean(1, keepdim=True)
    table = table.flip(0).cummax(0).values.flip(0)
    power = values.square().mean()
    if bool(heavy.any()):
        power = torch.where(heavy, tail.power, values.square().mean(1)).mean()
    return RangeTable(torch.stack(logs), table, float(power), rows)


def _rows(spec: QuantizerSpec) -> Tensor | None:
    """The number of the range of every gate, if gates have ranges of their own."""
    gates, ranges = spec.gate_shape, spec.range_shape
    if prod(ranges) == 1 or prod(gates) == 1 or len(gates) != len(ranges):
        return None
    if any(r not in (1, g) for g, r in zip(gates, ranges, strict=True)):
        return None
    numbers = torch.arange(prod(ranges), dtype=torch.int32).reshape(ranges)
    return numbers.expand(gates).flatten()


def calibrate(
    module: GraphModule,
    quantizers: Mapping[str, Quantizer],
    batches: Iterable[ExampleInputs],
    inputs: frozenset[str],
) -> dict[str, RangeTable]:
    """Measure what every quantizer sees, with nothing rounded, and make its table.

    Args:
        module: The graph.
        quantizers: Its quantizers by name.
        batches: Arguments to call it with.
        inputs: Names of the quantizers on network inputs: they become unsigned if the data is
            never negative.

    Returns:
        A table per quantizer.

    Raises:
        DataError: If there is no batch, or some quantizer sees no finite value.
    """
    watches = {name: _Watch(quantizer) for name, quantizer in quantizers.items()}
    hooks = [quantizers[n].register_forward_pre_hook(w) for n, w in watches.items()]
    try:
        count = _run(module, quantizers, batches)
    finally:
        for hook in hooks:
            hook.remove()
    if count == 0:
        raise DataError("there is no batch to calibrate with: the data is empty")
    tables = {}
    for name, quantizer in quantizers.items():
        values, extremes = watches[name].values(name), watches[name].extremes
        if name in inputs:
            seen = values if extremes is None else extremes.values
            quantizer.signed = bool((values < 0).any() or (seen < 0).any())
        tables[name] = range_table(quantizer, values, extremes)
    return tables


def _run(
    module: GraphModule, quantizers: Mapping[str, Quantizer], batches: Iterable[ExampleInputs]
) -> int:
    """Call the graph on every batch with nothing rounded; the number of batches."""
    training, count = module.training, 0
    kept = {name: q.bits.clone() for name, q in quantizers.items()}
    module.eval()
    try:
        for quantizer in quantizers.values():
            quantizer.bits.fill_(PASS_THROUGH)
        for batch in batches:
            _call(module, batch)
            count += 1
    finally:
        for name, quantizer in quantizers.items():
            quantizer.bits.copy_(kept[name])
        module.train(training)
    return count


@torch.no_grad()
def _call(module: GraphModule, batch: ExampleInputs) -> None:
    try:
        module(*batch.args, **batch.kwargs)
    except (RuntimeError, TypeError, ValueError) as error:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in batch.tensors)
        raise DataError(f"the model fails on a calibration batch of {shapes}: {error}") from error


class _Watch:
    """Collects a sample of what a quantizer sees: all of a weight's ranges, some of the rest."""

    def __init__(self, quantizer: Quantizer) -> None:
        self._spec = quantizer.spec
        self._parts: list[Tensor] = []
        self.extremes: Extremes | None = None

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        value = args[0].detach()
        if self._spec.role is Role.ACTIVATION:
            flat = value.reshape(1, -1).float()
            self._parts.append(_thin(flat, _PER_BATCH))
            found = Extremes.of(flat)
            self.extremes = found if self.extremes is None else self.extremes.merged(found)
        elif not self._parts:
            rows = self._per_range(value).float()
            self._parts.append(_thin(rows, _PER_WEIGHT))
            self.extremes = Extremes.of(rows)

    def values(self, name: str) -> Tensor:
        """Shape (ranges, samples); what is not finite or tiny is zero."""
        if not self._parts:
            raise DataError(f"no calibration batch reached {name}; is that part of the model used?")
        values = torch.cat(self._parts, 1)
        if not values.numel():
            raise DataError(f"the calibration batches have no values at {name}; are they empty?")
        finite = values.isfinite()
        if not bool(finite.any()):
            raise DataError(f"all calibration values at {name} are infinite or not a number")
        if not bool(finite.all()):
            values = torch.where(finite, values, torch.zeros_like(values))
        if float(values.abs().max()) > LARGEST:
            raise DataError(
                f"calibration values at {name} reach {float(values.abs().max()):.3g}, and squares "
                f"of what is beyond {LARGEST:g} overflow; scale the data or the weights"
            )
        return torch.where(values.abs() < _SMALLEST, torch.zeros_like(values), values)

    def _per_range(self, value: Tensor) -> Tensor:
        axes = [i for i, size in enumerate(self._spec.range_shape) if size != 1]
        return value.movedim(axes[0], 0).flatten(1) if axes else value.reshape(1, -1)


def _thin(values: Tensor, most: int) -> Tensor:
    """At most `most` columns, spread over all.

    The step between them shares no factor with their number: one that does would meet the same
    channels again and again, and miss the others.
    """
    size = values.shape[1]
    if size <= most:
        return values.clone()
    step = round(_GOLDEN * size)
    while gcd(step, size) > 1:
        step += 1
    return values[:, torch.arange(most, device=values.device) * step % size]


def _quantile(size: Tensor) -> Tensor:
    rank = max(1, round(_QUANTILE * size.shape[1]))
    return size.kthvalue(min(rank, size.shape[1]), dim=1).values
