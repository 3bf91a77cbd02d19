"""The fake-quantize kernel against definitions written out here."""

from math import sqrt
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from cgmq_fx.gates import level_of
from cgmq_fx.passes.grid import adjacent_widths, round_to_grid
from cgmq_fx.passes.kernel import Statistic, fake_quantize, fake_quantize_backward

CHAIN = (2, 4, 8, 16)
SHAPE = (3, 4)
SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


class Case(NamedTuple):
    """A tensor with its ranges and bits, in shapes that broadcast."""

    x: Tensor
    limit: Tensor
    bits: Tensor
    signed: bool


def shaped(values: list[Any], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values[: int(np.prod(shape))], dtype=dtype).reshape(shape)


def cases(widths: tuple[int, ...]) -> st.SearchStrategy[Case]:
    """Per tensor, channel and element; values inside and outside the range."""
    size = int(np.prod(SHAPE))
    values = st.floats(-3, 3, allow_subnormal=False)
    limits = st.floats(0.125, 2)
    return st.builds(
        lambda x, limit, bits, ranges, gates, signed: Case(
            shaped(x, SHAPE, torch.float64),
            shaped(limit, ranges, torch.float64),
            shaped(bits, gates, torch.int32),
            signed,
        ),
        st.lists(values, min_size=size, max_size=size),
        st.lists(limits, min_size=3, max_size=3),
        st.lists(st.sampled_from(widths), min_size=size, max_size=size),
        st.sampled_from([(), (3, 1)]),
        st.sampled_from([(), (3, 1), SHAPE]),
        st.booleans(),
    )


def step_of(limit: Tensor, bits: Tensor | int, signed: bool) -> Tensor:
    return (2 if signed else 1) * limit / (2.0 ** torch.as_tensor(bits).double() - 1)


def inside(case: Case) -> Tensor:
    """`x` clipped to just inside its range: the end of a signed one is half a step from a code."""
    limit = case.limit * (1 - 1e-7)
    return torch.minimum(torch.maximum(case.x, -limit if case.signed else limit * 0), limit)


def residual_chain(case: Case) -> Tensor:
    """`x_2 + z_4*(e_4 + z_8*(e_8 + z_16*e_16))` of Bayesian Bits (NeurIPS 2020, section 2)."""
    x, gate, total = inside(case), torch.ones_like(case.x), torch.zeros_like(case.x)
    for level in CHAIN:
        gate = gate * (case.bits >= level)
        step = step_of(case.limit, level, case.signed)
        total = total + gate * step * ((x - total) / step).round()
    return total


@settings(deadline=None)
@given(cases(CHAIN))
def test_the_residual_chain_telescopes_to_direct_rounding(case: Case) -> None:
    codes = inside(case) / step_of(case.limit, case.bits, case.signed)
    tie = (codes - codes.floor() - 0.5).abs() < 1e-8
    difference = round_to_grid(*case) - residual_chain(case)
    assert difference.masked_fill(tie, 0).abs().max() < 1e-12


@settings(deadline=None)
@given(cases((0, 2, 3, 4, 8, 16, 32)))
def test_values_are_the_nearest_of_their_grid(case: Case) -> None:
    rounded, bits = round_to_grid(*case), case.bits.expand(SHAPE)
    step = step_of(case.limit, case.bits.clamp(1, 16), case.signed).expand(SHAPE)
    top = (2.0 ** (bits.clamp(max=16) - 1)).floor() - 1 if case.signed else 2.0**bits - 1
    codes = rounded / step
    assert torch.equal(rounded[bits == 32], case.x[bits == 32])
    assert not rounded[bits == 0].any()
    on = (bits > 0) & (bits < 32)
    assert (codes - codes.round())[on].abs().sum() < 1e-9
    assert (codes.round().abs() <= top)[on].all()
    assert ((rounded - inside(case)).abs() <= step * 0.5 + 1e-6)[on].all()


@settings(deadline=None)
@given(st.lists(st.floats(0.5, 5.5), min_size=2, max_size=9), st.integers(1, 5))
def test_the_level_rises_with_the_gate(gates: list[float], count: int) -> None:
    ordered = torch.tensor(sorted(gates)).clamp(max=count + 0.5)
    levels = level_of(ordered, torch.full(ordered.shape, count))
    assert (levels.diff() >= 0).all()
    assert 0 <= levels.min() <= levels.max() < count


# The k-th bit-width, counted from 0, iff k < gate <= k + 1.
LEVELS = [(0.5, 0), (1.0, 0), (1.001, 1), (2.0, 1), (2.5, 2), (3.0, 2), (3.5, 2)]


@pytest.mark.parametrize(("gate", "level"), LEVELS)
def test_the_level_of_a_gate(gate: float, level: int) -> None:
    assert level_of(torch.tensor([gate]), torch.tensor([3])).item() == level


def test_thirty_two_bits_pass_whatever_comes() -> None:
    x = torch.tensor([0.1, -1e30, torch.inf, -torch.inf, torch.nan, 1e-40])
    for bits in (torch.tensor(32), torch.full((6,), 32)):
        out = fake_quantize(x, torch.tensor(1.0), bits, None, None, True, False, 0)
        assert torch.equal(out.view(torch.int32), x.view(torch.int32))


def scaled(limit: Tensor, x: Tensor, high: Tensor) -> Tensor:
    """The range with its gradient scaled by 1 / sqrt(elements per range * highest code), LSQ."""
    factor = 1 / sqrt(x.numel() / limit.numel() * float(high.mean()))
    return limit * factor + (limit - limit * factor).detach()


def composite(case: Case) -> Tensor:
    """The quantizer in plain autograd, with straight-through rounding."""
    x, limit, bits, signed = case
    x = x.float() if x.dtype == torch.bfloat16 else x
    codes = 2.0 ** bits.clamp(max=16)
    high = torch.where(bits == 0, 0, codes / 2 - 1 if signed else codes - 1)
    limit = scaled(limit, x, high).to(x.dtype)
    clipped = torch.minimum(torch.maximum(x, -limit if signed else limit * 0), limit)
    step = limit * (2 if signed else 1) / (codes - 1).clamp(min=1)
    code = clipped / step
    nearest = torch.minimum(torch.maximum(code.round(), -high if signed else high * 0), high)
    rounded = (code + (nearest - code).detach()) * step
    within = (x.abs() <= limit) if signed else (x >= 0) & (x <= limit)
    pruned = x * within - (x * within).detach()  # no range reaches the output
    result = torch.where(bits == 32, x, torch.where(bits == 0, pruned, rounded))
    return result.to(case.x.dtype)


DTYPES = [torch.float32, torch.float64, torch.bfloat16]
GRANULARITIES = [((), ()), ((), (3, 1, 1)), ((3, 1, 1), (3, 1, 1)), ((3, 1, 1), (3, 4, 5))]


@SIGNS
@pytest.mark.parametrize(("ranges", "gates"), GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(2,), (8,), (4, 32), (0, 2, 4, 8, 32)])
def test_gradients_equal_the_composite_form(
    widths: tuple[int, ...],
    dtype: torch.dtype,
    ranges: tuple[int, ...],
    gates: tuple[int, ...],
    signed: bool,
) -> None:
    random = torch.Generator().manual_seed(0)
    bits = torch.tensor(widths, dtype=torch.int32)
    bits = bits[torch.randint(len(widths), gates, generator=random)]
    x = torch.randn(3, 4, 5, generator=random).to(dtype)
    limit = torch.rand(ranges, generator=random) + 0.3
    upstream = torch.randn(3, 4, 5, generator=random).to(dtype)
    found = [t.clone().requires_grad_() for t in (x, limit)]
    wanted = [t.clone().requires_grad_() for t in (x, limit)]
    y = fake_quantize(found[0], found[1], bits, None, None, signed, False, 0)
    expected = composite(Case(wanted[0], wanted[1], bits, signed))
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    y.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(found[0].grad, wanted[0].grad, rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1].grad, wanted[1].grad, rtol=1e-4, atol=1e-6)


def test_the_range_gets_the_gradient_of_lsq() -> None:
    # Beyond the range at 8 bits signed, y = 127 * step and step = 2 * limit / 255, so
    # dy/dlimit = 254 / 255; one element and highest code 127: scaled by 1 / sqrt(127).
    limit = torch.ones((), requires_grad=True)
    fake_quantize(
        torch.tensor([5.0]), limit, torch.tensor(8), None, None, True, False, 0
    ).backward()
    assert limit.grad == pytest.approx(254 / 255 / sqrt(127), rel=1e-6)


class Probed(NamedTuple):
    """Shapes of a tensor and its gates, and whether dimension 0 is the batch."""

    x: tuple[int, ...]
    gates: tuple[int, ...]
    batched: bool


PROBED = [
    Probed((2, 3, 4), (), True),
    Probed((2, 3, 4), (1, 3, 1), True),
    Probed((2, 3, 4), (), False),
    Probed((3, 4), (3, 1), False),
    Probed((3, 4), (3, 4), False),
]


def gate_of(index: tuple[int, ...], gates: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(min(i, size - 1) for i, size in zip(index, gates, strict=False))


def sums(values: Tensor, gates: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Per gate, the sum over its elements and how many there are, element by element."""
    total, count = torch.zeros(gates), torch.zeros(gates)
    for index in np.ndindex(*values.shape):
        total[gate_of(index, gates)] += values[index]
        count[gate_of(index, gates)] += 1
    return total, count


def probe(shapes: Probed, statistic: Statistic, passes: int = 1) -> dict[str, Tensor]:
    """A random tensor, its upstream gradient, its bits, and what the probe reports."""
    random = torch.Generator().manual_seed(3)
    x, upstream = (torch.randn(shapes.x, generator=random) for _ in range(2))
    widths = (0, 2, 4, 32)
    bits = torch.tensor(widths)[torch.randint(4, shapes.gates, generator=random)]
    adjacent = adjacent_widths(widths)
    reported = torch.zeros((statistic.rows, *shapes.gates), requires_grad=True)
    leaf = x.clone().requires_grad_()
    for _ in range(passes):
        y = fake_quantize(
            leaf, torch.tensor(0.9), bits, adjacent, reported, True, shapes.batched, int(statistic)
        )
        y.backward(upstream)
    assert reported.grad is not None
    return {"x": x, "g": upstream, "bits": bits, "to": adjacent[bits], "found": reported.grad}


@pytest.mark.parametrize("shapes", PROBED)
def test_the_probe_reports_the_squared_change_of_the_loss(shapes: Probed) -> None:
    case, limit = probe(shapes, Statistic.CHANGE), torch.tensor(0.9)
    after, before = (round_to_grid(case["x"], limit, case[b], True) for b in ("to", "bits"))
    expected, _ = sums((case["g"] * (after - before)) ** 2, shapes.gates)
    torch.testing.assert_close(case["found"], expected.unsqueeze(0))
    assert expected.any()


@pytest.mark.parametrize("shapes", PROBED)
def test_the_probe_reports_mean_magnitudes(shapes: Probed) -> None:
    case = probe(shapes, Statistic.MAGNITUDES)
    g, x = case["g"], case["x"]
    if shapes.batched:
        g, x = g.mean(0, keepdim=True), x.mean(0, keepdim=True)
    for row, values in zip(case["found"], (g.abs(), x.abs(), (g * x).abs()), strict=True):
        total, count = sums(values, shapes.gates)
        torch.testing.assert_close(row, total / count)


def test_what_is_compared_with_is_a_table_of_all_bit_widths() -> None:
    x, bits = torch.ones(5000), torch.tensor(4, dtype=torch.int8)
    with pytest.raises(ValueError, match="table of 33"):
        fake_quantize_backward(x, x, torch.tensor(1.0), bits, bits, True, False, 1)


def test_the_probe_adds_up_over_micro_batches() -> None:
    once, twice = (probe(PROBED[1], Statistic.CHANGE, passes)["found"] for passes in (1, 2))
    torch.testing.assert_close(twice, 2 * once)


ELEMENT_GATES = torch.tensor([2, 4, 8, 32, 0, 16], dtype=torch.int32).repeat(60).view(6, 3, 4, 5)
CHANNEL_GATES = torch.tensor([4, 32, 2], dtype=torch.int32).view(1, 3, 1, 1)
BESIDE = adjacent_widths((0, 2, 4, 8, 16, 32))
ONE_GATE = torch.tensor(4, dtype=torch.int32)
CHANNELS_LAST = torch.randn(6, 3, 4, 5).to(memory_format=torch.channels_last)
INPUTS = {
    "one gate": (torch.randn(4, 6), ONE_GATE, Statistic.NONE),
    "transposed": (torch.randn(4, 6).t(), ONE_GATE, Statistic.CHANGE),
    "sliced": (torch.randn(4, 6)[:, ::2], ONE_GATE, Statistic.NONE),
    "expanded": (torch.randn(4, 1).expand(4, 3), ONE_GATE, Statistic.NONE),
    "empty": (torch.randn(0, 6), ONE_GATE, Statistic.CHANGE),
    "channels": (torch.randn(6, 3, 4, 5), CHANNEL_GATES, Statistic.MAGNITUDES),
    "channels last": (CHANNELS_LAST, CHANNEL_GATES, Statistic.CHANGE),
    "elements, channels last": (CHANNELS_LAST, ELEMENT_GATES, Statistic.CHANGE),
    "bfloat16": (CHANNELS_LAST.bfloat16(), CHANNEL_GATES, Statistic.MAGNITUDES),
    "float64": (CHANNELS_LAST.double(), ONE_GATE, Statistic.CHANGE),
}
ALL_INPUTS = pytest.mark.parametrize(("x", "bits", "statistic"), INPUTS.values(), ids=INPUTS)


@ALL_INPUTS
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's, in torch 2.14
def test_the_ops_pass_the_checks_of_torch(x: Tensor, bits: Tensor, statistic: Statistic) -> None:
    limit = torch.tensor(0.8, requires_grad=True)
    reported = torch.zeros((statistic.rows, *bits.shape), requires_grad=True)
    options = (True, True, int(statistic))
    opcheck(fake_quantize, (x.clone().requires_grad_(), limit, bits, BESIDE, reported, *options))
    backward = (torch.randn(x.shape).to(x), x, limit.detach(), bits, BESIDE, *options)
    opcheck(fake_quantize_backward, backward, test_utils=("test_schema", "test_faketensor"))


def upstreams(x: Tensor) -> list[Tensor]:
    """Gradients as they come: like `x`, contiguous, expanded from a sum."""
    dense = torch.ones(x.shape, dtype=x.dtype)
    return [torch.ones_like(x), dense, torch.ones((), dtype=x.dtype).expand(x.shape)]


@ALL_INPUTS
def test_memory_formats_are_kept_and_foretold(
    x: Tensor, bits: Tensor, statistic: Statistic
) -> None:
    limit = torch.tensor(0.8)
    y = fake_quantize(x, limit, bits, None, None, True, True, 0)
    assert (y.stride(), y.dtype) == (torch.empty_like(x).stride(), x.dtype)
    for upstream in upstreams(x):
        args = (upstream, x, limit, bits, BESIDE, True, True, int(statistic))
        with FakeTensorMode() as mode:
            foretold = fake_quantize_backward(
                *(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args)
            )
        real = fake_quantize_backward(*args)
        assert [t.stride() for t in real] == [t.stride() for t in foretold]
        assert real[0].stride() == y.stride()


def test_a_part_of_a_tensor_comes_out_contiguous() -> None:
    heads = torch.randn(2, 5, 3, 4, 8)[:, :, 1].transpose(1, 2)  # as attention has its queries
    y = fake_quantize(heads, torch.tensor(0.8), ONE_GATE, None, None, True, True, 0)
    assert not torch.empty_like(heads).is_contiguous()
    assert y.is_contiguous()  # a product would copy it otherwise, and keep the copy for backward
    assert torch.equal(y, round_to_grid(heads, torch.tensor(0.8), ONE_GATE, True))


def test_nothing_is_recorded_without_gradients() -> None:
    x, limit = torch.randn(5, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    with torch.no_grad():
        y = fake_quantize(x, limit, torch.tensor(4), None, None, True, False, 0)
    assert not y.requires_grad
    assert torch.equal(y, round_to_grid(x, limit, torch.tensor(4), True))


def test_an_empty_batch_has_gradients_of_zero() -> None:
    x, limit = torch.zeros(0, 4, requires_grad=True), torch.ones((), requires_grad=True)
    fake_quantize(x, limit, torch.tensor(4), None, None, True, True, 0).sum().backward()
    assert limit.grad == 0


def test_a_gate_that_moves_compiles_nothing_again() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def quantized(x: Tensor, limit: Tensor, bits: Tensor) -> Tensor:
        y: Tensor = fake_quantize(x * 2, limit, bits, None, None, True, True, 0)
        return y

    limit = torch.tensor(0.8, requires_grad=True)
    for bits in (2, 8, 32):
        gates = torch.full((1, 3, 1, 1), bits)
        y = quantized(CHANNELS_LAST, limit, gates)
        y.sum().backward()
        assert torch.equal(y, round_to_grid(CHANNELS_LAST * 2, limit, gates, True))
    assert counter.frame_count == 1
