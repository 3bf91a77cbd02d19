"""The modules that stand in a graph: quantizers of tensors and of biases."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from cgmq_fx.cost_models import Role
from cgmq_fx.passes.grid import finest_step, round_to_grid
from cgmq_fx.passes.kernel import Statistic
from cgmq_fx.passes.quantizer import BiasQuantizer, Quantizer, QuantizerSpec, TrainingFlag

WIDTHS = (2, 4, 8, 16, 32)
LOG_HALF = torch.tensor(0.5).log()


def quantizer(
    bits: int, signed: bool = True, gates: tuple[int, ...] = (), ranges: tuple[int, ...] = ()
) -> Quantizer:
    """A quantizer of the range 1/2."""
    made = Quantizer(QuantizerSpec(Role.WEIGHT, signed, WIDTHS, gates, ranges))
    made.log_range.detach().copy_(LOG_HALF)
    made.bits.fill_(bits)
    return made


def test_a_new_quantizer_passes_everything() -> None:
    made = Quantizer(QuantizerSpec(Role.ACTIVATION, False, WIDTHS, (1, 3, 1), ()))
    x = torch.randn(2, 3, 4)
    assert torch.equal(made(x), x)
    assert made.bits.shape == (1, 3, 1)
    assert list(made.state_dict()) == ["log_range", "bits"]


@pytest.mark.parametrize("signed", [True, False])
def test_it_rounds_with_its_own_range_bits_and_sign(signed: bool) -> None:
    made = quantizer(4, signed=not signed)
    made.signed = signed  # calibration may change it
    x = torch.linspace(-1, 1, 21)
    assert torch.equal(made(x), round_to_grid(x, made.log_range.exp(), made.bits, signed))


def test_the_logarithm_of_the_range_is_trained() -> None:
    made = quantizer(8)
    made(torch.tensor([5.0])).backward()
    # d(127 step)/d(log range) = 254 / 255 * range, scaled by 1 / sqrt(1 element * 127).
    assert made.log_range.grad == pytest.approx(254 / 255 * 0.5 / 127**0.5, rel=1e-5)


ROWS = [(Statistic.NONE, None), (Statistic.CHANGE, 1), (Statistic.MAGNITUDES, 3)]


@pytest.mark.parametrize(("statistic", "rows"), ROWS)
def test_what_is_observed_arrives_at_the_probe(statistic: Statistic, rows: int | None) -> None:
    made = quantizer(4, gates=(3, 1), ranges=(3, 1))
    made.observe(Statistic.CHANGE)
    made.observe(statistic)
    if made.adjacent is not None:
        made.adjacent.fill_(2)
    made(torch.rand(3, 4)).square().sum().backward()
    assert made.log_range.grad is not None
    if rows is None:
        assert made.probe is None
    else:
        assert made.probe is not None
        assert made.probe.grad is not None
        assert made.probe.grad.shape == (rows, 3, 1)
        assert (made.probe.grad > 0).all()


def test_nothing_is_observed_without_gradients() -> None:
    made = quantizer(4)
    made.observe(Statistic.CHANGE)
    with torch.no_grad():
        assert not made(torch.rand(5)).requires_grad


MOVES: dict[str, Callable[[nn.Module], Any]] = {
    "to": lambda m: m.to(torch.float64),
    "double": lambda m: m.double(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "twice": lambda m: copy.deepcopy(m.double()).double(),
}


@pytest.mark.parametrize("name", MOVES)
def test_the_probe_stays_a_leaf(name: str) -> None:
    made = quantizer(4)
    made.observe(Statistic.CHANGE)
    moved = MOVES[name](nn.Sequential(made))[0]
    assert isinstance(moved, Quantizer)
    assert moved.probe is not None
    assert moved.adjacent is not None
    assert moved.probe.is_leaf
    assert moved.probe.dtype == moved.log_range.dtype
    moved.adjacent.fill_(8)
    moved(torch.rand(9, dtype=moved.log_range.dtype)).sum().backward()
    assert moved.probe.grad is not None
    assert moved.probe.grad.item() > 0


def test_buffers_and_state_are_the_same_throughout() -> None:
    made = quantizer(4)
    for statistic in (Statistic.CHANGE, Statistic.MAGNITUDES, Statistic.NONE):
        made.observe(statistic)
        assert set(dict(made.named_buffers())) == {"bits"}
        assert set(made.state_dict()) == {"log_range", "bits"}


def test_averages_of_weights_outlive_the_search() -> None:
    made = quantizer(4)
    made.observe(Statistic.CHANGE)
    average = AveragedModel(made)
    average.update_parameters(made)
    made.observe(Statistic.NONE)
    made.bits.fill_(2)
    average.update_parameters(made)
    assert average.module.bits == 2


def test_a_copy_shares_nothing() -> None:
    made = quantizer(4)
    made.observe(Statistic.CHANGE)
    made(torch.rand(5)).sum().backward()
    duplicate = copy.deepcopy(made)
    duplicate.bits.fill_(2)
    duplicate.log_range.detach().zero_()
    assert made.bits.item() == 4
    assert made.log_range.item() == pytest.approx(LOG_HALF.item())
    assert (duplicate.spec, duplicate.statistic) == (made.spec, made.statistic)


def test_a_quantizer_observes_after_a_move_to_float64() -> None:
    made = quantizer(4).double()
    made.observe(Statistic.MAGNITUDES)
    made(torch.rand(5, dtype=torch.float64)).sum().backward()
    assert made.probe is not None
    assert made.probe.grad is not None


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (quantizer(4), "weight, signed, bits=[4], gates=1"),
        (quantizer(2, signed=False, gates=(3, 1)), "weight, unsigned, bits=[2], gates=3"),
        (BiasQuantizer(False, True), "input_signed=False, weight_signed=True"),
    ],
)
def test_a_printed_module_tells_what_it_does(made: nn.Module, text: str) -> None:
    assert text in repr(made)


# Range 1/2 signed: step 1 / (2^b - 1). Unsigned: half of that.
FINEST = [
    ([8], True, 1 / 255),
    ([8], False, 0.5 / 255),
    ([2, 8, 4], True, 1 / 255),
    ([2, 16, 8], True, 1 / 65535),
    ([0, 2], True, 1 / 3),
    ([2, 32], True, 0),
    ([32], False, 0),
]


@pytest.mark.parametrize(("bits", "signed", "expected"), FINEST)
def test_the_finest_step_in_use(bits: list[int], signed: bool, expected: float) -> None:
    found = finest_step(LOG_HALF, torch.tensor(bits), signed)
    assert found.shape == ()
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_the_finest_step_per_channel_of_gates_per_element() -> None:
    log_range = torch.tensor([1.0, 3.0]).log().view(2, 1)
    bits = torch.tensor([[2, 4, 2], [2, 32, 4]])
    found = finest_step(log_range, bits, signed=True)
    torch.testing.assert_close(found, torch.tensor([[2 / 15], [0.0]]))
    torch.testing.assert_close(
        finest_step(log_range, torch.tensor(2), signed=False), torch.tensor([[1 / 3], [1.0]])
    )


def rounded(bias: Tensor, weight: Quantizer, input_bits: int) -> Tensor:
    """The bias on the grid of an unsigned input of range 1/2 and `weight`."""
    made = BiasQuantizer(input_signed=False, weight_signed=True)
    result: Tensor = made(bias, LOG_HALF, torch.tensor(input_bits), weight.log_range, weight.bits)
    return result


@pytest.mark.parametrize(("weight_bits", "input_bits"), [(8, 8), (2, 2), (4, 8), (16, 2)])
def test_a_bias_is_a_multiple_of_both_steps(weight_bits: int, input_bits: int) -> None:
    bias = torch.tensor([0.3, -0.0123, 1e-5, 0.0, -2.01], dtype=torch.float64)
    step = 0.5 / (2**input_bits - 1) / (2**weight_bits - 1)
    expected = [round(b / step) * step for b in bias.tolist()]
    found = rounded(bias, quantizer(weight_bits).double(), input_bits)
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_a_bias_follows_the_ranges_and_bits_of_its_channels() -> None:
    weight = quantizer(8, gates=(3, 2), ranges=(3, 1))
    weight.log_range.detach().copy_(torch.tensor([[1.0], [2.0], [3.0]]).log())
    weight.bits.copy_(torch.tensor([[2, 4], [2, 2], [32, 2]]))
    # Steps of the channels: 2 / 15, 4 / 3, none; of the input at 2 bits: 1 / 6.
    found = rounded(torch.tensor([0.1, 0.1, 0.1]), weight, 2)
    assert found.tolist() == pytest.approx([round(0.1 * 45) / 45, 0.0, 0.1], rel=1e-6)


@pytest.mark.parametrize(("weight_bits", "input_bits"), [(32, 8), (8, 32), (32, 32)])
def test_a_bias_passes_where_an_operand_is_float(weight_bits: int, input_bits: int) -> None:
    bias = torch.randn(5)
    assert torch.equal(rounded(bias, quantizer(weight_bits), input_bits), bias)


def test_a_bias_beyond_32_bits_is_on_a_coarser_grid() -> None:
    step = 2 * 0.5 / 65535 / 65535  # 5 would be code 2.1e10
    bias = torch.tensor([5.0, -5.0, 0.2, 3 * step], dtype=torch.float64)
    found = rounded(bias, quantizer(16).double(), 16)
    assert (found / (16 * step)).tolist() == pytest.approx([*((bias / step / 16).round().tolist())])
    assert found[:3].tolist() == pytest.approx([5.0, -5.0, 0.2], rel=1e-7)
    assert found[3] == 0.0
    largest = float(found.abs().max()) / step
    assert largest / 16 < 2**31 < largest / 8


def test_channels_have_coarser_grids_of_their_own() -> None:
    weight = quantizer(16, ranges=(3, 1))
    weight.log_range.detach().copy_(torch.tensor([[1.0], [1.0], [1e-6]]).log())
    bias = torch.tensor([0.7, 9.0, 9.0])
    assert rounded(bias, weight, 16).tolist() == pytest.approx(bias.tolist(), rel=1e-7)


@pytest.mark.parametrize("bits", [2, 8, 32])
def test_the_gradient_of_a_bias_goes_straight_through(bits: int) -> None:
    bias, weight = torch.randn(4, requires_grad=True), quantizer(bits)
    upstream = torch.tensor([1.0, -2.0, 0.5, 0.0])
    rounded(bias, weight, 8).backward(upstream)
    assert bias.grad is not None
    assert torch.equal(bias.grad, upstream)
    assert weight.log_range.grad is None


def test_the_training_flag_follows_its_module() -> None:
    flag = TrainingFlag()
    assert flag() is True
    assert flag.eval()() is False
