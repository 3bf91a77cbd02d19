from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cgmq_fx import DataError, OptionError, Scheme, prepare, simulate
from cgmq_fx.exporters.agreement import compare, outputs_of
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.integer import Part, Rounding, requantize, simulate_graph
from cgmq_fx.passes.lower import lower
from cgmq_fx.passes.scheme import Granularity
from tests.deploy_nets import deployed, inputs_of
from tests.nets import call

EXACT = [
    *(("lenet5", s) for s in ("tensor", "channel")),
    *(("mlp", s) for s in ("both", "element", "w16")),
    ("separable", "tensor"),
    ("transformer", "tensor"),
]


@pytest.mark.parametrize("rounding", [Rounding.FLOAT, Rounding.HALF_UP, Rounding.HALF_AWAY])
@pytest.mark.parametrize(("name", "scheme"), EXACT)
def test_integers_compute_what_the_lowered_graph_computes(
    name: str, scheme: str, rounding: Rounding
) -> None:
    result = deployed(name, scheme)
    module, inputs = lower(result.model, result.inputs), inputs_of(name, 8)
    found = simulate_graph(module, inputs, rounding)
    agreement = compare(module, [found.outputs], [inputs])
    assert agreement.holds, agreement
    assert agreement.largest <= 1.0 or rounding is Rounding.FLOAT, agreement
    assert agreement.argmax == 1.0


def test_a_residual_network_needs_no_float() -> None:
    """Residual adds on two grids, a strided and padded shortcut, global average pooling."""
    result = deployed("resnet20", "channel")
    module, inputs = lower(result.model, result.inputs), inputs_of("resnet20", 4)
    found = simulate_graph(module, inputs)
    assert found.float_ops == ()
    assert compare(module, [found.outputs], [inputs]).holds


def test_what_needs_a_float_unit_is_named() -> None:
    result = deployed("transformer")
    found = simulate_graph(lower(result.model, result.inputs), result.inputs)
    assert set(found.float_ops) == {"embedding", "softmax", "layer_norm", "layer_norm_1"}


def test_cutting_off_is_lower_than_rounding() -> None:
    """Without ties and clamps, truncation is rounding half a step lower."""
    parts = (Part(torch.arange(-50.0, 51.0).double(), torch.tensor(0.13).double()),)
    step = torch.tensor(1.0)
    low = requantize(parts, step, Rounding.TRUNCATE)
    assert torch.equal(low, (parts[0].codes * parts[0].step).floor())
    assert bool((low <= requantize(parts, step, Rounding.HALF_UP)).all())


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        (Rounding.FLOAT, [-2, 0, 0, 2, 2]),
        (Rounding.HALF_UP, [-1, 0, 1, 2, 3]),
        (Rounding.HALF_AWAY, [-2, -1, 1, 2, 3]),
        (Rounding.TRUNCATE, [-2, -1, 0, 1, 2]),
    ],
)
def test_ties(rounding: Rounding, expected: list[int]) -> None:
    """-1.5, -0.5, 0.5, 1.5 and 2.5 steps."""
    codes = torch.tensor([-3.0, -1.0, 1.0, 3.0, 5.0]).double()
    parts = (Part(codes, torch.tensor(0.25).double()),)
    assert requantize(parts, torch.tensor(0.5), rounding).tolist() == expected


@pytest.mark.parametrize("rounding", Rounding)
def test_sums_of_two_grids_are_rounded_once(rounding: Rounding) -> None:
    """3 * 0.5 + 5 * 0.25 = 2.75 steps of 1: not 1 or 2, plus 1."""
    parts = (
        Part(torch.tensor([3.0]).double(), torch.tensor(0.5).double()),
        Part(torch.tensor([5.0]).double(), torch.tensor(0.25).double()),
    )
    expected = 2 if rounding is Rounding.TRUNCATE else 3
    assert requantize(parts, torch.tensor(1.0), rounding).tolist() == [expected]


@pytest.mark.parametrize("ratio", [1e-9, 1e-4, 0.7, 3.0, 1e5])
@pytest.mark.parametrize("rounding", [Rounding.HALF_UP, Rounding.HALF_AWAY])
def test_a_multiplier_and_a_shift_are_a_factor(rounding: Rounding, ratio: float) -> None:
    codes = torch.randint(-(2**20), 2**20, (1000,)).double()
    found = requantize((Part(codes, torch.tensor(ratio).double()),), torch.tensor(1.0), rounding)
    assert bool(((found - codes * ratio).abs() <= 0.5 + codes.abs() * ratio * 2**-29).all())


def test_the_accumulator_s_bits_are_those_of_the_largest_sum() -> None:
    """Three products of ternary codes with codes up to 3: 9 takes four bits, its sign one."""
    layer = nn.Linear(3, 1, bias=False)
    nn.init.ones_(layer.weight)
    result = prepare(layer, "bops <= 1%", torch.rand(4, 3), scheme=Scheme((2,))).finalize()
    found = simulate(result, torch.full((2, 3), 100.0))
    assert found.accumulator_bits == 5
    expected = call(result.model, ExampleInputs((torch.full((2, 3), 100.0),)))
    torch.testing.assert_close(found.outputs, expected)


class Pools(nn.Module):
    """Pools and joins between two convolutions."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.pool(self.a(x)))
        return y


POOLS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "average": (lambda x: nn.functional.avg_pool2d(x, 2), True),
    "average of rectangles": (lambda x: nn.functional.avg_pool2d(x, (3, 2), 1), True),
    "global": (lambda x: nn.functional.adaptive_avg_pool2d(x, 1), True),
    "mean": (lambda x: x.mean((2, 3), keepdim=True), True),
    "largest": (lambda x: nn.functional.max_pool2d(x, 2), True),
    "joined": (lambda x: torch.cat([x, x + x], 2), True),
    "scaled": (lambda x: x * 0.5, True),
    "difference": (lambda x: x - x.flip(2), True),
    "curve": (lambda x: x.sigmoid(), False),
}


@pytest.mark.parametrize("name", POOLS)
def test_ops_between_products(name: str) -> None:
    pool, integer = POOLS[name]
    torch.manual_seed(0)
    model, inputs = Pools(pool), torch.randn(4, 2, 6, 6)
    result = prepare(model, "bops <= 10%", inputs, scheme=Scheme((4, 8))).finalize()
    found = simulate(result, inputs)
    assert (found.float_ops == ()) is integer
    module = lower(result.model, result.inputs)
    assert compare(module, [found.outputs], [result.inputs]).holds
    assert [o.shape for o in found.outputs] == [
        o.shape for o in outputs_of(module, [result.inputs])[0]
    ]


def test_wrong_options_are_refused() -> None:
    with pytest.raises(OptionError, match=r"no rounding 'down'; there are float, half-up"):
        simulate(deployed("mlp"), torch.rand(2, 16), "down")  # type: ignore[arg-type]
    with pytest.raises(DataError):
        simulate(deployed("mlp"), "text")


def test_inputs_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(DataError, match="the model fails on inputs of"):
        simulate(deployed("mlp", "tensor"), torch.rand(2, 5))


class Moves(nn.Module):
    """A part of a tensor is that of another; a tensor takes the shape of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.max_pool2d(self.first(x).relu(), 2)
        z = y.clone()
        z[:, 1:3] = y[:, :2]
        z[:, 0] = z[:, 3:, 1:2, 1:2].expand_as(y)[:, 0]
        out: Tensor = self.last(z + y)
        return out


@pytest.mark.parametrize("activations", ["tensor", "channel"])
def test_what_only_moves_needs_no_float(activations: Granularity) -> None:
    torch.manual_seed(0)
    scheme = Scheme((4, 8), activations=activations)
    result = prepare(Moves(), "bops <= 20%", torch.rand(4, 2, 8, 8), scheme=scheme).finalize()
    module = lower(result.model, result.inputs)
    found = simulate_graph(module, result.inputs)
    assert found.float_ops == ()
    assert compare(module, [found.outputs], [result.inputs]).holds
