"""The training driver: `quantize`, written on nothing but `prepare`'s object."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from cgmq_fx.callbacks import Callback
from cgmq_fx.checkpoint import Checkpoint, CheckpointStore
from cgmq_fx.cost_models import BudgetLike, parse_budget
from cgmq_fx.cost_models.errors import CheckpointError, DataError, OptionError, TrainingError
from cgmq_fx.cost_models.target import target_to_json
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
from cgmq_fx.history import EpochRecord, History, StepRecord
from cgmq_fx.identity import model_identity, name_of, optimizer_identity
from cgmq_fx.judging import Means, judged, shapes_of
from cgmq_fx.passes.capture import ExampleInputs, device_of
from cgmq_fx.passes.copying import copy_graph
from cgmq_fx.passes.scheme import Scheme
from cgmq_fx.position import Position
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
    checkpoint: str | Path | Checkpoint | None = None,
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
        checkpoint: A folder to keep the run in, every five minutes, or a `Checkpoint` that says how
            often. The same call resumes it and ends with the same result, bit by bit, as if it had
            not been interrupted, if the data comes in the same order; a finished run is not
            trained again.

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
        way = direction_of(direction)
        identity = {
            **({} if checkpoint is None else model_identity(captured.module, inputs, start)),
            "budget": str(parsed),
            "target": {} if where.chip is None else target_to_json(where.chip),
            "scheme": repr(chosen),
            "direction": name_of(type(way)),
            "loss": name_of(loss),
            "metric": name_of(metric),
            "epochs": epochs,
            "steps": steps,
            "seed": seed,
        }
        prepared = Prepared(captured, parsed, chosen, way, search)
        if start is not None:
            prepared.start_from(start)
        prepared.calibrate(data)
        listeners = [*callbacks, *([Progress()] if progress else [])]
        run = _Run(prepared, teacher, loss, metric, optimizer, steps, search, listeners)
        if checkpoint is not None:
            run.resume(checkpoint, identity, (data, val_data))
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
        self.store: CheckpointStore | None = None
        self.position = Position(torch.zeros((), device=self.device))

    def resume(
        self,
        checkpoint: str | Path | Checkpoint,
        identity: dict[str, Any],
        sources: Sequence[Iterable[Any] | None],
    ) -> None:
        """Keep the run in a folder from now on, and take up the run that is there.

        Raises:
            CheckpointError: If what is there is another run, or damaged.
        """
        options = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
        identity = {**identity, "optimizer": optimizer_identity(self.optimizer)}
        self.store = CheckpointStore(options, identity)
        self.position.sources = sources
        state = self.store.read()
        if state is None:
            return
        try:
            self.prepared.load_state_dict(state["prepared"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.history.load_state_dict(state["history"])
            self.position.load_state_dict(state["position"])
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint in {options.folder} is damaged: {error}"
            ) from error

    def _keep(self, last: bool = False) -> None:
        """Write a checkpoint, if it is time."""
        if self.store is not None and (last or self.store.due(len(self.history.steps))):
            self.store.write(
                {
                    "prepared": self.prepared.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scheduler": self.scheduler.state_dict(),
                    "history": self.history.state_dict(),
                    "position": self.position.state_dict(),
                }
            )

    def train(self, data: Iterable[Any], val_data: Iterable[Any] | None, epochs: int) -> Result:
        """Search and tune, then finalize and measure."""
        for listener in self.listeners:
            listener.on_start(self.prepared, self.steps)
        try:
            while self.position.epoch <= epochs:
                self._epoch(data, val_data)
                self.position.advance()
            self._keep(last=True)
        finally:
            for listener in self.listeners:
                listener.on_end()
        result = self.prepared.finalize()
        result.history = self.history
        if val_data is not None:
            result.metrics = self._evaluate(result.model, val_data)
        return result

    def _epoch(self, data: Iterable[Any], val_data: Iterable[Any] | None) -> None:
        at = self.position
        self.model.train()
        for raw in at.batches(data):
            at.total += self._step(self._batch(raw))
            at.batch += 1
            self._keep()
        if at.batch == 0:
            raise DataError(
                f"train_data had no batches in epoch {at.epoch}; it must be re-iterable"
            )
        metrics = {} if val_data is None else self._evaluate(self.model, val_data)
        record = EpochRecord(
            at.epoch,
            self.prepared.phase,
            float(at.total) / at.batch,
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
        self.history.quantizers = tuple(self.prepared.controller.assignment)
        self.history.gates.append(self.prepared.gate_record(record.step))

    def _loss(self, output: Any, batch: Batch) -> Tensor:
        if self.loss is None:
            assert self.teacher is not None
            with torch.no_grad():
                target = self._call(self.teacher, batch.inputs)
            return imitation(output, target)
        value = judged("loss", self.loss, output, batch.target)
        if not isinstance(value, Tensor):
            raise DataError(f"loss(output, target) must return a tensor, not {shapes_of(value)}")
        return value

    def _call(self, model: GraphModule, inputs: ExampleInputs) -> Any:
        try:
            return model(*inputs.args, **inputs.kwargs)
        except (RuntimeError, TypeError, ValueError) as error:
            raise DataError(
                f"the model fails on a batch of {shapes_of(inputs.tensors)}: {error}"
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
                f"a batch of {shapes_of(found)} does not fit the model, which was captured with "
                f"{shapes_of(expected.tensors)}; batches need the same shapes and kinds of dtypes, "
                f"{free}"
            )
        return batch.to(self.device)

    @torch.no_grad()
    def _evaluate(self, model: GraphModule, data: Iterable[Any]) -> dict[str, float]:
        model.eval()
        means = Means()
        for raw in data:
            batch = self._batch(raw)
            size = batch.inputs.batch or 1
            output = self._call(model, batch.inputs)
            means.add("loss", self._loss(output, batch), size)
            if self.metric is not None:
                means.add("metric", judged("metric", self.metric, output, batch.target), size)
            else:
                means.add("accuracy", accuracy(output, batch.target), size)
        if not (result := means.result()):
            raise DataError("val_data had no batches this time; it must be re-iterable")
        return result

    def _costs(self) -> tuple[float, ...]:
        return tuple(s.value / s.limit if s.limit else 0.0 for s in self.prepared.cost)
