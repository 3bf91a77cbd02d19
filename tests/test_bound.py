"""The guarantee: what is returned satisfies its budget, and what cannot is refused at once."""

from itertools import product
from math import nextafter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import cross_entropy

import cgmq_fx
from benchmarks.lenet5 import LeNet5
from cgmq_fx import Budget, Constraint, InfeasibleBudgetError, Scheme
from cgmq_fx.cost_models import GraphFacts
from cgmq_fx.passes.quantizer import Quantizer
from cgmq_fx.recount import verify
from tests.random_nets import captured, constraint, ends, facts, prepared, recount, train

NAMES = ("bops", "macs", "weights")
SCHEMES = (
    Scheme(),
    Scheme(weights="channel", activations="channel"),
    Scheme((0, 2, 4, 8), weights="element", weight_ranges="tensor"),
    Scheme((2, 3, 5, 16), weights="element", activations="channel"),
)
LENET_CASES = [
    *product(("tensor", "channel"), ("tensor", "channel"), (0.40, 0.90, 1.40, 2.00, 5.00)),
    ("element", "tensor", 0.40),  # half a million gates: seconds each
    ("element", "channel", 2.00),
]

MACS = {"conv1": 460_800, "conv2": 3_276_800, "fc1": 524_288, "fc2": 5_120}
SHAPES = {
    "conv1": (32, 1, 5, 5),
    "conv2": (64, 32, 5, 5),
    "fc1": (512, 1024),
    "fc2": (10, 512),
}


def bits_in(model: GraphModule) -> dict[str, Tensor]:
    """The bits of every quantizer in a graph, by name."""
    return {
        name.rpartition(".")[2]: module.bits.double()
        for name, module in model.named_modules()
        if isinstance(module, Quantizer)
    }


def lenet5_share(model: GraphModule) -> float:
    """Relative BOPs of a quantized LeNet-5: every product of a weight with an activation."""
    bits = bits_in(model)
    inputs = ("images", "max_pool2d", "max_pool2d_1", "relu_2")
    total = 0.0
    for (layer, shape), name in zip(SHAPES.items(), inputs, strict=True):
        none = torch.tensor(32.0, dtype=torch.float64)
        weight = bits.get(f"{layer}_weight", none).expand(shape).reshape(*shape[:2], -1)
        channels = bits.get(name, none).reshape(-1)
        # fc1 sees 64 channels of 16 pixels each, channel by channel
        channels = channels.repeat_interleave(shape[1] // len(channels))
        products = weight * channels[:, None]
        total += MACS[layer] * float(products.mean())
    return total / (1024 * sum(MACS.values()))


@pytest.mark.parametrize(("weights", "activations", "percent"), LENET_CASES)
def test_bound_holds_for_lenet5(
    weights: str, activations: str, percent: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Coarser than by default (1/64 of a tensor, 50,000 trials): fc1 has 524,288 gates.
    monkeypatch.setattr("cgmq_fx.projection._PORTIONS", 4)
    monkeypatch.setattr("cgmq_fx.projection._WORK", 5_000)
    torch.manual_seed(int(100 * percent))
    data = [(torch.rand(n, 1, 28, 28), torch.randint(10, (n,))) for n in (4, 2)]
    result = cgmq_fx.quantize(
        LeNet5(),
        f"bops <= {percent}%",
        data,
        loss=cross_entropy,
        epochs=1,
        scheme=Scheme(weights=weights, activations=activations),  # type: ignore[arg-type]
        progress=False,
    )
    share = lenet5_share(result.model)
    assert 0.9 * percent / 100 < share <= percent / 100
    assert result.cost["bops"].relative == pytest.approx(share, rel=1e-12)


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, Scheme, GraphFacts]:
    seed, scheme = draw(st.integers(0, 19)), draw(st.sampled_from(SCHEMES))
    return seed, scheme, facts(seed, scheme)


@st.composite
def feasible(draw: st.DrawFn, graph: GraphFacts) -> Budget:
    """One or two bounds, uniform between the least and the greatest cost, both included."""
    chosen = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True))
    return Budget(tuple(draw(_feasible(graph, name)) for name in chosen))


@st.composite
def _feasible(draw: st.DrawFn, graph: GraphFacts, name: str) -> Constraint:
    low, high, reference = ends(graph, name)
    limit = low + draw(st.floats(0, 1)) * (high - low)
    return constraint(name, max(limit, 1e-9 * high), reference, draw(st.booleans()))


@settings(max_examples=40, deadline=None)
@given(st.data(), problems(), st.integers(1, 6), st.integers(0, 3))
def test_result_satisfies_wherever_the_run_stops(
    data: st.DataObject, problem: tuple[int, Scheme, GraphFacts], length: int, steps: int
) -> None:
    seed, scheme, graph = problem
    budget = data.draw(feasible(graph))
    run = prepared(captured(seed), budget, scheme, steps=length)
    train(run, steps, seed)
    result = run.finalize()
    counted = recount(result.model, captured(seed).inputs.tensors[0])
    for state in result.cost.states:
        assert counted[state.constraint.model.name] <= state.limit * (1 + 1e-12)
        assert counted[state.constraint.model.name] == pytest.approx(state.value, rel=1e-12)
        assert state.satisfied


@settings(max_examples=30, deadline=None)
@given(st.data(), problems(), st.floats(0.01, 1, exclude_max=True), st.booleans())
def test_bound_below_the_floor_is_refused(
    data: st.DataObject,
    problem: tuple[int, Scheme, GraphFacts],
    share: float,
    relative: bool,
) -> None:
    seed, scheme, graph = problem
    name = data.draw(st.sampled_from([n for n in NAMES if ends(graph, n)[0] > 0]))
    low, _, reference = ends(graph, name)
    limit = min(low * share, nextafter(low, 0))
    bad = constraint(name, limit / (1 + 1e-12), reference, relative)
    others = [data.draw(_feasible(graph, n)) for n in NAMES if n != name]
    with pytest.raises(InfeasibleBudgetError, match=f"{name} <= .*but with every gate"):
        prepared(captured(seed), Budget((bad, *others)), scheme)


@pytest.mark.parametrize("name", ["bops", "weights"])
@pytest.mark.parametrize("seed", range(5))
def test_floor_itself_is_feasible_and_the_next_number_below_is_not(seed: int, name: str) -> None:
    low, _, reference = ends(facts(seed, Scheme()), name)
    exact = Budget((constraint(name, low, reference, relative=False),))
    below = Budget((constraint(name, nextafter(low, 0), reference, relative=False),))
    assert prepared(captured(seed), exact).finalize().cost.states[0].value == low
    with pytest.raises(InfeasibleBudgetError):
        prepared(captured(seed), below)


def test_finalize_ends_the_search_and_training_goes_on_under_the_bound() -> None:
    budget = Budget((constraint("bops", 0.02, 1.0, relative=True),))
    run = prepared(captured(1), budget, steps=8)
    first = run.finalize()
    train(run, 3)
    second = run.finalize()
    assert run.phase == "tune"
    assert second.cost.states == first.cost.states
    assert recount(second.model, captured(1).inputs.tensors[0])["bops"] <= second.cost["bops"].limit


def test_count_sees_bits_that_were_changed_behind_the_controllers_back() -> None:
    result = prepared(
        captured(2), Budget((constraint("bops", 0.01, 1.0, relative=True),))
    ).finalize()
    for module in result.model.modules():
        if isinstance(module, Quantizer):
            module.bits.fill_(8)
    with pytest.raises(cgmq_fx.BoundError, match=r"bops 6\.2500% > "):
        verify(result.model, result.inputs, result.budget)
