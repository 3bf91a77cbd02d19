"""The ways to spend a budget that are compared, each with the same data, steps and recipe."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice, repeat
from pathlib import Path

from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

import cgmq_fx
from benchmarks.accuracy.brevitas_network import brevitas_network
from benchmarks.accuracy.cases import Case, Data, Files
from benchmarks.accuracy.fixed import knapsack, random_assignment, sensitivities, widest_uniform
from benchmarks.accuracy.penalty import Penalised
from benchmarks.lenet5 import accuracy
from benchmarks.mnist import Batches
from cgmq_fx.checkpoint import Checkpoint
from cgmq_fx.cost_models import Assignment, ConstraintState, Ledger, parse_budget, uniform_bits
from cgmq_fx.directions import DIRECTIONS, direction_of
from cgmq_fx.graphs import float_graph
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.prepared import Prepared
from cgmq_fx.result import Result
from cgmq_fx.run import Run
from cgmq_fx.training import default_optimizer, parameter_groups, schedule, search_steps

_SENSITIVITY_BATCHES = 8
_FREE = "bops <= 100%"  # a penalty knows no bound: what it gives is measured afterwards


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        case: What is quantized.
        method: How bit-widths are chosen, one of `METHODS`.
        bound: The budget; for a penalty its weight.
        seed: Of the order of the data.
        epochs: In all.
    """

    case: Case
    method: str
    bound: str
    seed: int
    epochs: int

    @property
    def key(self) -> str:
        """What tells it from other runs, fit for a file name."""
        method = self.method.replace("*", "-times-").replace("+", "-plus-")
        text = f"{self.case.name} {method} {self.bound} seed {self.seed} x{self.epochs}"
        return "".join(c if c.isalnum() or c in "._-" else "_" for c in text)


@dataclass(frozen=True)
class Row:
    """What a run gave.

    Attributes:
        key: The run's.
        case: The case's name.
        method: The method.
        bound: The budget.
        seed: The seed.
        epochs: Epochs of quantization.
        accuracy: On the test set, after the last epoch: no epoch is picked by it.
        float_accuracy: Of the float network that all start from.
        costs: What every constraint measures, relative where the bound is, else in its unit.
        satisfied: Whether the budget holds.
        bits: Mean bits of every quantizer, by name.
        seconds: How long it took.
    """

    key: str
    case: str
    method: str
    bound: str
    seed: int
    epochs: int
    accuracy: float
    float_accuracy: float
    costs: tuple[float, ...]
    satisfied: bool
    bits: dict[str, float]
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """As plain values."""
        return asdict(self)


def run(job: Job, files: Files, say: Callable[[str], None]) -> Row:
    """Train, or take up the training where it was stopped; the row."""
    start = time.perf_counter()
    model, before = job.case.float_net(files, say)
    train, test = job.case.train_data(files, job.seed), job.case.test_data(files)
    folder = files.out / f"run-{job.key}"
    found = METHODS[job.method](job, model, train, test, folder)
    shutil.rmtree(folder, ignore_errors=True)
    return Row(
        job.key,
        job.case.name,
        job.method,
        job.bound,
        job.seed,
        job.epochs,
        found.accuracy,
        before,
        tuple(
            s.value / s.reference if s.constraint.bound.relative else s.value for s in found.states
        ),
        all(state.satisfied for state in found.states),
        {n: float(b.mean()) for n, b in found.bits.items()},
        time.perf_counter() - start,
    )


@dataclass(frozen=True)
class Outcome:
    """A trained network, as far as it is compared.

    Attributes:
        accuracy: On the test set.
        states: What every constraint measures.
        bits: Of every quantizer.
    """

    accuracy: float
    states: Sequence[ConstraintState]
    bits: Assignment


def _outcome(result: Result, test: Data) -> Outcome:
    found = accuracy(result.model, test)
    return Outcome(found, result.cost.states, result.cost.assignment)


def _ours(direction: str) -> Callable[..., Outcome]:
    def quantized(job: Job, model: nn.Module, train: Batches, test: Data, folder: Path) -> Outcome:
        result = cgmq_fx.quantize(
            model,
            job.bound,
            train,
            loss=cross_entropy,
            epochs=job.epochs,
            scheme=job.case.scheme,
            direction=direction,
            seed=job.seed,
            checkpoint=folder,
            progress=False,
        )
        return _outcome(result, test)

    return quantized


def _prepared(
    job: Job, model: nn.Module, train: Batches, bound: str, scheme: cgmq_fx.Scheme
) -> Prepared:
    captured = float_graph(model, ExampleInputs((next(iter(train))[0][:2],)))
    steps = search_steps(job.epochs * len(train))
    prepared = Prepared(captured, parse_budget(bound), scheme, direction_of("marginal"), steps)
    prepared.calibrate(train)
    return prepared


def _uniform(job: Job, model: nn.Module, train: Batches, test: Data, folder: Path) -> Outcome:
    probe = _prepared(job, model, train, job.bound, job.case.scheme)
    bits = widest_uniform(probe.facts, probe.budget)
    prepared = _prepared(job, model, train, job.bound, cgmq_fx.Scheme(bit_widths=(bits,)))
    return _tuned(job, prepared, train, test, folder)


def _knapsack(job: Job, model: nn.Module, train: Batches, test: Data, folder: Path) -> Outcome:
    prepared = _prepared(job, model, train, job.bound, job.case.scheme)
    rises = sensitivities(prepared, list(islice(train, _SENSITIVITY_BATCHES)))
    prepared.freeze(knapsack(prepared.facts, prepared.budget, rises))
    return _tuned(job, prepared, train, test, folder)


def _random(job: Job, model: nn.Module, train: Batches, test: Data, folder: Path) -> Outcome:
    prepared = _prepared(job, model, train, job.bound, job.case.scheme)
    prepared.freeze(random_assignment(prepared.facts, prepared.budget, job.seed))
    return _tuned(job, prepared, train, test, folder)


def _tuned(job: Job, prepared: Prepared, train: Batches, test: Data, folder: Path) -> Outcome:
    """Train with frozen bit-widths, by the driver's own recipe."""
    steps = job.epochs * len(train)
    driver = Run(
        prepared, None, cross_entropy, None, default_optimizer, steps, search_steps(steps), []
    )
    driver.resume(Checkpoint(folder), {"job": job.key}, (train, None))
    return _outcome(driver.train(train, None, job.epochs), test)


def _penalty(job: Job, model: nn.Module, train: Batches, test: Data, folder: Path) -> Outcome:
    """The weight stands in the place of a bound, as in "penalty:10"."""
    prepared = _prepared(job, model, train, _FREE, job.case.scheme)
    steps = job.epochs * len(train)
    search = search_steps(steps)
    penalised = Penalised(prepared, float(job.bound.rpartition(":")[2]))
    optimizer = default_optimizer(penalised.groups())
    factor = schedule(search, steps)
    rate = LambdaLR(optimizer, factor)
    batches = chain.from_iterable(repeat(train))
    prepared.model.train()
    for step, (images, labels) in enumerate(islice(batches, steps)):
        loss = cross_entropy(prepared.model(images), labels)
        if step < search:
            loss = loss + penalised.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if step + 1 == search:
            penalised.harden()
            optimizer = default_optimizer(parameter_groups(prepared.model))
            rate = LambdaLR(optimizer, lambda later: factor(search + later))
    return _outcome(prepared.finalize(), test)


def _brevitas(job: Job, model: nn.Module, train: Batches, test: Data, folder: Path) -> Outcome:
    """Its layers at the widest uniform bits, the rest in float; counted as if all had these."""
    probe = _prepared(job, model, train, job.bound, job.case.scheme)
    bits = widest_uniform(probe.facts, probe.budget)
    peer = brevitas_network(model, bits, next(iter(train))[0])
    steps = job.epochs * len(train)
    optimizer = default_optimizer(parameter_groups(peer))
    rate = LambdaLR(optimizer, schedule(search_steps(steps), steps))
    peer.train()
    for images, labels in islice(chain.from_iterable(repeat(train)), steps):
        optimizer.zero_grad()
        cross_entropy(peer(images), labels).backward()
        optimizer.step()
        rate.step()
    assignment = uniform_bits(probe.facts, bits)
    ledger = Ledger(probe.facts, probe.budget, assignment)
    return Outcome(accuracy(peer, test), ledger.states(), assignment)


METHODS: dict[str, Callable[[Job, nn.Module, Batches, Data, Path], Outcome]] = {
    **{name: _ours(name) for name in DIRECTIONS},
    "uniform": _uniform,
    "knapsack": _knapsack,
    "random": _random,
    "penalty": _penalty,
    "brevitas": _brevitas,
}
