"""The training driver: `quantize`, written on nothing but `prepare`'s object."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils import _pytree as pytree

from cgmq_fx.callbacks import Callback
from cgmq_fx.cost_models import BudgetLike, parse_budget
from cgmq_fx.cost_models.errors import DataError, OptionError, TrainingError
from cgmq_fx.data import (
    Batch,
    Signature,
    SyntheticBatches,
    batch_count,
    example_inputs_of,
    first_batch,
    split_batch,
)
from cgmq_fx.directions import Direction, direction_of
from cgmq_fx.history import EpochRecord, GateRecord, History, StepRecord
from cgmq_fx.passes.capture import ExampleInputs, device_of
from cgmq_fx.passes.copying import copy_graph
from cgmq_fx.passes.scheme import Scheme
from cgmq_fx.prepared import Prepared, float_graph
from cgmq_fx.presets import TargetLike, deployment
from cgmq_fx.progress import Progress
from cgmq_fx.result import Result
from cgmq_fx.training import (
    Loss,
    Metric,
    OptimizerFactory,
    accuracy,
    default_optimizer,
    imitation,
    parameter_groups,
    schedule,
)

_SEARCH_SHARE = 0.4
_CHECK_EVERY = 25
_GATE_RECORDS = 100
DEFAULT_EPOCHS = 10


def quantize(
    model: nn.Module | ExportedProgram,
    budget: BudgetLike,
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
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    seed: int = 0,
    start: Result | None = None,
) -> Result:
    """Quantize a model so that it costs at most what the budget says.

    Args:
        model: The trained float model, on any device; it is not modified.
        budget: What the result may cost at most, for example `"bops <= 0.4%, weights <= 64 KiB"`.
        train_data: Re-iterable batches: tensors, `(inputs, target)`, tuples or dicts. Without it
            the float model teaches the quantized one on random inputs.
        loss: `loss(output, target)`; without it the float model is the teacher.
        val_data: Batches to measure on after every epoch.
        epochs: Passes over the data; the first part searches bit-widths, the rest tunes. With 0
            ranges are calibrated and bit-widths chosen without training.
        example_inputs: Inputs to trace with, if neither the data nor the model tells.
        scheme: Bit-widths and granularity; the default is one gate per tensor.
        direction: Which way gates move, by name or a `Direction`.
        target: Where it is to run: a preset (`"onnxruntime"`, `"fpga"`, `"xnnpack"`, `"litert"`),
            a chip for latency and energy (a name, a file or a `Target`), or a sequence of both.
        optimizer: Makes an optimizer of parameter groups.
        metric: `metric(output, target)` on validation data; accuracy where it applies by default.
        callbacks: Told about every step and epoch.
        progress: Whether to show progress on the terminal.
        seed: Seed of all that is random: inputs where there is no data, dropout, shuffling. The
            global random state is left as it was.
        start: A result of the same model under another budget: weights and bit-widths start there.

    Returns:
        The result; its cost was counted again on the finished model.

    Raises:
        CgmqError: With what is wrong and what to do: the budget cannot be read or cannot be met,
            the model cannot be captured, the data does not fit, or training diverged.
    """
    where = deployment(target)
    chosen = where.scheme(scheme)
    parsed = parse_budget(budget, where.chip)
    if not isinstance(epochs, int) or epochs < 0:
        raise OptionError(f"epochs must be a whole number, 0 or more, not {epochs!r}")
    if train_data is None and loss is not None:
        raise DataError("a loss was given, but no train_data; pass it, or leave out loss=")
    with _seeded(seed):
        inputs = example_inputs_of(model, example_inputs, train_data, loss is not None)
        captured = float_graph(model, inputs)
        teacher = copy_graph(captured.module).eval() if loss is None else None
        data = SyntheticBatches(captured.inputs, seed) if train_data is None else train_data
        first_batch(data, "train_data")
        if val_data is not None:
            first_batch(val_data, "val_data")
        steps = epochs * batch_count(data)
        search = max(1, round(_SEARCH_SHARE * steps))
        prepared = Prepared(captured, parsed, chosen, direction_of(direction), search)
        if start is not None:
            prepared.start_from(start)
        prepared.calibrate(data)
        listeners = [*callbacks, *([Progress()] if progress else [])]
        run = _Run(prepared, teacher, loss, metric, optimizer, steps, search, listeners)
        return run.train(data, val_data, epochs)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the random state of this process, and give it back as it was."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield


@dataclass
class _Means:
    """Running means by name."""

    def __post_init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, name: str, value: Tensor | float | None, count: int) -> None:
        if value is not None:
            total, seen = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + float(value) * count, seen + count)

    def result(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self._sums.items() if count}


class _Run:
    """One run of the driver: the state of the training loop."""

    def __init__(
        self,
        prepared: Prepared,
        teacher: GraphModule | None,
        loss: Loss | None,
        metric: Metric | None,
        optimizer: OptimizerFactory,
        steps: int,
        search: int,
        listeners: Sequence[Callback],
    ) -> None:
        self.prepared = prepared
        self.model = prepared.model
        self.teacher = teacher
        self.loss = loss
        self.metric = metric
        self.steps = steps
        self.search = search
        self.history = History()
        self.listeners = listeners
        self.device = device_of(self.model)
        self.signature = Signature.like(prepared.example_inputs, prepared.parameter_names)
        self.optimizer: Optimizer = optimizer(parameter_groups(self.model))
        self.scheduler = LambdaLR(self.optimizer, schedule(search, steps))

    def train(self, data: Iterable[Any], val_data: Iterable[Any] | None, epochs: int) -> Result:
        """Search and tune, then finalize and measure."""
        for listener in self.listeners:
            listener.on_start(self.prepared, self.steps)
        try:
            for epoch in range(1, epochs + 1):
                self._epoch(epoch, data, val_data)
        finally:
            for listener in self.listeners:
                listener.on_end()
        result = self.prepared.finalize()
        result.history = self.history
        if val_data is not None:
            result.metrics = self._evaluate(result.model, val_data)
        return result

    def _epoch(self, epoch: int, data: Iterable[Any], val_data: Iterable[Any] | None) -> None:
        self.model.train()
        total, count = torch.zeros((), device=self.device), 0
        for raw in data:
            total += self._step(self._batch(raw))
            count += 1
        if count == 0:
            raise DataError(f"train_data had no batches in epoch {epoch}; it must be re-iterable")
        metrics = {} if val_data is None else self._evaluate(self.model, val_data)
        record = EpochRecord(
            epoch,
            self.prepared.phase,
            float(total) / count,
            metrics,
            self._costs(),
            self.prepared.satisfied,
        )
        self.history.epochs.append(record)
        for listener in self.listeners:
            listener.on_epoch(record)

    def _step(self, batch: Batch) -> Tensor:
        number = len(self.history.steps)
        value = self._loss(self._call(self.model, batch.inputs), batch)
        read = self.device.type == "cpu" or number % _CHECK_EVERY == 0
        loss = float(value.detach()) if read else None
        if loss is not None and not isfinite(loss):
            raise TrainingError(
                f"the loss became {loss} at step {number + 1} of {self.steps} "
                f"(phase {self.prepared.phase}); check the data for values that are not finite, or "
                "pass an optimizer= with a smaller learning rate"
            )
        if not value.requires_grad:
            raise DataError("loss(output, target) has no gradient with respect to the output")
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.prepared.step()
        record = StepRecord(number, self.steps, self.prepared.phase, self._costs(), loss)
        self.history.steps.append(record)
        self._record_gates(record)
        for listener in self.listeners:
            listener.on_step(record)
        return value.detach()

    def _record_gates(self, record: StepRecord) -> None:
        every = max(1, self.search // _GATE_RECORDS)
        if record.step >= self.search or (record.step + 1) % every:
            return
        controller = self.prepared.controller
        bits = [float(b.mean()) for b in controller.assignment.values()]
        sums = torch.bincount(controller.layout.owner, controller.gates)
        means = sums / torch.bincount(controller.layout.owner)
        self.history.quantizers = tuple(controller.assignment)
        self.history.gates.append(GateRecord(record.step, tuple(means.tolist()), tuple(bits)))

    def _loss(self, output: Any, batch: Batch) -> Tensor:
        if self.loss is None:
            assert self.teacher is not None
            with torch.no_grad():
                target = self._call(self.teacher, batch.inputs)
            return imitation(output, target)
        value = _judged("loss", self.loss, output, batch.target)
        if not isinstance(value, Tensor):
            raise DataError(f"loss(output, target) must return a tensor, not {_shapes(value)}")
        return value

    def _call(self, model: GraphModule, inputs: ExampleInputs) -> Any:
        try:
            return model(*inputs.args, **inputs.kwargs)
        except (RuntimeError, TypeError, ValueError) as error:
            raise DataError(
                f"the model fails on a batch of {_shapes(inputs.tensors)}: {error}"
            ) from error

    def _batch(self, raw: Any) -> Batch:
        batch = split_batch(raw, self.signature, self.loss is not None)
        expected = self.prepared.example_inputs
        found = batch.inputs.tensors
        start = 1 if self.prepared.dynamic else 0
        if len(found) != len(expected.tensors) or any(
            a.shape[start:] != b.shape[start:] or a.is_floating_point() != b.is_floating_point()
            for a, b in zip(found, expected.tensors, strict=True)
        ):
            free = "any batch size" if start else "the same batch size"
            raise DataError(
                f"a batch of {_shapes(found)} does not fit the model, which was captured with "
                f"{_shapes(expected.tensors)}; batches need the same shapes and kinds of dtypes, "
                f"{free}"
            )
        return batch.to(self.device)

    @torch.no_grad()
    def _evaluate(self, model: GraphModule, data: Iterable[Any]) -> dict[str, float]:
        model.eval()
        means = _Means()
        for raw in data:
            batch = self._batch(raw)
            size = batch.inputs.batch or 1
            output = self._call(model, batch.inputs)
            means.add("loss", self._loss(output, batch), size)
            if self.metric is not None:
                means.add("metric", _judged("metric", self.metric, output, batch.target), size)
            else:
                means.add("accuracy", accuracy(output, batch.target), size)
        if not (result := means.result()):
            raise DataError("val_data had no batches this time; it must be re-iterable")
        return result

    def _costs(self) -> tuple[float, ...]:
        return tuple(s.value / s.limit if s.limit else 0.0 for s in self.prepared.cost)


def _judged(name: str, function: Loss | Metric, output: Any, target: Any) -> Tensor | float:
    """What the user's loss or metric says: one number."""
    try:
        value = function(output, target)
    except Exception as error:
        raise DataError(
            f"{name}(output, target) failed: {type(error).__name__}: {error}; the output is "
            f"{_shapes(output)}, the target {_shapes(target)}"
        ) from error
    if not isinstance(value, Tensor | float | int) or torch.as_tensor(value).numel() != 1:
        raise DataError(f"{name}(output, target) must return one number, not {_shapes(value)}")
    return value


def _shapes(value: Any) -> str:
    leaves = [x for x in pytree.tree_leaves(value) if x is not None]
    found = [
        f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
        if isinstance(x, Tensor)
        else type(x).__name__
        for x in leaves[:6]
    ]
    return ", ".join(found) or "nothing"
