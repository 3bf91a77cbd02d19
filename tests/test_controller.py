"""The controller's parts: saliencies, speeds, ranges that follow bits, the end of the search."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import cgmq_fx
from cgmq_fx import Budget, OptionError, Scheme
from cgmq_fx.calibrate import RangeTable
from cgmq_fx.controller import SLOWEST, Controller
from cgmq_fx.cost_models import (
    ActivationMemory,
    Arena,
    BOPs,
    CostModel,
    GraphFacts,
    NodeFacts,
    QuantizerFacts,
    Role,
    Stored,
    TensorFacts,
    WeightMemory,
)
from cgmq_fx.directions import DIRECTIONS, direction_of, speeds
from cgmq_fx.passes.grid import round_to_grid
from cgmq_fx.passes.insert import QUANTIZERS
from cgmq_fx.passes.quantizer import Quantizer, QuantizerSpec
from tests.random_nets import captured, constraint, ends, facts, prepared, train

WIDTHS = (2, 4, 8, 16, 32)


def toy(
    elements: tuple[int, ...], share: float, *, direction: str = "marginal", steps: int = 20
) -> Controller:
    """Weights of so many elements, one gate each, to be stored in a share of their 32 bits."""
    names = [f"w{i}" for i in range(len(elements))]
    nodes = tuple(
        NodeFacts(n, "aten.linear.default", stored=(Stored(n, e, n),))
        for n, e in zip(names, elements, strict=True)
    )
    own = {
        n: QuantizerFacts(n, Role.WEIGHT, 1, WIDTHS, e)
        for n, e in zip(names, elements, strict=True)
    }
    budget = Budget((WeightMemory() <= share * 4 * sum(elements),))
    return toy_controller(GraphFacts(nodes, own), budget, direction, steps)


def toy_controller(
    graph: GraphFacts, budget: Budget, direction: str = "marginal", steps: int = 20
) -> Controller:
    """A controller of quantizers that belong to no network."""
    logs = torch.arange(5.0)  # the range at level k is e^k
    noise = torch.tensor([*(4.0 / (2**b - 1) ** 2 for b in WIDTHS[:-1]), 0.0])
    shapes = {n: (q.gates,) if q.gates > 1 else () for n, q in graph.quantizers.items()}
    specs = {
        n: QuantizerSpec(q.role, True, q.bit_widths, shapes[n]) for n, q in graph.quantizers.items()
    }
    return Controller(
        {n: Quantizer(spec) for n, spec in specs.items()},
        graph,
        budget,
        {n: RangeTable(logs, noise, 1.0) for n in graph.quantizers},
        direction_of(direction),
        steps,
    )


def feed(controller: Controller, *statistics: float) -> None:
    """Leave a statistic of each gate where a backward pass would, and step."""
    for quantizer, value in zip(controller._quantizers, statistics, strict=True):
        if quantizer.probe is not None:
            quantizer.probe.grad = torch.full_like(quantizer.probe, value)
    controller.step()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_matters_more_falls_slower(direction: str) -> None:
    controller = toy((10, 10), 0.3, direction=direction)
    before = controller.gates.clone()
    feed(controller, 1.0, 100.0)
    fall = before - controller.gates
    assert fall[0] > fall[1] > 0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_matters_more_rises_faster(direction: str) -> None:
    controller = toy((10, 10), 0.3, direction=direction, steps=60)
    while not controller.satisfied:
        feed(controller, 1.0, 1.0)
    before = controller.gates.clone()
    feed(controller, 1.0, 100.0)
    rise = controller.gates - before
    assert 0 < rise[0] < rise[1]


def test_what_frees_more_falls_faster() -> None:
    controller = toy((10, 1000), 0.3)
    feed(controller, 1.0, 1.0)
    assert controller.gates[1] < controller.gates[0] < 5


@pytest.mark.parametrize(
    ("share", "extreme", "end", "level"),
    [(2 / 32, torch.min, 0.5, 0), (1.0, torch.max, 5.5, 4)],
)
def test_gates_stop_half_a_level_beyond_either_end(
    share: float, extreme: Callable[[Tensor], Tensor], end: float, level: int
) -> None:
    controller = toy((10, 30), share, steps=40, direction="gradient")
    seen = []
    for _ in range(39):
        feed(controller, 1.0, 2.0)
        seen.append(controller.gates)
    assert float(extreme(torch.stack(seen))) == end
    assert controller.levels.tolist() == [level, level]


def steps_until_satisfied(controller: Controller, step: Callable[[], None]) -> int:
    count = 0
    while not controller.satisfied and count <= controller.reach:
        step()
        count += 1
    return count


@pytest.mark.parametrize("wild", [float("nan"), float("inf"), 0.0, 3e38])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_wild_statistics_do_not_keep_the_bound_from_being_reached(
    direction: str, wild: float
) -> None:
    controller = toy((10, 30, 5), 0.15, direction=direction)
    count = steps_until_satisfied(controller, lambda: feed(controller, wild, 1.0, wild))
    assert 0 < count <= controller.reach == 10
    assert bool(controller.gates.isfinite().all())
    assert bool(controller.sensitivity.isfinite().all())


WRONG_BITS: list[tuple[dict[str, object], str]] = [
    ({"w0": 3}, r"the bit-widths of w0 are \(2, 4, 8, 16, 32\), not 3"),
    ({"w": 2}, "there is no quantizer named 'w'; did you mean 'w[01]'"),
    ({"w1": [2, 4]}, "w1 has 1 gates; bit-widths for 2 were given"),
    ({"w0": 32}, r"do not satisfy the budget: weights 50 > \(VIOLATED\) 48 byte"),
]


@pytest.mark.parametrize(("bits", "message"), WRONG_BITS)
def test_bits_of_ones_own_are_checked_before_any_gate_moves(
    bits: dict[str, Any], message: str
) -> None:
    controller = toy((10, 40), 0.24)
    before = controller.gates.clone()
    with pytest.raises(OptionError, match=message):
        controller.fix({"w1": 2, **bits})
    assert torch.equal(controller.gates, before)
    controller.fix({"w0": 16, "w1": np.array([4])})
    assert controller.levels.tolist() == [3, 1]


@pytest.mark.parametrize("model", [ActivationMemory, Arena])
def test_a_peak_that_tensors_set_together_is_brought_down_in_time(model: type[CostModel]) -> None:
    """800 values at 2 bits take 200 bytes; either of the others next to 46 at 2 bits, only 196."""
    rows = {"large": (800, 0, 0), "first": (46, 1, 1), "second": (46, 1, 1)}
    tensors = tuple(TensorFacts(n, *row, n) for n, row in rows.items())
    own = {n: QuantizerFacts(n, Role.ACTIVATION, 1, WIDTHS, row[0]) for n, row in rows.items()}
    controller = toy_controller(GraphFacts((), own, tensors=tensors), Budget((model() <= 250.0,)))
    count = steps_until_satisfied(controller, lambda: feed(controller, 1.0, 1.0, 1.0))
    assert 0 < count <= controller.reach == 10


@pytest.mark.parametrize("direction", ["marginal", "gradient", "gradient*magnitude"])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_gradients_changes_no_bit(direction: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    runs = [toy((10, 30, 5), 0.2, direction=direction, steps=50) for _ in range(2)]
    for _ in range(50):
        values = torch.rand(3, generator=generator).tolist()
        feed(runs[0], *values)
        feed(runs[1], *(scale * v for v in values))
        assert (runs[0].levels == runs[1].levels).all()


def test_ranges_follow_the_bits_and_keep_what_was_learned() -> None:
    controller = toy((10, 30), 0.2, steps=40)
    learned = [0.0, 0.0]
    for step in range(40):
        for i, (quantizer, level) in enumerate(
            zip(controller._quantizers, controller.levels, strict=True)
        ):
            assert float(quantizer.log_range.detach()) == pytest.approx(level + learned[i])
            assert int(quantizer.bits) == WIDTHS[level]
            quantizer.log_range.detach().add_(0.1)
            learned[i] += 0.1
        feed(controller, 1.0, 2.0 + step % 5)
    assert controller.frozen


@pytest.mark.parametrize("steps", [0, 1, 3, 19])
def test_freezing_ends_it_with_a_choice_that_satisfies(steps: int) -> None:
    controller = toy((10, 30, 5), 0.2)
    for _ in range(steps):
        feed(controller, 1.0, 5.0, 0.1)
    controller.freeze()
    assert controller.frozen
    assert controller.satisfied
    used = sum(
        b.item() * e for b, e in zip(controller.assignment.values(), (10, 30, 5), strict=True)
    )
    assert 0.9 * 0.2 * 32 * 45 < used <= 0.2 * 32 * 45
    assert all(q.probe is None and q.adjacent is None for q in controller._quantizers)


def test_a_step_after_freezing_does_nothing() -> None:
    controller = toy((10, 30), 0.2)
    feed(controller, 1.0, 1.0)
    controller.freeze()
    gates, levels, taken = controller.gates.clone(), controller.levels.copy(), controller.taken
    ranges = [q.log_range.detach().clone() for q in controller._quantizers]
    feed(controller, 5.0, 1.0)
    controller.freeze()
    assert torch.equal(gates, controller.gates)
    assert (levels == controller.levels).all()
    assert taken == controller.taken == 1
    assert ranges == [q.log_range for q in controller._quantizers]


def test_the_search_freezes_after_its_last_step() -> None:
    controller = toy((10, 30), 0.2, steps=7)
    frozen = []
    for _ in range(7):
        feed(controller, 1.0, 2.0)
        frozen.append(controller.frozen)
    assert frozen == [False] * 6 + [True]


def test_better_states_of_the_search_are_not_forgotten() -> None:
    controller = toy((10, 10), 0.5, steps=100)
    while not controller.satisfied:
        feed(controller, 1.0, 1.0)
    best = controller.layout.loss(torch.from_numpy(controller.levels), controller.sensitivity)
    controller._settle(torch.zeros(2, dtype=torch.int64))
    controller.freeze()
    end = controller.layout.loss(torch.from_numpy(controller.levels), controller.sensitivity)
    assert end <= best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_bound_is_reached_in_time_on_real_gradients(seed: int, direction: str) -> None:
    low, high, reference = ends(facts(seed, Scheme()), "bops")
    budget = Budget((constraint("bops", low + 0.02 * (high - low), reference, relative=True),))
    run = prepared(captured(seed), budget, direction=direction, steps=12)
    count = steps_until_satisfied(run.controller, lambda: train(run, 1))
    assert 0 < count <= run.controller.reach == 6


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.conv(x).relu().mean((2, 3)))
        return y


def seen(run: cgmq_fx.Prepared) -> Iterator[tuple[Quantizer, Tensor, Tensor]]:
    """Every quantizer with its input and the gradient there, after a backward pass."""
    met: dict[Quantizer, list[Tensor]] = {}

    def watch(quantizer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        assert isinstance(quantizer, Quantizer)
        output.retain_grad()
        met[quantizer] = [args[0].detach(), output]

    for module in run.model.get_submodule(QUANTIZERS).children():
        module.register_forward_hook(watch)
    output = run.model(torch.randn(5, 2, 6, 6))
    mse_loss(output, torch.randn(5, 2)).backward()
    for quantizer, (value, rounded) in met.items():
        assert rounded.grad is not None
        yield quantizer, value, rounded.grad


def by_gate(quantizer: Quantizer, values: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """`reduce` of the elements of each gate, gate by gate."""
    shape = quantizer.bits.shape
    gates = torch.arange(quantizer.bits.numel()).reshape(shape).expand(values.shape)
    return torch.stack([reduce(values[gates == g]) for g in range(quantizer.bits.numel())])


@pytest.mark.parametrize(
    ("weights", "activations"),
    [("tensor", "tensor"), ("channel", "channel"), ("element", "tensor")],
)
@pytest.mark.parametrize("name", DIRECTIONS)
def test_statistics_are_what_their_definition_says(
    name: str, weights: str, activations: str
) -> None:
    torch.manual_seed(0)
    run = cgmq_fx.prepare(
        Layers(),
        "bops <= 5%",
        torch.randn(2, 2, 6, 6),
        scheme=Scheme(weights=weights, activations=activations),  # type: ignore[arg-type]
        direction=name,
    )
    for quantizer, value, grad in seen(run):
        assert quantizer.probe is not None
        assert quantizer.probe.grad is not None
        rows = quantizer.probe.grad.reshape(quantizer.statistic.rows, -1)
        expected = defined(name, quantizer, value, grad)
        assert torch.allclose(rows[SALIENCY[name]].sum(0), expected, rtol=1e-4)
        assert bool((expected > 0).any())


SALIENCY = {
    "marginal": [0],
    "gradient": [0],
    "gradient+magnitude": [0, 1],
    "gradient*magnitude": [2],
}


def defined(name: str, quantizer: Quantizer, value: Tensor, grad: Tensor) -> Tensor:
    """The saliency of each gate, or for "marginal" the squared change, from the definition."""
    if name == "marginal":
        assert quantizer.adjacent is not None
        here, there = (
            round_to_grid(value, quantizer.log_range.detach().exp(), b, quantizer.signed)
            for b in (quantizer.bits, quantizer.adjacent[quantizer.bits.long()])
        )
        return by_gate(quantizer, (grad * (there - here)).square(), torch.sum)
    if quantizer.spec.role is Role.ACTIVATION:
        grad, value = grad.mean(0, keepdim=True), value.mean(0, keepdim=True)
    each = {
        "gradient": grad.abs(),
        "gradient+magnitude": grad.abs() + value.abs(),
        "gradient*magnitude": grad.abs() * value.abs(),
    }
    return by_gate(quantizer, each[name], torch.mean)


@pytest.mark.parametrize(
    ("eagerness", "expected"),
    [
        ([1.0, 1.0], [0.625, 0.625]),  # the median gets the middle between 1/4 and 1
        ([0.0, 1.0, 3.0], [0.25, 0.625, 0.8125]),
        ([0.0, 0.0], [0.25, 0.25]),
        ([float("nan"), 2.0, 2.0], [0.25, 0.625, 0.625]),
        ([1.0, 1.0, float("inf")], [0.625, 0.625, 1.0]),
        ([1e-30, 1e-30, 3e-30], [0.625, 0.625, 0.8125]),
    ],
)
def test_speeds(eagerness: list[float], expected: list[float]) -> None:
    assert speeds(torch.tensor(eagerness), SLOWEST).tolist() == pytest.approx(expected)


def test_a_direction_goes_by_its_name_or_itself() -> None:
    assert [direction_of(name).name for name in DIRECTIONS] == list(DIRECTIONS)
    own = DIRECTIONS["gradient"]()
    assert direction_of(own) is own


def test_a_search_without_steps_is_refused() -> None:
    with pytest.raises(cgmq_fx.OptionError, match="at least one step, not 0"):
        toy((10,), 0.5, steps=0)


def test_calibrating_after_a_step_is_refused() -> None:
    run = prepared(captured(0), Budget((BOPs() <= "50%",)))
    train(run, 1)
    with pytest.raises(cgmq_fx.OptionError, match="calibrate before the first step"):
        run.calibrate(list(run.example_inputs.tensors))
