"""`sweep`: one model under many budgets, to see what accuracy costs.

Budgets are ordered from the loosest to the tightest; each point starts from the weights and bits of
its nearest neighbour that has all its channels, else from the model itself. With several jobs the
order is cut into as many stretches, which run at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from pickle import PicklingError
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from cgmq_fx.artifact import check_kept, load
from cgmq_fx.cost_models import (
    Budget,
    BudgetLike,
    CostModel,
    Ledger,
    check_cost_models,
    check_feasible,
    highest_bits,
    parse_budget,
)
from cgmq_fx.cost_models.errors import BoundError, CostModelError, OptionError
from cgmq_fx.data import example_inputs_of
from cgmq_fx.directions import Direction, direction_of
from cgmq_fx.driver import DEFAULT_EPOCHS, quantize
from cgmq_fx.given import path_of, whole_number
from cgmq_fx.graphs import float_graph, quantized_graph
from cgmq_fx.identity import digest_of, model_identity, name_of, own_shapes, pruned, start_identity
from cgmq_fx.passes.capture import Captured
from cgmq_fx.passes.scheme import Scheme
from cgmq_fx.presets import TargetLike, deployment
from cgmq_fx.result import Result
from cgmq_fx.sweep_result import Sweep, SweepPoint
from cgmq_fx.terminal import note
from cgmq_fx.training import Loss, Metric, OptimizerFactory, default_optimizer
from cgmq_fx.untrusted import libraries_of

_MANIFEST = "sweep.json"


@dataclass(frozen=True)
class _Task:
    """Everything about a sweep but its budgets; picklable if what the user gave is."""

    model: nn.Module | ExportedProgram
    train_data: Iterable[Any] | None
    loss: Loss | None
    val_data: Iterable[Any] | None
    epochs: int
    example_inputs: Any
    scheme: Scheme | None
    direction: str | Direction
    target: TargetLike | None
    optimizer: OptimizerFactory
    metric: Metric | None
    seed: int

    def run(self, budget: Budget, start: Result | None, folder: Path, progress: bool) -> Result:
        """Quantize for one budget; if that is stopped, `folder` is where it continues."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        model, data = options.pop("model"), options.pop("train_data")
        return quantize(
            model, budget, data, start=start, checkpoint=folder, progress=progress, **options
        )

    def captured(self) -> Captured:
        """The model as one graph in float."""
        supervised = self.loss is not None
        inputs = example_inputs_of(self.model, self.example_inputs, self.train_data, supervised)
        return float_graph(self.model, inputs)

    def identity(self, captured: Captured) -> dict[str, str]:
        """What the points depend on, by name: the model, its inputs, options as far as told."""
        own = model_identity(captured.module, captured.inputs, captured.dynamic, None)
        where = deployment(self.target)
        return {
            "version of cgmq_fx or torch": repr(own.pop("versions")),
            "kind of device": own.pop("device"),
            "shape or dtype of inputs": repr(own.pop("inputs")),
            "model": digest_of(own),
            "target": repr((where.preset.name, where.chip)),
            "scheme": repr(where.scheme(self.scheme)),
            "direction": direction_of(self.direction).name,
            "loss": repr(name_of(self.loss)),
            "metric": repr(name_of(self.metric)),
            "val_data": repr(self.val_data is not None),
            "optimizer": repr(name_of(self.optimizer)),
            "epochs": repr(self.epochs),
            "seed": repr(self.seed),
        }


@dataclass(frozen=True)
class _Points:
    """Where points are kept, and what it takes to read them and to start from them.

    Attributes:
        folder: Has a file per point.
        libraries: Other libraries whose ops the model calls.
        shapes: Those of the model's parameters, by name.
    """

    folder: Path
    libraries: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]

    def file(self, budget: Budget) -> Path:
        return self.folder / f"{hashlib.sha256(str(budget).encode()).hexdigest()[:16]}.safetensors"

    def load(self, budget: Budget) -> Result:
        models, file = [constraint.model for constraint in budget], self.file(budget)
        try:
            return load(file, libraries=self.libraries, cost_models=models)
        except (BoundError, CostModelError) as error:
            raise OptionError(
                f"{file} was counted by another cost model, or with other arguments: {error}; "
                "give another folder"
            ) from error

    def train(self, task: _Task, budget: Budget, start: Result | None, progress: bool) -> Result:
        """Train a point and keep it; a run goes on only from the start that it began with."""
        file = self.file(budget)
        running = file.with_name(f"{file.stem}-{digest_of(start_identity(start))}.run")
        stopped = set(self.folder.glob(f"{file.stem}-*.run"))
        if progress and stopped and running not in stopped:
            note("its run that was stopped had another start; it is trained anew")
        result = task.run(budget, start, running, progress=progress)
        result.save(file)
        for run in (running, *stopped):
            shutil.rmtree(run, ignore_errors=True)
        return result


def sweep(
    model: nn.Module | ExportedProgram,
    budgets: Iterable[BudgetLike],
    train_data: Iterable[Any] | None = None,
    *,
    loss: Loss | None = None,
    val_data: Iterable[Any] | None = None,
    epochs: int = DEFAULT_EPOCHS,
    example_inputs: Any = None,
    scheme: Scheme | None = None,
    direction: str | Direction = "marginal",
    target: TargetLike | None = None,
    optimizer: OptimizerFactory = default_optimizer,
    metric: Metric | None = None,
    progress: bool = True,
    seed: int = 0,
    folder: str | Path | None = None,
    jobs: int | None = None,
) -> Sweep:
    """Quantize a model under many budgets: accuracy over cost, and its Pareto front.

    Args:
        model: As for `quantize`, like all options that are not listed here.
        budgets: The budgets, in any order; all of them are checked before any training.
        train_data: Batches.
        loss: The loss.
        val_data: Batches to compare the points on; without it their training losses are compared.
        epochs: Epochs per point.
        example_inputs: Inputs to trace with.
        scheme: Bit-widths and granularity.
        direction: Which way gates move.
        target: Where the model is to run.
        optimizer: Makes an optimizer of parameter groups, as for `quantize`.
        metric: `metric(output, target)`, higher is better.
        progress: Whether to show progress.
        seed: Seed of all that is random.
        folder: Keeps a file per point, and checkpoints of the one that is trained. Called again
            with the same model, shapes of inputs, options and versions, a sweep continues where it
            was stopped, and takes further budgets. A point whose training was stopped is trained
            anew if by then it has another neighbour to start from.
        jobs: How many points to train at once. By default one per device if the model is on one of
            several GPUs, else one. More need the package `loky`, and pass the model and the data to
            other processes.

    Returns:
        The points, from the loosest budget to the tightest. Each starts from the one before it; if
        that lost channels (0 bits), from the last one that did not, else from the model itself.

    Raises:
        CgmqError: As for `quantize`; if the folder holds another sweep, there is no budget, or two
            budgets read the same though their cost models have different arguments.
    """
    task = _Task(
        model,
        train_data,
        loss,
        val_data,
        epochs,
        example_inputs,
        scheme,
        direction,
        target,
        optimizer,
        metric,
        seed,
    )
    parsed = _parsed(task, budgets)
    captured = task.captured()
    identity = task.identity(captured)  # before quantizers are inserted
    ordered, graph = _ordered(task, captured, parsed)
    with tempfile.TemporaryDirectory() as temporary:
        kept = Path(temporary) if folder is None else path_of("folder=", folder)
        _claim(kept, identity)
        points = _Points(kept, libraries_of(graph.graph), own_shapes(graph))
        workers = min(_jobs(jobs, model), len(ordered))
        if workers == 1:
            _run_stretch(task, ordered, points, progress)
        else:
            _run_parallel(task, ordered, points, workers)
        files = [None if folder is None else points.file(budget) for budget in ordered]
        pairs = zip(ordered, files, strict=True)
        return Sweep(tuple(SweepPoint(str(b), points.load(b), file) for b, file in pairs))


def _parsed(task: _Task, budgets: Iterable[BudgetLike]) -> list[Budget]:
    """The budgets as they are read where the model is to run; at least one."""
    if isinstance(budgets, str) or not isinstance(budgets, Iterable):
        raise OptionError(f"a sweep takes a list of budgets, not {budgets!r}")
    chip = deployment(task.target).chip
    parsed = [parse_budget(budget, chip) for budget in budgets]
    if not parsed:
        raise OptionError('a sweep needs budgets, such as ["bops <= 1%", "bops <= 0.5%"]')
    return _unique(parsed)


def _unique(budgets: Sequence[Budget]) -> list[Budget]:
    """Each budget once.

    Raises:
        OptionError: If two of them read the same, but count by cost models that differ: points, and
            the files that keep them, are told apart by what their budgets read.
    """
    found: dict[str, Budget] = {}
    for budget in budgets:
        pairs = zip(found.setdefault(str(budget), budget), budget, strict=True)
        if not all(_alike(first.model, second.model) for first, second in pairs):
            raise OptionError(
                f"two budgets read {str(budget)!r}, but their cost models differ; sweep them "
                "apart, each in a folder of its own, or give their cost models different names"
            )
    return list(found.values())


def _alike(one: CostModel, other: CostModel) -> bool:
    """Whether two cost models are of one class and hold the same, as far as can be told."""
    try:
        return one is other or bool(one.__reduce_ex__(2) == other.__reduce_ex__(2))
    except (TypeError, ValueError, RuntimeError):  # it cannot be copied, or arrays are compared
        return False


def _ordered(
    task: _Task, captured: Captured, parsed: Sequence[Budget]
) -> tuple[list[Budget], GraphModule]:
    """The budgets, the loosest first, and the model with quantizers, which are inserted in place.

    Each budget is known to be feasible, and the model to fit into a file.
    """
    graph, facts = quantized_graph(captured, deployment(task.target).scheme(task.scheme))
    check_kept(graph)

    def looseness(budget: Budget) -> float:
        """The smallest bound as a share of what the model costs at most."""
        check_cost_models(facts, budget)
        check_feasible(facts, budget)
        ledger = Ledger(facts, budget, highest_bits(facts))
        pairs = zip(ledger.limits, ledger.totals, strict=True)
        return min(limit / total if total else 1.0 for limit, total in pairs)

    return sorted(parsed, key=looseness, reverse=True), graph


def _claim(folder: Path, identity: dict[str, str]) -> None:
    """Make the folder this sweep's own, or see that it is."""
    manifest = folder / _MANIFEST
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not manifest.exists():
            manifest.write_text(json.dumps({"sweep": identity}))
        found = json.loads(manifest.read_text())
    except (OSError, ValueError) as error:
        raise OptionError(f"the sweep cannot be kept in {folder}: {error}") from error
    other = found.get("sweep") if isinstance(found, dict) else None
    if not isinstance(other, dict):
        raise OptionError(
            f"{manifest} is no record of a sweep, or one of an older version; give another folder"
        )
    differ = [name for name, value in identity.items() if other.get(name) != value]
    if differ:
        raise OptionError(
            f"{folder} holds a sweep with another {' and another '.join(differ)}; "
            "give another folder"
        )


def _run_stretch(task: _Task, budgets: Sequence[Budget], points: _Points, progress: bool) -> None:
    """Train the points that are not there yet, each from the last one that has all its channels."""
    start: Result | None = None
    for number, budget in enumerate(budgets, 1):
        if points.file(budget).exists():
            found = points.load(budget)
        else:
            if progress:
                note(f"point {number} of {len(budgets)}: {budget}")
            found = points.train(task, budget, start, progress)
        if pruned(found, points.shapes) is None:
            start = found


def _run_parallel(
    task: _Task,
    budgets: Sequence[Budget],
    points: _Points,
    workers: int,
) -> None:
    try:
        from loky import ProcessPoolExecutor
        from loky.process_executor import BrokenProcessPool
    except ImportError as error:
        raise OptionError(
            'several jobs need loky, which is not installed: pip install "cgmq-fx[sweep]"'
        ) from error
    cores = max(1, (os.cpu_count() or 1) // workers)
    muted = (logging.root.manager.disable,)  # what is not logged here is not there
    with ProcessPoolExecutor(workers, initializer=logging.disable, initargs=muted) as pool:
        futures = [
            pool.submit(_work, task, stretch, points, index, cores)
            for index, stretch in enumerate(_stretches(budgets, workers))
        ]
        try:
            for future in futures:
                future.result()
        except (PicklingError, BrokenProcessPool) as error:
            raise OptionError(
                f"the model, the data or a function cannot be passed to other processes: {error}; "
                "use jobs=1"
            ) from error


def _work(
    task: _Task,
    budgets: Sequence[Budget],
    points: _Points,
    index: int,
    cores: int,
) -> None:
    """What one process does."""
    torch.set_num_threads(cores)
    devices = _devices(task.model)
    if devices and isinstance(task.model, nn.Module):
        task.model.to(devices[index % len(devices)])
    _run_stretch(task, budgets, points, progress=False)


def _stretches(budgets: Sequence[Budget], count: int) -> Iterator[Sequence[Budget]]:
    """`count` neighbouring stretches that differ in length by one at most."""
    ends = [len(budgets) * i // count for i in range(count + 1)]
    yield from (budgets[a:b] for a, b in pairwise(ends))


def _jobs(asked: int | None, model: nn.Module | ExportedProgram) -> int:
    if asked is None:
        return max(1, len(_devices(model)))
    return whole_number("jobs", asked, 1)


def _devices(model: nn.Module | ExportedProgram) -> list[torch.device]:
    """The devices that points can be trained on; none if they all stay where the model is."""
    tensors = [t for t in _state(model).values() if isinstance(t, torch.Tensor)]
    if isinstance(model, ExportedProgram) or not tensors or tensors[0].device.type != "cuda":
        return []
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def _state(model: nn.Module | ExportedProgram) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (
        model.state_dict if isinstance(model, ExportedProgram) else model.state_dict()
    )
    return found
