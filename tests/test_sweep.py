"""Sweeps: order, warm starts, resuming, several jobs, and the Pareto front."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import cgmq_fx
from cgmq_fx import (
    ArtifactError,
    CostModel,
    CostModelError,
    InfeasibleBudgetError,
    NodeBits,
    NodeFacts,
    OptionError,
    Result,
    Sweep,
    identity,
    sweep_budgets,
    sweeping,
)
from cgmq_fx.cost_models import Budget
from cgmq_fx.cost_models import model as registry
from tests.nets import small_classifier
from tests.test_opaque import Block, Numbers

BUDGETS = ["bops <= 1%", "bops <= 6%", "bops <= 2%"]


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(8, 3, generator=generator), torch.tensor([0, 1] * 4)) for _ in range(5)]


def model() -> nn.Module:
    torch.manual_seed(0)
    return small_classifier()


def run(folder: Path | None = None, budgets: Any = BUDGETS, **options: Any) -> Sweep:
    return cgmq_fx.sweep(
        *(model(), budgets, data()),
        **{"loss": cross_entropy, "val_data": data(), "epochs": 2, "progress": False, **options},
        folder=folder,
    )


def test_points_go_from_loose_to_tight_and_satisfy() -> None:
    found = run()
    assert [p.budget for p in found] == ["bops <= 6%", "bops <= 2%", "bops <= 1%"]
    assert all(p.result.cost.satisfied and p.file is None for p in found)
    assert len(found) == 3
    assert found[2].shares["bops"] <= 0.01


def test_each_point_starts_from_its_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Result | None] = []

    def spied(*args: Any, start: Result | None, **options: Any) -> Result:
        starts.append(start)
        return cgmq_fx.quantize(*args, start=start, **options)

    monkeypatch.setattr(sweeping, "quantize", spied)
    run()
    assert [None if s is None else str(s.budget) for s in starts] == [
        None,
        "bops <= 6%",
        "bops <= 2%",
    ]


def test_a_stopped_sweep_trains_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path, BUDGETS[:2])
    trained: list[str] = []

    def spied(model: Any, budget: Budget, *args: Any, **options: Any) -> Result:
        trained.append(str(budget))
        return cgmq_fx.quantize(model, budget, *args, **options)

    monkeypatch.setattr(sweeping, "quantize", spied)
    second = run(tmp_path)
    assert trained == ["bops <= 2%"]
    assert [p.file for p in first] == [second[0].file, second[2].file]
    assert all(p.file is not None and p.file.is_file() for p in second)


class Stopping:
    """Cross entropy, until somebody presses Ctrl-C after so many steps of training."""

    left: ClassVar[Iterator[int]]  # an iterator is known by its class, wherever it is

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if output.requires_grad and next(self.left, None) is None:
            signal.raise_signal(signal.SIGINT)
        return cross_entropy(output, target)


def stopping(steps: int) -> Stopping:
    Stopping.left = iter(range(steps))
    return Stopping()


def test_a_point_that_was_interrupted_continues(tmp_path: Path) -> None:
    options = {"epochs": 3, "val_data": None}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, BUDGETS[:1], loss=stopping(7), **options)
    assert [file.suffix for file in tmp_path.iterdir() if file.is_dir()] == [".run"]
    again = run(tmp_path, BUDGETS[:1], loss=stopping(10), **options)  # of 15 in all
    assert len(again[0].result.history.steps) == 15
    assert not list(tmp_path.glob("*.run"))


class Counting:
    """A metric that keeps what it has seen."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> float:
        self.seen += 1
        return float(output.mean())


def test_a_point_is_trained_anew_where_the_metric_has_changed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, BUDGETS[:2], loss=stopping(10 + 7), metric=Counting())
    found = run(tmp_path, BUDGETS[:2], loss=stopping(10), metric=Counting())  # all of a point
    assert [len(point.result.history.steps) for point in found] == [10, 10]
    assert not list(tmp_path.glob("*.run"))


@pytest.mark.parametrize(
    ("further", "steps", "told"), [([], 8, False), (["bops <= 3%"], 30, True)], ids=["same", "more"]
)
def test_a_sweep_that_was_interrupted_takes_further_budgets(
    further: list[str],
    steps: int,
    told: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    budgets = ["bops <= 6%", "bops <= 1%"]
    options: dict[str, Any] = {"epochs": 3, "val_data": None, "progress": True}  # 15 steps a point
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, budgets, loss=stopping(15 + 7), **options)
    capsys.readouterr()
    found = run(tmp_path, [*budgets, *further], loss=stopping(steps), **options)
    assert [len(point.result.history.steps) for point in found] == [15] * (2 + len(further))
    assert not list(tmp_path.glob("*.run"))
    assert ("had another start" in " ".join(capsys.readouterr().err.split())) is told


def test_a_preset_is_known_by_its_name_in_another_process(tmp_path: Path) -> None:
    preset = cgmq_fx.PRESETS["onnxruntime"]
    options = {"epochs": 0, "budgets": ["bops <= 6%"]}
    run(tmp_path, target=preset, **options)
    elsewhere = replace(preset, trial=lambda captured: None)  # its functions lie elsewhere there
    assert run(tmp_path, target=elsewhere, **options)[0].result.cost.satisfied


class Priced(CostModel):
    """Multiply-accumulates at a price, which a name alone does not tell."""

    name = "priced"
    unit = "coin"

    def __init__(self, price: float = 1.0) -> None:
        self.price = price

    def node_cost(self, node: NodeFacts, bits: NodeBits) -> float:
        return self.price * node.macs * bits.weight


def test_cost_models_with_arguments_keep_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", {**registry._REGISTRY, "priced": Priced})
    found = run(budgets=[Priced(2.0) <= "30%", Priced(2.0) <= "20%"], folder=tmp_path, epochs=0)
    assert [point.budget for point in found] == ["priced <= 30%", "priced <= 20%"]
    file, before = found[0].file, found[0].result.cost.states[0].value
    assert file is not None
    with pytest.raises(CostModelError, match=r"counts .*; if the model has arguments, give it as"):
        cgmq_fx.load(file)
    loaded = cgmq_fx.load(file, cost_models=[Priced(2.0)])
    assert loaded.cost.states[0].value == before


@pytest.mark.parametrize(
    "other",
    [Priced(3.0), Priced(torch.ones(2)), type("Other", (Priced,), {})(1.0)],  # type: ignore[arg-type]
    ids=["arguments", "tensors", "class"],
)
def test_budgets_that_read_the_same_but_count_otherwise_are_refused(other: Priced) -> None:
    first = Priced(1.0 if isinstance(other.price, float) else other.price + 0)
    with pytest.raises(OptionError, match=r"two budgets read 'priced <= 30%', but their cost mod"):
        run(budgets=[first <= "30%", other <= "30%"], epochs=0)


@pytest.mark.parametrize(
    "twice",
    [(Priced(2.0), Priced(2.0)), (Priced(torch.ones(2)[0]),) * 2],  # type: ignore[arg-type]
    ids=["equal", "the same"],
)
def test_a_budget_that_is_given_twice_is_one_point(twice: tuple[Priced, Priced]) -> None:
    assert sweep_budgets._unique([Budget((one <= "30%",)) for one in twice])[1:] == []


@pytest.mark.parametrize("price", [1.0, 3.0])
def test_a_point_that_another_cost_model_counted_is_not_taken(
    price: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", {**registry._REGISTRY, "priced": Priced})
    run(budgets=[Priced(2.0) <= "30%"], folder=tmp_path, epochs=0)
    with pytest.raises(OptionError, match=r"by another cost model, or .* give another folder"):
        run(budgets=[Priced(price) <= "30%"], folder=tmp_path, epochs=0)


def test_what_no_file_can_hold_is_found_before_training() -> None:
    batches = [torch.randn(4, 8)]
    with pytest.raises(ArtifactError, match=r"inner\.0"):
        cgmq_fx.sweep(Block(Numbers()), ["bops <= 60%"], batches, epochs=0, progress=False)


def test_a_folder_of_another_sweep_is_refused(tmp_path: Path) -> None:
    run(tmp_path, ["bops <= 6%"], epochs=0)
    others: list[dict[str, Any]] = [
        {"epochs": 1},
        {"seed": 1},
        {"loss": None},
        {"loss": partial(cross_entropy, label_smoothing=0.9)},
        {"val_data": None},
        {"optimizer": lambda groups: torch.optim.Adam(groups, eps=1e-3)},
    ]
    for changed in others:
        with pytest.raises(OptionError, match=f"another {next(iter(changed))}; give another"):
            run(tmp_path, ["bops <= 6%"], **{"epochs": 0, **changed})
    with pytest.raises(OptionError, match="another epochs and another seed; give another"):
        run(tmp_path, ["bops <= 6%"], epochs=1, seed=1)
    same = run(tmp_path, ["bops <= 6%"], epochs=0, optimizer=torch.optim.Adam)  # as by default
    assert same[0].result.cost.satisfied
    with pytest.raises(OptionError, match="another number of batches; give another"):
        cgmq_fx.sweep(
            model(),
            ["bops <= 6%"],
            data()[1:],
            loss=cross_entropy,
            val_data=data(),
            epochs=0,
            progress=False,
            folder=tmp_path,
        )
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(OptionError, match=r"sweep\.json is no record of a sweep"):
        run(tmp_path, ["bops <= 6%"], epochs=0)


def pooled(activation: nn.Module) -> nn.Module:
    """A net for images of any size; its state is the same with every activation."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3), activation, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("other", "size", "text"),
    [
        (nn.ReLU(), 16, "another shape or dtype of inputs"),
        (nn.Tanh(), 8, "another model; give another"),
    ],
    ids=["larger inputs", "same state, other ops"],
)
def test_points_of_a_model_with_the_same_state_are_not_taken(
    other: nn.Module, size: int, text: str, tmp_path: Path
) -> None:
    def swept(net: nn.Module, size: int) -> Sweep:
        options: dict[str, Any] = {"epochs": 0, "progress": False, "folder": tmp_path}
        return cgmq_fx.sweep(net, ["bops <= 60%"], [torch.rand(2, 1, size, size)], **options)

    kept = swept(pooled(nn.ReLU()), 8)
    with pytest.raises(OptionError, match=f"holds a sweep with {text}"):
        swept(pooled(other), size)
    assert swept(pooled(nn.ReLU()), 8)[0].costs == kept[0].costs


@pytest.mark.parametrize("name", ["torch", "cgmq_fx"])
def test_points_of_another_version_are_not_taken(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, ["bops <= 6%"], epochs=0)
    if name == "torch":
        monkeypatch.setattr(torch, "__version__", "2.0.0")
    else:
        monkeypatch.setattr(identity, "own_version", lambda: "0.0.1")
    with pytest.raises(OptionError, match="with another version of cgmq_fx or torch; give another"):
        run(tmp_path, ["bops <= 6%"], epochs=0)


@pytest.mark.parametrize(
    ("budgets", "options", "error", "text"),
    [
        ([], {}, OptionError, "a sweep needs budgets"),
        ("bops <= 5%", {}, OptionError, "a sweep takes a list of budgets, not 'bops <= 5%'"),
        (5, {}, OptionError, "a sweep takes a list of budgets, not 5"),
        (["bops <= 5%", "bops <= 0.01%"], {}, InfeasibleBudgetError, "cannot be met"),
        (BUDGETS, {"jobs": 0}, OptionError, "jobs must be a whole number"),
    ],
)
def test_mistakes_are_found_before_training(
    budgets: Any, options: Any, error: type[Exception], text: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=text):
        run(tmp_path, budgets, **options)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_folder_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="cannot be kept in"):
        run(tmp_path / "file")


def test_several_jobs_give_the_same_points(tmp_path: Path) -> None:
    pytest.importorskip("loky")
    found = run(tmp_path, BUDGETS[:2], jobs=2, epochs=1)
    assert [p.budget for p in found] == ["bops <= 6%", "bops <= 1%"]
    assert all(p.result.cost.satisfied for p in found)


def test_what_cannot_be_passed_on_is_said(tmp_path: Path) -> None:
    pytest.importorskip("loky")
    with (
        (tmp_path / "open").open("w") as handle,
        pytest.raises(OptionError, match="cannot be passed to other processes"),
    ):
        run(tmp_path, BUDGETS[:2], jobs=2, metric=lambda output, target: handle.fileno())


def test_an_exported_program(tmp_path: Path) -> None:
    program = torch.export.export(
        model(), (torch.rand(2, 3),), dynamic_shapes=({0: torch.export.Dim.AUTO},)
    )
    found = cgmq_fx.sweep(program, BUDGETS[:1], folder=tmp_path, epochs=0, progress=False)
    assert found[0].result.cost.satisfied
