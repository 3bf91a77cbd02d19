"""Steps that are powers of two: the same grid in training, biases, calibration and files."""

from __future__ import annotations

from math import log2
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule

import cgmq_fx
from cgmq_fx import Scheme
from cgmq_fx.calibrate import best_range
from cgmq_fx.cost_models.facts import Role
from cgmq_fx.passes.bias import BIASES
from cgmq_fx.passes.grid import finest_step, grid, power_of_two_range, round_to_grid
from cgmq_fx.passes.quantizer import Quantizer, QuantizerSpec
from tests.nets import NETS, quantizers, small_classifier

BITS = [0, 2, 3, 4, 7, 8, 12, 16]
SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
POWERS = Scheme((2, 4, 8), weight_ranges="tensor", output_bits=8, power_of_two=True)


def is_power_of_two(step: Tensor) -> bool:
    return bool((torch.frexp(step).mantissa == 0.5).all())


@SIGNS
@pytest.mark.parametrize("bits", BITS)
@given(limit=st.floats(2.0**-60, 2.0**60, width=32))
def test_the_step_is_the_nearest_power_of_two(bits: int, signed: bool, limit: float) -> None:
    width, given_range = torch.tensor(bits), torch.tensor(limit)
    found = power_of_two_range(given_range, width, signed)
    step, asked = grid(found, width, signed).step, grid(given_range, width, signed).step
    assert is_power_of_two(step)
    assert abs(log2(step.item()) - log2(asked.item())) <= 0.5 + 1e-6


@SIGNS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_range_of_any_dtype_has_exact_steps(dtype: torch.dtype, signed: bool) -> None:
    bits = torch.tensor(BITS)
    found = power_of_two_range(torch.tensor(3.0, dtype=dtype), bits, signed)
    assert is_power_of_two(grid(found, bits, signed).step)


@SIGNS
@pytest.mark.parametrize("bits", BITS)
def test_a_range_of_such_a_step_stays(bits: int, signed: bool) -> None:
    width = torch.tensor(bits)
    once = power_of_two_range(torch.tensor(0.7), width, signed)
    assert torch.equal(power_of_two_range(once, width, signed), once)
    stored = once.log().exp()  # as a trained logarithm, which is not exact
    assert torch.equal(power_of_two_range(stored, width, signed), once)


@SIGNS
def test_powers_of_two_nest_for_all_bit_widths(signed: bool) -> None:
    bits = torch.tensor([2, 3, 5, 8])
    step = grid(power_of_two_range(torch.tensor(0.7), bits, signed), bits, signed).step
    assert (step / finest_step(torch.tensor(0.7).log(), bits, signed, True)).frac().eq(0).all()


def made(bits: int, signed: bool, limit: float) -> Quantizer:
    quantizer = Quantizer(QuantizerSpec(Role.WEIGHT, signed, (2, 4, 8), power_of_two=True))
    quantizer.bits.fill_(bits)
    quantizer.log_range.detach().fill_(limit).log_()
    return quantizer


def test_values_are_multiples_of_the_step() -> None:
    # Range 1 at 4 bits: 2 / 15 = 0.133, nearest is 1/8; codes -7 .. 7.
    x = torch.tensor([0.3, -0.2, 5.0, -5.0, 0.0624])
    assert made(4, True, 1.0)(x).tolist() == [0.25, -0.25, 0.875, -0.875, 0.0]


def test_the_range_follows_the_step_and_not_the_other_way() -> None:
    # Range 1 at 2 bits, unsigned: 1 / 3, nearest is 1/4 (ratio 1.33, not 1.5): range 3/4.
    quantizer = made(2, False, 1.0)
    assert quantizer.limit.item() == 0.75
    x = torch.tensor([0.74, 0.8], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 0.0]  # what is beyond 3/4 is clipped


@SIGNS
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_gradient_of_the_range_is_that_of_a_free_step(bits: int, signed: bool) -> None:
    x = torch.linspace(-2, 2, 101)
    quantizer = made(bits, signed, 0.7)
    free = Quantizer(QuantizerSpec(Role.WEIGHT, signed, (2, 4, 8)))
    free.bits.fill_(bits)
    free.log_range.detach().copy_(quantizer.limit.detach().log())
    for one in (quantizer, free):
        one(x).square().sum().backward()
    assert quantizer.log_range.grad is not None
    assert quantizer.log_range.grad.item() != 0
    torch.testing.assert_close(quantizer.log_range.grad, free.log_range.grad)


def test_training_moves_the_step() -> None:
    x, quantizer = torch.linspace(-1, 1, 200), made(4, True, 0.1)
    optimizer = torch.optim.Adam([quantizer.log_range], lr=0.05)
    steps = set()
    for _ in range(100):
        optimizer.zero_grad()
        (quantizer(x) - x).square().sum().backward()
        optimizer.step()
        steps.add(grid(quantizer.limit.detach(), quantizer.bits, True).step.item())
    assert {log2(s) % 1 for s in steps} == {0.0}
    assert 0.125 in steps  # 7 x 1/8 covers -1 .. 1, from 2^-6 on


@SIGNS
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_calibration_finds_the_best_power_of_two(bits: int, signed: bool) -> None:
    values = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    width = torch.tensor(bits)

    def error(limit: Tensor) -> float:
        return float((round_to_grid(values, limit, width, signed) - values).square().sum())

    found = best_range(values, bits, signed, power_of_two=True)
    assert is_power_of_two(grid(found, width, signed).step)
    tried = [error(power_of_two_range(torch.tensor(2.0**k), width, signed)) for k in range(-9, 9)]
    # At 16 bits nothing is clipped: half of the range would round the rest more finely.
    assert error(found) <= min(tried) * (5 if bits == 16 else 1 + 1e-6)


def test_calibration_never_clips_what_was_seen_at_16_bits() -> None:
    values = torch.tensor([[-1.3, 0.4, 1.0]])
    assert best_range(values, 16, True, power_of_two=True) >= 1.3


@pytest.fixture(scope="module")
def result() -> cgmq_fx.Result:
    data = [(torch.randn(16, 3), torch.randint(2, (16,))) for _ in range(4)]
    return cgmq_fx.quantize(
        small_classifier(),
        "bops <= 5%",
        data,
        loss=torch.nn.functional.cross_entropy,
        epochs=2,
        scheme=POWERS,
        progress=False,
    )


def steps(module: GraphModule) -> list[Tensor]:
    return [
        finest_step(q.log_range.detach(), q.bits, q.signed, True)
        for q in quantizers(module).values()
    ]


def test_every_grid_of_a_result_has_such_a_step(result: cgmq_fx.Result) -> None:
    seen: list[tuple[Tensor, Quantizer]] = []
    hooks = [
        q.register_forward_hook(lambda q, _, y: seen.append((y.detach(), q)))
        for q in quantizers(result.model).values()
    ]
    output = result.model(torch.randn(5, 3))
    for hook in hooks:
        hook.remove()
    assert len(seen) == 5  # two inputs, two weights, one output
    for values, quantizer in seen:
        step = finest_step(quantizer.log_range.detach(), quantizer.bits, quantizer.signed, True)
        assert is_power_of_two(step)
        assert (values / step).frac().eq(0).all()
    assert torch.equal(seen[-1][0], output)


def test_biases_are_on_the_grid_of_both_steps(result: cgmq_fx.Result) -> None:
    rounded: list[Tensor] = []
    for bias in result.model.get_submodule(BIASES).children():
        assert "power_of_two" in repr(bias)
        bias.register_forward_hook(lambda *a: rounded.append(a[2].detach()))
    result.model(torch.randn(5, 3))
    own = steps(result.model)
    for index, bias_values in enumerate(rounded):
        step = own[2 * index] * own[2 * index + 1]
        assert is_power_of_two(step)
        assert (bias_values / step).frac().eq(0).all()


def test_a_saved_result_has_the_same_grid(result: cgmq_fx.Result, tmp_path: Path) -> None:
    loaded = cgmq_fx.load(result.save(tmp_path / "net.safetensors"))
    x = torch.randn(64, 3)
    assert torch.equal(loaded.model(x), result.model(x))
    assert all(q.spec.power_of_two for q in quantizers(loaded.model).values())


def test_a_report_shows_the_range_that_is_used(result: cgmq_fx.Result) -> None:
    rows = {row["name"]: row for row in result.report()["quantizers"]}
    for name, quantizer in quantizers(result.model).items():
        assert rows[name]["range"] == [quantizer.limit.item()] * 2


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("cnn", ["linear"]),
        ("keywords", ["linear", "linear_1", "add"]),
        ("residual", ["linear"]),
        ("concat", ["conv2d_2"]),
    ],
)
def test_outputs_are_on_grids(name: str, outputs: list[str]) -> None:
    plain = set(quantizers(NETS[name].quantized()))
    found = quantizers(NETS[name].quantized(Scheme(output_bits=8)))
    assert sorted(set(found) - plain) == sorted(outputs)
    assert {found[n].spec.bit_widths for n in set(outputs) & set(found)} == {(8,)}
