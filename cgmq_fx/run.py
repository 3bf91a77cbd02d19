"""One run of the training driver: epochs, steps, checkpoints, and what happens when it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from math import isfinite
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from cgmq_fx.callbacks import Callback
from cgmq_fx.checkpoint import Checkpoint, CheckpointStore
from cgmq_fx.cost_models.errors import (
    CgmqError,
    CheckpointError,
    DataError,
    StoppedError,
    TrainingError,
)
from cgmq_fx.data import (
    Batch,
    Signature,
    check_constants,
    split_batch,
)
from cgmq_fx.health import silent_channels
from cgmq_fx.history import EpochRecord, History, StepRecord
from cgmq_fx.identity import optimizer_identity
from cgmq_fx.interrupt import Interrupt
from cgmq_fx.judging import Means, copied, judged, shapes_of, untouched
from cgmq_fx.passes.capture import ExampleInputs, device_of
from cgmq_fx.passes.norms import agree_on_norms
from cgmq_fx.passes.processes import process_count
from cgmq_fx.position import Position
from cgmq_fx.prepared import Prepared
from cgmq_fx.rescue import Rescue, blame, broken_gradient, broken_state
from cgmq_fx.result import Result
from cgmq_fx.together import is_first, mean, shared
from cgmq_fx.training import (
    Loss,
    Metric,
    OptimizerFactory,
    accuracy,
    imitation,
    made_by,
    parameter_groups,
    schedule,
)
from cgmq_fx.verdict import verdict

_CHECK_EVERY = 25
_GATE_RECORDS = 100
_JUDGED_BATCHES = 16


class Run:
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
        backend: str | None = None,
    ) -> None:
        self.prepared = prepared
        self.model = prepared.model
        self.forward: nn.Module = self.model
        if backend is not None:
            self.forward = cast(nn.Module, torch.compile(self.model, backend=backend))
        self.alone = self.forward
        if process_count() > 1:
            self.forward = DistributedDataParallel(self.forward)
        self.teacher = teacher
        self.loss = loss
        self.metric = metric
        self.steps = steps
        self.history = History()
        self.listeners = listeners
        self.device = device_of(self.model)
        self.signature = Signature.like(prepared.example_inputs, prepared.input_names)
        self.optimizer = made_by(optimizer, parameter_groups(self.model))
        self.scheduler = LambdaLR(self.optimizer, schedule(search, steps))
        self.store: CheckpointStore | None = None
        self.position = Position(torch.zeros((), device=self.device, dtype=torch.float32))
        self.interrupt = Interrupt()
        self.rescue = Rescue(prepared)

    def resume(
        self,
        checkpoint: Checkpoint,
        identity: dict[str, Any],
        sources: Sequence[Iterable[Any] | None],
    ) -> None:
        """Keep the run in a folder from now on, and take up the run that is there.

        Raises:
            CheckpointError: If what is there is another run, or damaged.
        """
        identity = {**identity, "optimizer": optimizer_identity(self.optimizer)}
        self.store = CheckpointStore(checkpoint, identity)
        self.position.sources = sources
        state = shared(self.store.read)
        if state is None:
            return
        try:
            self.prepared.load_state_dict(state["prepared"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.history.load_state_dict(state["history"])
            self.position.load_state_dict(state["position"])
            self.rescue.load_state_dict(state["best"])
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint in {checkpoint.folder} is damaged: {error}"
            ) from error

    def check_metric(self, raw: Any) -> None:
        """Ask a copy of the metric about a batch, before anything is trained.

        Raises:
            DataError: If it fails, or gives no number.
        """
        metric = copied(self.metric)
        if metric is not None:
            batch = self._batch(raw)
            with untouched(self.model), torch.no_grad():
                output = self._call(self.model.eval(), batch.inputs)
                judged("metric", metric, output, batch.target)

    def _keep(self, last: bool = False) -> None:
        """Write a checkpoint, if it is time, in the first process."""
        store, done = self.store, len(self.history.steps)
        if store is not None and is_first() and (last or store.due(done)):
            store.write(
                {
                    "prepared": self.prepared.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scheduler": self.scheduler.state_dict(),
                    "history": self.history.state_dict(),
                    "position": self.position.state_dict(),
                    "best": self.rescue.state_dict(),
                }
            )

    def train(self, data: Iterable[Any], val_data: Iterable[Any] | None, epochs: int) -> Result:
        """Search and tune, then finalize and measure."""
        with ExitStack() as ending:
            for listener in self.listeners:
                listener.on_start(self.prepared, self.steps)
                ending.callback(listener.on_end)
            return self._trained(data, val_data, epochs)

    def _trained(self, data: Iterable[Any], val_data: Iterable[Any] | None, epochs: int) -> Result:
        """Whatever goes wrong, what was reached goes along with the error."""
        try:
            with self.interrupt.listening():
                while self.position.epoch <= epochs:
                    self._epoch(data, val_data)
                    self.position.advance()
            self._keep(last=True)
            return self._finished(data, val_data)
        except CgmqError as error:
            error.result = self._rescued()
            raise
        except (MemoryError, torch.OutOfMemoryError) as error:
            failed = TrainingError(f"{self._where('failed')}: {error}; use smaller batches")
            failed.result = self._rescued()
            raise failed from error
        except KeyboardInterrupt as error:
            if self.interrupt.asked:
                raise
            stopped = StoppedError(self._where("stopped"))
            stopped.result = self._rescued()
            raise stopped from error

    def _finished(self, data: Iterable[Any], val_data: Iterable[Any] | None) -> Result:
        """The last state as a result, or a better one, measured.

        Whether training has done harm is judged on the training data: a loss that is lower there
        and higher on other data was learned too well, which is not for the driver to judge.
        """
        result = self.prepared.finalize()
        judged: list[Batch] = []

        def losses(model: nn.Module) -> list[float]:
            if not judged:
                found = islice(self._guarded(lambda: iter(data), "train_data"), _JUDGED_BATCHES)
                judged.extend(self._batch(raw) for raw in found)
            with torch.no_grad():
                own = [self._loss(self._call(model.eval(), b.inputs), b) for b in judged]
            return [float(loss) for loss in own]

        other, warnings = shared(lambda: verdict(result, self.rescue, self.history, losses))
        if other:
            result = self.rescue.other(other, len(self.history.epochs))
        result.history, result.warnings = self.history, warnings
        if val_data is not None:
            result.metrics = self._evaluate(result.model, val_data)
        return result

    def _rescued(self) -> Result | None:
        """What was reached, if a step was taken."""
        at = self.position
        recent = float(at.total) / at.batch if at.batch else None
        return (
            self.rescue.result(self.optimizer, self.history, recent) if self.history.steps else None
        )

    def _where(self, what: str) -> str:
        return f"{what} after step {len(self.history.steps)} of {self.steps}"

    def _guarded(
        self, start: Callable[[], Iterator[Any]], name: str, done: int = 0
    ) -> Iterator[Any]:
        """Batches; what their source raises is an error that says where."""
        batches = None
        while True:
            try:
                batches = start() if batches is None else batches
                raw = next(batches)
            except StopIteration:
                return
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                if self.interrupt.asked:  # the workers of a loader are interrupted as well
                    raise StoppedError(self._where("stopped")) from error
                raise DataError(
                    f"{name} failed at batch {done + 1} of epoch {self.position.epoch} "
                    f"({self._where('').strip()}): {type(error).__name__}: {error}"
                ) from error
            yield raw
            done += 1

    def _epoch(self, data: Iterable[Any], val_data: Iterable[Any] | None) -> None:
        at = self.position
        self.model.train()
        for raw in self._guarded(lambda: at.batches(data), "train_data", at.batch):
            at.total += self._step(self._batch(raw))
            at.batch, at.last = at.batch + 1, raw
            self._keep(last=self.interrupt.asked)
            if self.interrupt.asked:
                raise StoppedError(self._where("stopped"))
        if at.batch == 0:
            raise DataError(
                f"train_data had no batches in epoch {at.epoch}; it must be re-iterable"
            )
        agree_on_norms(self.model)
        metrics = {} if val_data is None else self._evaluate(self.alone, val_data)
        record = EpochRecord(
            at.epoch,
            self.prepared.phase,
            mean(float(at.total) / at.batch),
            metrics,
            self._costs(),
            self.prepared.satisfied,
            silent_channels(self.model, self._batch(at.last).inputs),
        )
        self.history.epochs.append(record)
        held = all(max(step.costs) <= 1.0 for step in self.history.steps[-at.batch :])
        self.rescue.keep(record, held)
        for listener in self.listeners:
            listener.on_epoch(record)

    def _step(self, batch: Batch) -> Tensor:
        number = len(self.history.steps)
        try:
            value, loss = self._update(batch, number)
            self.scheduler.step()
            self.prepared.step()
        except (RuntimeError, MemoryError) as error:
            advice = "; use smaller batches" if "memory" in str(error) else ""
            raise self._failed(f"training failed: {error}{advice}") from error
        record = StepRecord(number, self.steps, self.prepared.phase, self._costs(), loss)
        self.history.steps.append(record)
        self._record_gates(record)
        for listener in self.listeners:
            listener.on_step(record)
        return value.detach()

    def _update(self, batch: Batch, number: int) -> tuple[Tensor, float | None]:
        """Forward, backward and optimizer; the loss, and its value where it is read."""
        value = self._loss(self._call(self.forward, batch.inputs), batch)
        read = self.device.type == "cpu" or number % _CHECK_EVERY == 0
        loss = float(value.detach()) if read else None
        if loss is not None and not isfinite(loss):
            raise self._failed(
                f"the loss became {loss}: {blame(self.model, batch.inputs)}; check the data for "
                "values that are not finite, or pass an optimizer= with a smaller learning rate"
            )
        if not value.requires_grad:
            raise DataError("loss(output, target) has no gradient with respect to the output")
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        if read and (name := broken_gradient(self.model)) is not None:
            state = broken_state(self.model)
            raise self._failed(state or f"the gradient of {name} is not finite")
        self.optimizer.step()
        if number % _CHECK_EVERY == 0 and (what := broken_state(self.model)) is not None:
            raise self._failed(f"{what}; pass an optimizer= with a smaller learning rate")
        return value, loss

    def _failed(self, what: str) -> TrainingError:
        number, phase = len(self.history.steps) + 1, self.prepared.phase
        return TrainingError(f"step {number} of {self.steps} (phase {phase}): {what}")

    def _record_gates(self, record: StepRecord) -> None:
        search = self.prepared.controller.steps
        every = max(1, search // _GATE_RECORDS)
        if record.step >= search or (record.step + 1) % every:
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

    def _call(self, model: nn.Module, inputs: ExampleInputs) -> Any:
        try:
            return model(*inputs.args, **inputs.kwargs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            if isinstance(model, DistributedDataParallel) and isinstance(error, RuntimeError):
                raise  # most likely, another process has ended
            raise DataError(
                f"the model fails on a batch of {shapes_of(inputs.tensors)}: {error}"
            ) from error

    def _batch(self, raw: Any) -> Batch:
        batch = split_batch(raw, self.signature, self.loss is not None)
        expected = self.prepared.example_inputs
        found = batch.inputs.tensors
        if batch.inputs.batch == 0:
            raise DataError(f"a batch of {shapes_of(found)} has no samples; leave it out")
        dynamic = self.prepared.dynamic
        if len(found) != len(expected.tensors) or any(
            a.shape[start:] != b.shape[start:] or a.is_floating_point() != b.is_floating_point()
            for a, b, start in zip(
                found, expected.tensors, (dynamic and own for own in expected.axes), strict=True
            )
        ):
            free = "any batch size" if dynamic else "the same batch size"
            raise DataError(
                f"a batch of {shapes_of(found)} does not fit the model, which was captured with "
                f"{shapes_of(expected.tensors)}; batches need the same shapes and kinds of dtypes, "
                f"{free}"
            )
        check_constants(batch.inputs, expected)
        return batch.to(self.device)

    @torch.no_grad()
    def _evaluate(self, model: nn.Module, data: Iterable[Any]) -> dict[str, float]:
        model.eval()
        means = Means()
        for raw in self._guarded(lambda: iter(data), "val_data"):
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
