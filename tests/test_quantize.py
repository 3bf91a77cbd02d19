"""`quantize` from end to end, on networks and data small enough for a second."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import cgmq_fx
from cgmq_fx.history import EpochRecord, StepRecord
from cgmq_fx.passes.freeze import read_bits
from cgmq_fx.passes.scheme import Granularity
from cgmq_fx.recount import verify
from tests.random_nets import TinyCNN, TwoInputs, recount

BUDGET, SHARE = "bops <= 2%", 0.02
SYNTHETIC = 32


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def images(size: int = 4) -> Tensor:
    return torch.randn(size, 1, 8, 8)


def labels(size: int = 4, classes: int = 3) -> Tensor:
    return torch.randint(classes, (size,))


def labelled(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [(images(n), labels(n)) for n in sizes]


def pair(size: int = 3) -> dict[str, Tensor]:
    return {"a": torch.randn(size, 6), "b": torch.randn(size, 4)}


def quantize(model: Any, **options: Any) -> cgmq_fx.Result:
    given: dict[str, Any] = {"epochs": 1, "progress": False} | options
    return cgmq_fx.quantize(model, BUDGET, **given)


def supervised(**options: Any) -> cgmq_fx.Result:
    return quantize(TinyCNN(), train_data=labelled(4, 4, 2), loss=cross_entropy, **options)


class KnowsItsInput(TinyCNN):
    """As Lightning has it."""

    example_input_array = torch.zeros(2, 1, 8, 8)


class KnowsItsInputs(TwoInputs):
    """As Transformers has it."""

    dummy_inputs = {"a": torch.zeros(2, 6), "b": torch.zeros(2, 4)}  # noqa: RUF012


class Structured(TwoInputs):
    """Keyword arguments only, and a dict as output."""

    def forward(self, *, a: Tensor, b: Tensor) -> dict[str, Any]:  # type: ignore[override]
        return {"logits": super().forward(a, b), "parts": [self.left(a)]}


def exported(batch: Any) -> torch.export.ExportedProgram:
    return torch.export.export(TinyCNN().eval(), (images(),), dynamic_shapes=({0: batch},))


def traced() -> nn.Module:
    module = torch.fx.symbolic_trace(TinyCNN())
    ShapeProp(module).propagate(images())
    return module


CASES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]], int]] = {
    "supervised, batches of 4, 2 and 1": (
        TinyCNN,
        lambda: {"train_data": labelled(4, 2, 1), "loss": cross_entropy},
        3,
    ),
    "inputs alone": (TinyCNN, lambda: {"train_data": [images(), images(3)]}, 2),
    "targets that no loss asks for": (TinyCNN, lambda: {"train_data": labelled(4, 3)}, 2),
    "a data loader": (
        TinyCNN,
        lambda: {
            "train_data": DataLoader(TensorDataset(images(7), labels(7)), 3, shuffle=True),
            "loss": cross_entropy,
        },
        3,
    ),
    "dicts": (
        TwoInputs,
        lambda: {"train_data": [{**pair(), "labels": labels(3, 5)}] * 2, "loss": cross_entropy},
        2,
    ),
    "dict and target for keyword arguments": (
        Structured,
        lambda: {
            "train_data": [(pair(), labels(3, 5))],
            "loss": lambda output, target: cross_entropy(output["logits"], target),
        },
        1,
    ),
    "inputs and target in one tuple": (
        TwoInputs,
        lambda: {"train_data": [(*pair().values(), labels(3, 5))], "loss": cross_entropy},
        1,
    ),
    "tuple of inputs, and target": (
        TwoInputs,
        lambda: {"train_data": [(tuple(pair().values()), labels(3, 5))], "loss": cross_entropy},
        1,
    ),
    "two inputs without target": (TwoInputs, lambda: {"train_data": [tuple(pair().values())]}, 1),
    "example_input_array": (KnowsItsInput, dict, SYNTHETIC),
    "dummy_inputs": (KnowsItsInputs, dict, SYNTHETIC),
    "example_inputs, positional": (
        TwoInputs,
        lambda: {"example_inputs": tuple(pair().values())},
        SYNTHETIC,
    ),
    "example_inputs, by name": (Structured, lambda: {"example_inputs": pair()}, SYNTHETIC),
    "exported program": (lambda: exported(None), dict, SYNTHETIC),
    "exported program, any batch": (
        lambda: exported(torch.export.Dim.AUTO),
        lambda: {"train_data": [images(3), images(5)]},
        2,
    ),
    "exported module": (lambda: exported(None).module(), dict, SYNTHETIC),
    "traced module with metadata": (traced, dict, SYNTHETIC),
}


@pytest.mark.filterwarnings("ignore:`isinstance.treespec:FutureWarning")  # torch, of its own copies
@pytest.mark.parametrize(("model", "options", "steps"), CASES.values(), ids=CASES)
def test_forms_of_models_and_data(
    model: Callable[[], Any], options: Callable[[], dict[str, Any]], steps: int
) -> None:
    result = quantize(model(), **options())
    (state,) = result.cost.states
    assert recount(result.model, *result.inputs.tensors)["bops"] <= SHARE * state.reference
    assert len(result.history.steps) == steps
    assert result.history.epochs[-1].loss < 20


def test_without_labels_the_float_model_is_imitated() -> None:
    model, inputs = TwoInputs().eval(), (torch.randn(64, 6), torch.randn(64, 4))
    result = quantize(
        model,
        train_data=[inputs],
        epochs=60,
        optimizer=lambda groups: torch.optim.Adam([{**g, "lr": 0.01} for g in groups]),
    )
    expected = model(*inputs).detach()

    def error(found: cgmq_fx.Result) -> float:
        gap = found.model(*inputs).detach() - expected
        return float(gap.square().mean() / expected.square().mean())

    assert error(result) < 0.02  # all at 4 bits: rounding alone leaves about as much
    assert error(result) == pytest.approx(result.history.epochs[-1].loss, rel=0.2)


def test_without_epochs_ranges_and_bits_are_chosen_all_the_same() -> None:
    result = supervised(epochs=0, val_data=labelled(4))
    assert not result.history.steps
    assert not result.history.epochs
    assert 0.8 * SHARE < result.cost["bops"].relative <= SHARE
    assert result.metrics.keys() == {"loss", "accuracy"}


@pytest.mark.parametrize(
    ("weights", "searching"),
    [("channel", 4), ("tensor", 0)],  # 40 % of 12 steps, or an eighth; the last one freezes
)
def test_history_tells_steps_phases_and_costs(weights: Granularity, searching: int) -> None:
    history = supervised(
        epochs=4, val_data=labelled(4), scheme=cgmq_fx.Scheme(weights=weights)
    ).history
    phases = [step.phase for step in history.steps]
    assert phases == ["search"] * searching + ["tune"] * (12 - searching)
    assert [step.step for step in history.steps] == list(range(12))
    assert all(step.costs[0] <= 1 for step in history.steps[searching:])
    assert [epoch.epoch for epoch in history.epochs] == [1, 2, 3, 4]
    assert [epoch.satisfied for epoch in history.epochs[1:]] == [True] * 3
    assert all(epoch.metrics.keys() == {"loss", "accuracy"} for epoch in history.epochs)


def test_metrics_are_those_of_the_result_on_all_samples() -> None:
    data = labelled(5, 2)
    result = supervised(val_data=data)
    right = torch.cat([result.model(x).argmax(1) == y for x, y in data])
    assert result.metrics["accuracy"] == pytest.approx(float(right.double().mean()))
    losses = [cross_entropy(result.model(x), y).detach() * len(x) for x, y in data]
    assert result.metrics["loss"] == pytest.approx(float(sum(losses)) / 7, rel=1e-5)


def test_a_metric_of_ones_own_replaces_accuracy() -> None:
    result = supervised(val_data=labelled(4, 2), metric=lambda output, target: len(target))
    assert result.metrics["metric"] == pytest.approx((4 * 4 + 2 * 2) / 6)
    assert "accuracy" not in result.metrics


class Listener(cgmq_fx.Callback):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_start(self, prepared: cgmq_fx.Prepared, steps: int) -> None:
        self.heard.append(f"start of {steps} in {prepared.phase}")

    def on_step(self, record: StepRecord) -> None:
        self.heard.append(f"step {record.step}")

    def on_epoch(self, record: EpochRecord) -> None:
        self.heard.append(f"epoch {record.epoch}")

    def on_end(self) -> None:
        self.heard.append("end")


def test_callbacks_hear_everything_in_order() -> None:
    listener = Listener()
    quantize(TinyCNN(), train_data=[images()] * 2, epochs=2, callbacks=[listener])
    steps = ["step 0", "step 1", "epoch 1", "step 2", "step 3", "epoch 2"]
    assert listener.heard == ["start of 4 in search", *steps, "end"]


def test_callbacks_hear_the_end_of_a_run_that_fails() -> None:
    listener = Listener()
    data = [(images(), labels()), (images(), labels() + 9)]
    with pytest.raises(cgmq_fx.DataError, match="out of bounds"):
        quantize(TinyCNN(), train_data=data, loss=cross_entropy, callbacks=[listener])
    assert listener.heard == ["start of 2 in search", "step 0", "end"]


GLOBALS: dict[str, Callable[[], Any]] = {
    "dtype": torch.get_default_dtype,
    "gradients": torch.is_grad_enabled,
    "deterministic": torch.are_deterministic_algorithms_enabled,
    "threads": torch.get_num_threads,
    "random state": lambda: torch.get_rng_state().tolist(),
    "warnings": lambda: list(warnings.filters),
    "fast path": torch.backends.mha.get_fastpath_enabled,
}


def test_global_state_is_left_alone() -> None:
    model = TinyCNN().train()
    data = DataLoader(TensorDataset(images(6), labels(6)), 3, shuffle=True)
    before = {name: read() for name, read in GLOBALS.items()}
    quantize(model, train_data=data, loss=cross_entropy, val_data=data)
    assert {name: read() for name, read in GLOBALS.items()} == before


def seeded(seed: int, state: int) -> dict[str, Tensor]:
    """The weights and bits of a result that dropout and shuffling have gone into."""
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(images(12), labels(12)), 4, shuffle=True)
    model = TinyCNN()
    torch.manual_seed(state)
    return quantize(
        model, train_data=data, loss=cross_entropy, epochs=3, seed=seed
    ).model.state_dict()


def test_the_seed_decides_everything_bit_for_bit() -> None:
    first, same, other = seeded(0, state=1), seeded(0, state=2), seeded(1, state=1)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_the_result_trains_further_with_the_bits_that_it_has() -> None:
    result = supervised()
    model = result.model.train()
    ranges = [p for name, p in model.named_parameters() if name.endswith("log_range")]
    bits = read_bits(model)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for x, y in labelled(4, 3, 2):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    assert ranges
    moved = [not torch.equal(b, p) for b, p in zip(before, model.parameters(), strict=True)]
    assert all(moved)
    assert all((bits[name] == found).all() for name, found in read_bits(model).items())
    assert verify(model, result.inputs, result.budget).satisfied


@pytest.mark.parametrize("size", [1, 3, 17])
def test_the_result_takes_any_batch_size(size: int) -> None:
    result, x = supervised(), images(size)
    each = torch.cat([result.model(sample[None]) for sample in x])
    assert torch.allclose(result.model(x), each, atol=1e-6)
    assert not result.model.training
