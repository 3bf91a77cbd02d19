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
from cgmq_fx.checkpoint import OtherRunError
from cgmq_fx.cost_models import (
    Budget,
    BudgetLike,
    Ledger,
    check_cost_models,
    check_feasible,
    highest_bits,
)
from cgmq_fx.cost_models.errors import BoundError, CostModelError, OptionError
from cgmq_fx.data import SyntheticBatches, batch_count, example_inputs_of
from cgmq_fx.directions import Direction, direction_of
from cgmq_fx.driver import DEFAULT_EPOCHS, quantize
from cgmq_fx.given import path_of, whole_number
from cgmq_fx.graphs import float_graph, quantized_graph
from cgmq_fx.identity import (
    digest_of,
    optimizer_identity,
    own_shapes,
    pruned,
    run_identity,
    start_identity,
)
from cgmq_fx.passes.capture import Captured
from cgmq_fx.passes.scheme import Scheme
from cgmq_fx.presets import TargetLike, deployment
from cgmq_fx.result import Result
from cgmq_fx.sweep_budgets import read_budgets
from cgmq_fx.sweep_result import Sweep, SweepPoint
from cgmq_fx.terminal import note
from cgmq_fx.training import (
    Loss,
    Metric,
    OptimizerFactory,
    default_optimizer,
    made_by,
    parameter_groups,
)
from cgmq_fx.untrusted import libraries_of

_MANIFEST = "sweep.json"
_MOST_SHOWN = 3
_TOLD = {
    "versions": "version of cgmq_fx or torch",
    "device": "kind of device",
    "inputs": "shape or dtype of inputs",
    "batches": "number of batches",
}
"""What messages call what a sweep is, where its name does not tell."""


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
        """What all points are, as text by name; the optimizer takes parameters to be known."""
        where, data = deployment(self.target), self.train_data
        data = SyntheticBatches(captured.inputs, self.seed) if data is None else data
        scheme, direction = where.scheme(self.scheme), direction_of(self.direction)
        own = run_identity(
            *(captured, where, scheme, direction, None, self.loss, self.metric),
            judged=self.val_data is not None,
            epochs=self.epochs,
            batches=batch_count(data),
            seed=self.seed,
        )
        own["model"] = digest_of({name: own.pop(name) for name in ("graph", "model")})
        return {_TOLD.get(name, name): repr(value) for name, value in own.items()}

    def optimizer_identity(self, graph: GraphModule) -> str:
        """What its optimizer is for a model with quantizers."""
        return repr(optimizer_identity(made_by(self.optimizer, parameter_groups(graph))))


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
        try:
            result = task.run(budget, start, running, progress=progress)
        except OtherRunError:  # of a loss or metric that keeps what it has seen
            shutil.rmtree(running)
            if progress:
                note("its run that was stopped was another one; it is trained anew")
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
    parsed = read_budgets(budgets, deployment(target).chip)
    captured = task.captured()
    identity = task.identity(captured)  # before quantizers are inserted
    ordered, graph = _ordered(task, captured, parsed)
    identity["optimizer"] = task.optimizer_identity(graph)
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
    names = {**identity, **other}
    differ = [name for name in names if identity.get(name) != other.get(name)]
    if differ:
        raise OptionError(
            f"{folder} holds a sweep with another {' and another '.join(differ[:_MOST_SHOWN])}; "
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
