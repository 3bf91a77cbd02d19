"""What bit-widths do to the output is measured, and decides what a quantizer is worth."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cgmq_fx
from cgmq_fx import Prepared, Scheme, distortion
from cgmq_fx.calibrate import RangeTable
from cgmq_fx.passes.grid import round_to_grid
from cgmq_fx.passes.insert import QUANTIZERS
from cgmq_fx.passes.quantizer import Quantizer

WIDTHS = (2, 4, 8, 16, 32)


class Branches(nn.Module):
    """A sum of two branches of the same size, one of which hardly counts."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.quiet = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.loud(x) + 1e-3 * self.quiet(x)
        return y


class Counts(nn.Module):
    """Gives whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        classes: Tensor = self.layer(x).argmax(1)
        return classes


def tables(
    model: nn.Module,
    *,
    direction: str = "marginal",
    scheme: Scheme | None = None,
    samples: int = 32,
) -> tuple[Prepared, Mapping[str, RangeTable]]:
    torch.manual_seed(0)
    inputs = torch.randn(samples, 6)
    run = cgmq_fx.prepare(model, "bops <= 50%", inputs[:2], direction=direction, scheme=scheme)
    run.calibrate([inputs])
    return run, run.tables


def measured(table: RangeTable) -> list[float]:
    assert table.distortion is not None
    return [float(v) for v in table.distortion]


def test_what_batch_norm_takes_back_does_not_count() -> None:
    torch.manual_seed(1)
    layer, norm = nn.Linear(6, 4), nn.BatchNorm1d(4)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    model = nn.Sequential(layer, norm)
    run, found = tables(model)
    before = {n: t.clone() for n, t in run.model.state_dict().items()}
    run.calibrate([torch.randn(32, 6, generator=torch.Generator().manual_seed(0))])
    torch.manual_seed(0)
    x, weight, table = torch.randn(32, 6), layer.weight.detach(), found["0_weight"]
    outputs = []
    for bits in (32, 2):
        # the weight is folded: rounded to a range per channel, it is as if the layer's own had been
        scale = (norm.weight / (1 + norm.eps) ** 0.5).detach()[:, None]
        limit, width = table.log_ranges[0].exp(), torch.tensor(bits, dtype=torch.int32)
        sums = x @ round_to_grid(weight * scale, limit, width, True).T
        spread = (x @ (weight * scale).T).std(0, correction=0)
        level = norm.bias.detach() + (x @ weight.T + layer.bias.detach()).mean(0) * scale[:, 0]
        outputs.append((sums - sums.mean(0)) / sums.std(0, correction=0) * spread + level)
    error = (outputs[1] - outputs[0]).square().mean() / outputs[0].square().mean()
    assert measured(table)[0] == pytest.approx(float(error), rel=1e-3)
    assert all(torch.equal(t, before[n]) for n, t in run.model.state_dict().items())
    assert run.model.training


def test_it_is_the_relative_error_of_the_output_by_hand() -> None:
    torch.manual_seed(1)
    layer = nn.Linear(6, 3, bias=False)
    run, found = tables(layer)
    torch.manual_seed(0)
    x, weight = torch.randn(32, 6), layer.weight.detach()
    table = found["weight"]
    for level, bits in enumerate((2, 4, 8)):
        limit = table.log_ranges[level].exp()
        rounded = round_to_grid(weight, limit, torch.tensor(bits, dtype=torch.int32), True)
        error = (x @ (rounded - weight).T).square().mean() / (x @ weight.T).square().mean()
        assert measured(table)[level] == pytest.approx(float(error), rel=1e-4)
    # 16 bits are not measured: as much less than 8 bits as the noise of the weight
    share = float(table.noise[3].mean() / table.noise[2].mean())
    assert measured(table)[3] == pytest.approx(share * measured(table)[2], rel=1e-4)
    assert measured(table)[4] == 0.0
    assert run.facts.quantizers["weight"].bit_widths == WIDTHS


def test_fewer_bits_are_never_better_and_nothing_is_left_behind() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    run, found = tables(model)
    assert run.model.training
    for name, table in found.items():
        assert measured(table) == sorted(measured(table), reverse=True)
        quantizer = run.model.get_submodule(f"{QUANTIZERS}.{name}")
        assert isinstance(quantizer, Quantizer)
        assert quantizer.bits.unique().tolist() == [32]
        assert torch.allclose(quantizer.log_range, table.log_ranges[-1])


@pytest.mark.parametrize("granularity", ["tensor", "channel", "element"])
def test_a_quantizer_as_a_whole_is_worth_what_was_measured(granularity: str) -> None:
    scheme = Scheme((0, *WIDTHS), weights=granularity)  # type: ignore[arg-type]
    run, found = tables(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), scheme=scheme)
    layout = run.controller.layout
    sensitivity = torch.rand(layout.owner.shape, generator=torch.Generator().manual_seed(0))
    worth = layout.worth(sensitivity)
    assert torch.allclose(worth, layout.worth(1e9 * sensitivity), rtol=1e-4)
    for index, facts, part in layout:
        level = 1  # 2 bits
        only = torch.where(layout.owner == index, level, layout.count - 1)
        assert layout.loss(only, worth) == pytest.approx(
            measured(found[facts.name])[level], rel=1e-4
        )
        ratio = worth[part] / sensitivity[part]
        assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-4)


def test_without_training_the_branch_that_counts_gets_the_bits() -> None:
    torch.manual_seed(0)
    result = cgmq_fx.quantize(
        Branches(), "weights <= 35%", example_inputs=torch.randn(32, 6), epochs=0, progress=False
    )
    bits = {n: int(np.mean(b)) for n, b in result.cost.assignment.items()}
    assert bits["loud_weight"] > bits["quiet_weight"]


@pytest.mark.parametrize(
    ("model", "direction"),
    [(Branches(), "gradient"), (Counts(), "marginal")],
    ids=["the paper's rules", "whole numbers"],
)
def test_what_cannot_or_need_not_be_measured_is_not(model: nn.Module, direction: str) -> None:
    run, found = tables(model, direction=direction)
    assert all(table.distortion is None for table in found.values())
    sensitivity = torch.rand(run.controller.layout.owner.shape)
    assert run.controller.layout.worth(sensitivity) is sensitivity
    assert run.finalize().cost.satisfied


@pytest.mark.parametrize(
    ("most", "calls"),
    [(6, 1 + 2 * 3), (5, 1 + 2), (1, 0)],
    ids=["every low bit-width", "the fewest bits alone", "none"],
)
def test_of_large_models_less_is_measured(
    most: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distortion, "_MOST_CALLS", most)
    seen: list[int] = []
    original = distortion._Meter._outputs

    def counted(meter: distortion._Meter) -> list[Tensor]:
        seen.append(meter._inputs.tensors[0].shape[0])
        return original(meter)

    monkeypatch.setattr(distortion._Meter, "_outputs", counted)
    _, found = tables(nn.Linear(6, 3), samples=100)
    assert len(found) == 2  # the weight, and the input
    assert seen == [64] * calls  # and so many samples are enough
    assert all((table.distortion is not None) == bool(calls) for table in found.values())


def test_a_model_that_fails_on_other_values_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = distortion._Meter._error

    def fails_at_four_bits(
        meter: distortion._Meter, name: str, level: int, before: list[Tensor]
    ) -> float:
        found = original(meter, name, level, before)
        if level == 1:
            meter._quantizers[name].bits.fill_(4)
            raise IndexError("index 7 is out of bounds")
        return found

    monkeypatch.setattr(distortion._Meter, "_error", fails_at_four_bits)
    with caplog.at_level("INFO", logger="cgmq_fx.distortion"):
        run, found = tables(nn.Linear(6, 3))
    assert "cannot be measured: index 7 is out of bounds" in caplog.text
    assert all(table.distortion is None for table in found.values())
    assert {int(b) for own in run.controller.assignment.values() for b in own} == {32}
