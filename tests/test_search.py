"""What must be true of the search, whatever the gradients are."""

import pytest
import torch
from torch import Tensor, nn

import cgmq_fx
from cgmq_fx.controller import Controller
from cgmq_fx.directions import DIRECTIONS, Direction, GateView
from cgmq_fx.gates import level_of
from cgmq_fx.passes.kernel import Statistic

GRANULARITIES = [("tensor", "tensor"), ("channel", "channel"), ("element", "tensor")]


def prepared(
    budget: str, steps: int = 40, direction: str | Direction = "marginal", **scheme: str
) -> cgmq_fx.Prepared:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    )
    options = cgmq_fx.Scheme(**scheme)  # type: ignore[arg-type]
    return cgmq_fx.prepare(
        model,
        budget,
        torch.rand(2, 1, 8, 8),
        scheme=options,
        search_steps=steps,
        direction=direction,
    )


def report(found: cgmq_fx.Prepared, seed: int, scale: float = 1.0) -> None:
    """Put random statistics where a backward pass would leave them."""
    generator = torch.Generator().manual_seed(seed)
    for module in found.model.modules():
        probe = getattr(module, "probe", None)
        if probe is not None:
            probe.grad = scale * torch.rand(probe.shape, generator=generator) ** 4


@pytest.mark.parametrize(("weights", "activations"), GRANULARITIES)
@pytest.mark.parametrize("name", DIRECTIONS)
def test_while_violated_every_gate_that_helps_falls(
    name: str, weights: str, activations: str
) -> None:
    found = prepared("bops <= 1%", direction=name, weights=weights, activations=activations)
    controller, steps = found.controller, 0
    while not controller.satisfied:
        before = controller.gates.clone()
        report(found, steps)
        controller.step()
        assert bool(((controller.gates < before) | (before == 0.5)).all())
        steps += 1
    assert 0 < steps <= controller.reach <= 20


def test_a_gate_without_influence_stays() -> None:
    found = prepared("weights <= 200 B")
    before = found.controller.gates.clone()
    report(found, 0)
    found.step()
    roles = [q.role.value for q in found.controller.layout.quantizers]
    moved = (found.controller.gates != before).tolist()
    assert dict(zip(roles, moved, strict=True)) == {"weight": True, "activation": False}


@pytest.mark.parametrize("stop", [0, 1, 7, 39, 40])
@pytest.mark.parametrize(("weights", "activations"), GRANULARITIES)
def test_stopped_at_any_step_the_result_satisfies(
    stop: int, weights: str, activations: str
) -> None:
    found = prepared("bops <= 1%, weights <= 150 B", weights=weights, activations=activations)
    for step in range(stop):
        report(found, step)
        found.step()
    assert found.finalize().cost.satisfied
    assert found.phase == "tune"


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_loss_changes_nothing(scale: float) -> None:
    runs = [prepared("bops <= 3%"), prepared("bops <= 3%")]
    for step in range(40):
        for run, factor in zip(runs, (1.0, scale), strict=True):
            report(run, step, factor)
            run.step()
    assert (runs[0].controller.levels == runs[1].controller.levels).all()


def test_bits_are_monotone_in_the_gate() -> None:
    gates = torch.linspace(0.5, 5.5, 501)
    levels = level_of(gates, torch.full_like(gates, 5).long())
    assert bool((levels.diff() >= 0).all())
    for gate, level in [(0.5, 0), (1.0, 0), (1.01, 1), (4.0, 3), (4.01, 4), (5.5, 4)]:
        assert int(level_of(torch.tensor([gate]), torch.tensor([5]))) == level


def test_a_gate_never_rises_to_what_nothing_can_pay_for() -> None:
    found = prepared("bops <= 0.45%")  # the floor is 0.39 %, 95 % of it in the convolution
    name = next(n for n in found.controller.assignment if n.endswith("0_weight"))
    seen = []
    for step in range(39):
        report(found, step)
        found.step()
        if step >= found.controller.reach:
            seen.append(int(found.controller.assignment[name][0]))
    assert set(seen) == {2}


class Backwards(Direction):
    """A direction of one's own: all alike down, the last gate first up."""

    name = "backwards"
    statistic = Statistic.MAGNITUDES

    def fall(self, view: GateView) -> Tensor:
        return torch.ones_like(view.elements)

    def rise(self, view: GateView) -> Tensor:
        return torch.arange(view.elements.numel()).float()

    def sensitivity(self, view: GateView) -> Tensor:
        return view.rows[0]


def test_a_direction_of_ones_own() -> None:
    found = prepared("bops <= 2%", direction=Backwards())
    for step in range(40):
        report(found, step)
        found.step()
    assert isinstance(found.controller, Controller)
    assert found.satisfied
