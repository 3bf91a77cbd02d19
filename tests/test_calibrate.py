"""Calibration: ranges of least squared error that a few wild values cannot stretch."""

import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import cgmq_fx
from cgmq_fx.calibrate import RangeTable, best_range, calibrate, range_table
from cgmq_fx.cost_models.facts import Role
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.grid import round_to_grid
from cgmq_fx.passes.insert import QUANTIZERS
from cgmq_fx.passes.quantizer import Quantizer, QuantizerSpec
from cgmq_fx.tails import Extremes

COUNT = 10_000


def normal(count: int = COUNT) -> Tensor:
    return torch.randn(1, count, generator=torch.Generator().manual_seed(0))


VALUES: dict[str, tuple[Tensor, bool, float]] = {
    "normal": (normal(), True, 1.02),
    "laplace": (normal().exp() * normal().sign(), True, 1.02),
    "uniform": (torch.linspace(-1, 1, COUNT)[None], True, 1.02),
    "relu": (normal().relu(), False, 1.02),
    "sigmoid": (normal().sigmoid(), False, 1.05),  # the last two fit a grid best in narrow places
    "shifted": (normal() * 0.1 + 3, True, 1.05),
}


def squared_error(values: Tensor, limit: float, bits: int, signed: bool) -> float:
    rounded = round_to_grid(values, torch.tensor(limit), torch.tensor(bits), signed)
    return float((rounded - values).square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", VALUES)
def test_range_is_near_the_best_of_a_fine_search(name: str, bits: int) -> None:
    values, signed, factor = VALUES[name]
    found = squared_error(values, float(best_range(values, bits, signed)), bits, signed)
    top = 1.5 * float(values.abs().max())
    best = min(squared_error(values, top * i / 3000, bits, signed) for i in range(1, 3001))
    assert best <= found <= factor * best


def test_ranges_are_found_row_by_row() -> None:
    values = torch.cat([normal(), 100 * normal(), normal().flip(1)])
    found = best_range(values, 4, signed=True)
    assert found[1] == pytest.approx(100 * float(found[0]), rel=1e-4)
    assert found[2] == pytest.approx(float(found[0]))


@pytest.mark.parametrize(("bits", "most"), [(2, 1.1), (4, 1.3), (8, 2.5), (16, 3.0)])
def test_one_outlier_of_a_million_hardly_moves_the_range(bits: int, most: float) -> None:
    clean, dirty = normal(), normal()
    dirty[0, 1234] = 1e6
    factor = float(best_range(dirty, bits, signed=True) / best_range(clean, bits, signed=True))
    assert 1 <= factor < most


@pytest.mark.parametrize(
    ("values", "signed", "bits", "limit"),
    [
        ([0.0, 0.0, 0.0], True, 8, 255 / 254),  # nothing to tell: 1, and the end of the grid on it
        ([0.0, 0.0, 0.0], False, 8, 1.0),
        ([-3.0, -1.0], False, 8, 1.0),  # all below the grid
        ([5.0], True, 16, 5 * 65535 / 65534),
        ([5.0], False, 4, 5.0),
        ([7.0] * 9, False, 2, 7.0),
        ([7.0] * 9, True, 2, 7 * 3 / 2),  # the codes are -1, 0 and 1, of step 2/3 of the range
    ],
)
def test_degenerate_values_have_a_range(
    values: list[float], signed: bool, bits: int, limit: float
) -> None:
    assert float(best_range(torch.tensor([values]), bits, signed)) == pytest.approx(limit)


def test_a_row_of_zeros_takes_the_range_of_the_others() -> None:
    found = best_range(torch.tensor([[0.0, 0.0], [3.0, -6.0]]), 8, signed=True)
    assert found[0] == pytest.approx(6 * 255 / 254)


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e10])
def test_range_scales_with_the_values(scale: float) -> None:
    one = float(best_range(normal(), 4, signed=True))
    assert float(best_range(normal() * scale, 4, signed=True)) == pytest.approx(one * scale)


def prepared(model: nn.Module, inputs: Tensor) -> cgmq_fx.Prepared:
    return cgmq_fx.prepare(model, "bops <= 99%", inputs)


def own(run: cgmq_fx.Prepared) -> dict[str, Quantizer]:
    named = run.model.get_submodule(QUANTIZERS).named_children()
    return {name: q for name, q in named if isinstance(q, Quantizer)}


def tables(run: cgmq_fx.Prepared, *batches: Tensor) -> dict[str, RangeTable]:
    inputs = frozenset(run.input_names)
    return calibrate(run.model, own(run), [ExampleInputs((b,)) for b in batches], inputs)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x).tanh())
        return y


@pytest.mark.parametrize("wild", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_left_out(wild: float) -> None:
    torch.manual_seed(0)
    run = prepared(Model(), torch.rand(2, 8))
    clean, dirty = torch.rand(64, 8), torch.rand(64, 8)
    dirty[5, 3] = wild
    found = [float(tables(run, batch)["x"].log_ranges[-1].exp()) for batch in (clean, dirty)]
    assert found[1] == pytest.approx(found[0], rel=0.05)
    assert not own(run)["x"].signed


def test_all_values_wild_is_an_error_that_names_the_place() -> None:
    run = prepared(Model(), torch.rand(2, 8))
    with pytest.raises(cgmq_fx.DataError, match="all calibration values at x are infinite or not"):
        tables(run, torch.full((2, 8), math.nan))


def test_no_batch_is_an_error() -> None:
    with pytest.raises(cgmq_fx.DataError, match="no batch to calibrate with"):
        tables(prepared(Model(), torch.rand(2, 8)))


@pytest.mark.parametrize(("low", "signed"), [(0.0, False), (1e-3, False), (-1e-3, True)])
def test_an_input_is_unsigned_iff_the_data_is_never_negative(low: float, signed: bool) -> None:
    run = prepared(Model(), torch.randn(2, 8))
    assert own(run)["x"].signed
    batches = [torch.rand(4, 8), torch.rand(4, 8)]
    batches[1][0, 0] = low
    tables(run, *batches)
    assert own(run)["x"].signed is signed
    assert own(run)["tanh"].signed


def test_an_input_may_have_the_name_of_a_builtin() -> None:
    run = prepared(nn.Sequential(nn.Linear(8, 2)), torch.randn(2, 8))  # its argument is `input`
    run.calibrate([torch.rand(4, 8)])
    assert not own(run)["input_1"].signed


def test_ranges_do_not_depend_on_how_often_one_calibrates() -> None:
    once, twice = (prepared(Model(), torch.ones(2, 8)) for _ in range(2))
    twice.model.load_state_dict(once.model.state_dict())
    data = [torch.rand(4, 8) for _ in range(3)]
    once.calibrate(data)
    for _ in range(3):
        twice.calibrate(data)
    for name, quantizer in own(once).items():
        assert torch.equal(quantizer.log_range, own(twice)[name].log_range)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [8, 9])
def test_bits_and_mode_stay_even_if_it_fails(training: bool, size: int) -> None:
    run = prepared(Model(), torch.rand(2, 8))
    for level, quantizer in enumerate(own(run).values()):
        quantizer.bits.fill_(2 + level)
    run.model.train(training)
    fails = pytest.raises(cgmq_fx.DataError, match=r"fails on a calibration batch of \(2, 9\)")
    with nullcontext() if size == 8 else fails:
        tables(run, torch.rand(2, size))
    assert [int(q.bits) for q in own(run).values()] == [2, 3, 4, 5]
    assert run.model.training is training


ACTIVATION = QuantizerSpec(Role.ACTIVATION, False, (2, 4, 8, 16, 32))


@pytest.mark.parametrize("shape", [(128, 512), (64, 128, 768), (8, 16, 32, 32)])
@pytest.mark.parametrize("channel", [0, 3])
def test_every_channel_is_sampled(shape: tuple[int, ...], channel: int) -> None:
    quantizer = Quantizer(ACTIVATION)
    model = torch.fx.GraphModule({"q": quantizer}, graph_of_one_call())
    x = torch.rand(shape)
    x.movedim(1 if len(shape) == 4 else -1, 0)[channel] *= 50
    table = calibrate(model, {"q": quantizer}, [ExampleInputs((x,))], frozenset())["q"]
    assert float(table.log_ranges[-1].exp()) > 3  # of the others alone it would be 1


def graph_of_one_call() -> torch.fx.Graph:
    graph = torch.fx.Graph()
    graph.output(graph.call_module("q", (graph.placeholder("x"),)))
    return graph


def rounding(table: RangeTable, level: int, bits: int) -> float:
    """12 times the mean squared error of rounding -2 and 1 to the nearest code."""
    top = 2 ** (bits - 1) - 1
    step = 2 * float(table.log_ranges[level].exp()) / (2**bits - 1)
    codes = [max(-top, min(top, round(v / step))) for v in (-2.0, 1.0)]
    return float(12 * ((-2 - codes[0] * step) ** 2 + (1 - codes[1] * step) ** 2) / 2)


NOISE: dict[str, Callable[[RangeTable], tuple[float, float]]] = {
    "0 bits": lambda t: (float(t.noise[0]), 12 * (4 + 1) / 2),  # mean square 2.5
    "2 bits": lambda t: (float(t.noise[1]), rounding(t, 1, 2)),
    "8 bits": lambda t: (float(t.noise[2]), rounding(t, 2, 8)),
    "32 bits": lambda t: (float(t.noise[3]), 0.0),
    "power": lambda t: (t.power, 2.5),
}


@pytest.mark.parametrize("name", NOISE)
def test_table_holds_the_error_of_every_level(name: str) -> None:
    quantizer = Quantizer(QuantizerSpec(Role.ACTIVATION, True, (0, 2, 8, 32)))
    model = torch.fx.GraphModule({"q": quantizer}, graph_of_one_call())
    batches = [ExampleInputs((torch.tensor([[x]]),)) for x in (-2.0, 1.0)]
    found, expected = NOISE[name](calibrate(model, {"q": quantizer}, batches, frozenset())["q"])
    assert found == pytest.approx(expected, rel=1e-3)


def test_noise_falls_with_the_bits_and_tells_channels_apart() -> None:
    weights = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    weights[1] *= 10
    spec = QuantizerSpec(Role.WEIGHT, True, (0, 2, 3, 4, 8, 32), (3, 1), (3, 1))
    table = range_table(Quantizer(spec), weights)
    assert table.rows is not None
    assert table.rows.tolist() == [0, 1, 2]
    assert bool((table.noise[:-1] >= table.noise[1:]).all())
    assert bool((table.noise[:-1, 1] > 50 * table.noise[:-1, 0]).all())  # about 100 times


def test_values_on_a_grid_still_have_some_noise() -> None:
    """Weights that start at zero, or are on the grid already, do not stay there."""
    for values in (torch.zeros(1, 8), torch.tensor([[-1.0, 0.0, 1.0, 1.0]])):
        quantizer = Quantizer(QuantizerSpec(Role.WEIGHT, True, (2, 8), (), ()))
        assert bool((range_table(quantizer, values).noise > 0).all())


def seen_by(batches: list[Tensor], widths: tuple[int, ...] = (2, 4, 8, 16)) -> RangeTable:
    quantizer = Quantizer(QuantizerSpec(Role.ACTIVATION, True, widths))
    model = torch.fx.GraphModule({"q": quantizer}, graph_of_one_call())
    return calibrate(model, {"q": quantizer}, [ExampleInputs((b,)) for b in batches], frozenset())[
        "q"
    ]


def relative_error(table: RangeTable, level: int, bits: int, values: Tensor) -> float:
    limit = float(table.log_ranges[level].exp())
    return math.sqrt(squared_error(values, limit, bits, True) / float(values.square().sum()))


def test_ordinary_values_keep_the_ranges_of_the_capped_sample() -> None:
    table = seen_by([normal(8192)])
    for level, bits in enumerate((2, 4, 8, 16)):
        assert torch.equal(table.log_ranges[level], best_range(normal(8192), bits, True)[0].log())


@pytest.mark.parametrize("power_of_two", [False, True])
def test_16_bits_hold_one_massive_activation_and_2_bits_do_not(power_of_two: bool) -> None:
    values = normal(100_000)
    values[0, 77_777] = 123.0
    quantizer = Quantizer(QuantizerSpec(Role.ACTIVATION, True, (2, 16), power_of_two=power_of_two))
    model = torch.fx.GraphModule({"q": quantizer}, graph_of_one_call())
    table = calibrate(model, {"q": quantizer}, [ExampleInputs((values,))], frozenset())["q"]
    low, high = table.log_ranges.exp().tolist()
    assert low < 3
    assert 123 <= high < 250
    assert relative_error(table, 1, 16, values) < 0.01


def heavy_tailed() -> list[Tensor]:
    """Points of which some are far away, as in clouds of a laser scanner."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(1, 50_000, generator=generator) for _ in range(8)]
    for batch in batches:
        batch[0, ::5000] *= 25
    return batches


def test_heavy_tails_are_held_where_bits_are_enough() -> None:
    batches = heavy_tailed()
    values, table = torch.cat(batches, 1), seen_by(batches)
    thin = torch.cat([b[:, :8192] for b in batches], 1)
    before = RangeTable(best_range(thin, 8, True).log(), table.noise, 1.0)
    assert relative_error(table, 2, 8, values) < 0.7 * relative_error(before, 0, 8, values)
    assert relative_error(table, 3, 16, values) < 0.01


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_a_wild_value_that_no_range_holds_stretches_none(bits: int) -> None:
    dirty = normal()
    dirty[0, 1234] = 1e6
    found, clean = (seen_by([values], (bits,)).log_ranges.exp() for values in (dirty, normal()))
    assert 1 <= float(found / clean) < 3


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_sparse_values_that_the_sample_misses_are_not_clipped(
    signed: bool, power_of_two: bool
) -> None:
    values = torch.zeros(2, 100_000)
    values[0, 77_777], values[1, :50_000] = 50.0, torch.linspace(0, 1, 50_000)
    spec = QuantizerSpec(Role.WEIGHT, signed, (0, 2, 8, 16), (2, 1), (2, 1), power_of_two)
    table = range_table(Quantizer(spec), values[:, :8192], Extremes.of(values))
    limits = table.log_ranges.exp().flatten(1)
    assert bool(((limits[:, 0] >= 50) & (limits[:, 0] <= 50 * 4)).all())
    assert bool((limits[2:, 1] <= 2).all())
    assert table.noise[0, 0] >= 12 * 50**2 / 100_000
    assert bool((table.noise.diff(dim=0)[1:] < 0).all())
    assert table.power >= 50**2 / 100_000 / 2


def test_noise_tells_what_is_clipped_beyond_the_sample() -> None:
    values = normal(100_000)
    values[0, 77_777] = 1000.0
    table = seen_by([values])
    for level, bits in enumerate((2, 4, 8)):
        limit = float(table.log_ranges[level].exp())
        error = squared_error(values, limit, bits, True) / 100_000
        assert float(table.noise[level]) == pytest.approx(12 * error, rel=0.02)
    assert table.power == pytest.approx(float(values.square().mean()), rel=0.02)


def test_rows_of_weights_are_extended_one_by_one() -> None:
    weights = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0))
    weights[1, 12_345] = 60.0
    spec = QuantizerSpec(Role.WEIGHT, True, (4, 8), (2, 1), (2, 1))
    model = torch.fx.GraphModule({"q": (quantizer := Quantizer(spec))}, graph_of_one_call())
    table = calibrate(model, {"q": quantizer}, [ExampleInputs((weights,))], frozenset())["q"]
    assert table.log_ranges[-1].exp().flatten()[1] > 30
    assert table.log_ranges[:, 0].exp().max() < 6


def test_extremes_are_the_largest_of_all_batches() -> None:
    batches = [
        torch.randn(3, size, generator=torch.Generator().manual_seed(size))
        for size in (1, 300, 40_001)
    ]
    batches[2][1, 7], batches[1][2, 5] = math.inf, math.nan
    found = Extremes.of(batches[0])
    for batch in batches[1:]:
        found = found.merged(Extremes.of(batch))
    everything = torch.cat(batches, 1).abs().nan_to_num(0, 0)
    assert found.count == 40_302
    expected = everything.topk(256, 1).values
    assert torch.equal(found.values.abs().sort(1, descending=True).values, expected)
