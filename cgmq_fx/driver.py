"""The training driver: `quantize`, written on nothing but `prepare`'s object."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from cgmq_fx.callbacks import Callback
from cgmq_fx.checkpoint import Checkpoint, checkpoint_of
from cgmq_fx.cost_models import Budget, BudgetLike, Ledger, highest_bits, parse_budget
from cgmq_fx.cost_models.errors import (
    DataError,
    OptionError,
)
from cgmq_fx.data import (
    SyntheticBatches,
    batch_count,
    example_inputs_of,
    first_batch,
)
from cgmq_fx.directions import Direction, direction_of
from cgmq_fx.given import whole_number
from cgmq_fx.graphs import float_graph
from cgmq_fx.identity import run_identity
from cgmq_fx.passes.capture import Captured
from cgmq_fx.passes.copying import copy_graph
from cgmq_fx.passes.processes import process_count
from cgmq_fx.passes.scheme import Scheme
from cgmq_fx.prepared import Prepared
from cgmq_fx.presets import Deployment, TargetLike, deployment
from cgmq_fx.progress import Progress
from cgmq_fx.result import Result
from cgmq_fx.run import Run
from cgmq_fx.together import agreed, is_first, shared
from cgmq_fx.training import (
    Loss,
    Metric,
    OptimizerFactory,
    default_optimizer,
    search_steps,
)
from cgmq_fx.turns import TURN

DEFAULT_EPOCHS = 10
_LOG = logging.getLogger(__name__)


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
    compile: bool | str = False,
) -> Result:
    """Quantize a model so that it costs at most what the budget says.

    Args:
        model: The trained float model, on any device; it is not modified.
        budget: What the result may cost at most, for example `"bops <= 0.4%, weights <= 64 KiB"`.
        train_data: Re-iterable batches: tensors, `(inputs, target)`, tuples or dicts. Without it
            the float model teaches the quantized one on random inputs.
        loss: `loss(output, target)`, a tensor with one element; `output` is what the model returns.
            Without it the float model is the teacher.
        val_data: Batches to measure on after every epoch.
        epochs: Passes over the data; the first part searches bit-widths, the rest tunes. With 0
            ranges are calibrated and bit-widths chosen without training.
        example_inputs: Inputs to trace with, if neither the data nor the model tells.
        scheme: Bit-widths and granularity; the default is one gate per tensor.
        direction: Which way gates move, by name or a `Direction`.
        target: Where it is to run: a preset (`"onnxruntime"`, `"fpga"`, `"xnnpack"`, `"litert"`),
            a chip for latency and energy (a name, a file or a `Target`), or a sequence of both.
        optimizer: Makes an optimizer of parameter groups. Each has an `lr` of its own, which suits
            its tensors and wins over the argument of the optimizer: set another by
            `lambda groups: SGD([{**g, "lr": 0.01} for g in groups])`. All rates rise at first, and
            fall to zero as a cosine after the search.
        metric: `metric(output, target)` on validation data, a number per batch, averaged over
            samples, `"metric"` in `Result.metrics`; accuracy where it applies by default.
        callbacks: Told about every step and epoch.
        progress: Whether to show progress on the terminal.
        seed: Seed of all that is random: inputs where there is no data, dropout, shuffling. The
            global random state is left as it was. Calls from several threads take turns; use
            processes to quantize several models at once.
        start: A result of the same model under another budget, without pruned channels: weights
            and bit-widths start there.
        checkpoint: A folder to keep the run in, every five minutes, or a `Checkpoint` that says how
            often. The same call resumes it and ends with the same result, bit by bit, as if it had
            not been interrupted, if the data comes in the same order; a finished run is not
            trained again.
        compile: Whether to train through `torch.compile`, or the name of its backend. It compiles
            for training, for evaluation, and once more when bit-widths freeze; gates that move
            compile nothing again.

    In several processes (`torchrun`, with a process group) they train together: each makes the same
    call with its own part of the data, as many batches everywhere. All get the same result; only
    the first writes checkpoints and shows progress. What one process has stopped for is an error in
    the others within the timeout of their group; the run resumes in any number of processes that
    take as many steps.

    Returns:
        The result; its cost was counted again on the finished model.

    Raises:
        CgmqError: With what is wrong and what to do: the budget cannot be read or cannot be met,
            the model cannot be captured, the data does not fit, or training diverged.
    """
    _check_options(start, callbacks, compile)
    epochs, seed = whole_number("epochs", epochs, 0), whole_number("seed", seed, 0)
    kept = checkpoint_of(checkpoint)
    where = deployment(target)
    chosen = where.scheme(scheme)
    parsed = parse_budget(budget, where.chip)
    remarks = _remarks(where, parsed)
    _check_callable(loss=loss, metric=metric, optimizer=optimizer)
    if train_data is None and loss is not None:
        raise DataError("a loss was given, but no train_data; pass it, or leave out loss=")
    with TURN, _seeded(seed), torch.inference_mode(False), torch.enable_grad():
        captured = _captured(model, example_inputs, train_data, loss is not None, where)
        teacher = copy_graph(captured.module).eval() if loss is None else None
        data = _data(train_data, captured, seed)
        example = None if val_data is None else first_batch(val_data, "val_data")
        batches = batch_count(data)
        steps = epochs * batches
        search = search_steps(steps)
        way = direction_of(direction)
        backend = "inductor" if compile is True else compile or None
        identity: dict[str, Any] = {"budget": str(parsed)}
        if kept is not None or process_count() > 1:  # it takes time
            identity |= run_identity(
                *(captured, where, chosen, way, start, loss, metric),
                judged=val_data is not None,
                epochs=epochs,
                batches=batches,
                seed=seed,
                backend=backend,
            )
        agreed(identity)
        prepared = _started(Prepared(captured, parsed, chosen, way, search), start, data)
        listeners = [*callbacks, *([Progress()] if progress and is_first() else [])]
        run = Run(prepared, teacher, loss, metric, optimizer, steps, search, listeners, backend)
        if kept is not None:
            run.resume(kept, identity | _costs(prepared), (data, val_data))
        if val_data is not None:
            run.check_metric(example)
        result = run.train(data, val_data, epochs)
        return replace(result, warnings=(*result.warnings, *remarks))


def _check_options(start: Any, callbacks: Any, compile: Any) -> None:
    """Raise an OptionError for what can only be a mistake, before anything is captured."""
    if start is not None and not isinstance(start, Result):
        raise OptionError(f"start= takes a Result, not a {type(start).__name__}")
    if not isinstance(callbacks, Sequence) or not all(isinstance(c, Callback) for c in callbacks):
        raise OptionError(f"callbacks= takes a list of Callback objects, not {callbacks!r}")
    if isinstance(compile, str) and compile not in torch.compiler.list_backends([]):
        known = ", ".join(torch.compiler.list_backends())
        raise OptionError(f"compile= names no backend of torch.compile: {compile!r}; try {known}")


_CALLS = {
    "loss": "loss(output, target), such as torch.nn.functional.cross_entropy",
    "metric": "metric(output, target)",
    "optimizer": "optimizer(groups), such as "
    "lambda groups: torch.optim.SGD([{**g, 'lr': 0.01} for g in groups])",
}


def _check_callable(**options: Any) -> None:
    for name, given in options.items():
        if given is not None and not callable(given):
            raise OptionError(f"{name}= takes a function, {_CALLS[name]}; not {given!r}")


def _remarks(where: Deployment, budget: Budget) -> tuple[str, ...]:
    """What a budget does not say about where it is to hold, which is logged as well."""
    found = where.preset.remarks(budget)
    for text in found:
        _LOG.warning(text)
    return found


def _captured(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    train_data: Iterable[Any] | None,
    supervised: bool,
    where: Deployment,
) -> Captured:
    """The float graph of a model, all of whose ops can be executed where it is to run."""
    found = float_graph(model, example_inputs_of(model, example_inputs, train_data, supervised))
    where.preset.check_ops(found)
    return found


def _data(given: Iterable[Any] | None, captured: Captured, seed: int) -> Iterable[Any]:
    """The training data, or random inputs; there is a batch in it."""
    data = SyntheticBatches(captured.inputs, seed) if given is None else given
    first_batch(data, "train_data")
    return data


def _started(prepared: Prepared, start: Result | None, data: Iterable[Any]) -> Prepared:
    """Take over a result, if there is one, and calibrate, in all processes the same."""
    if start is not None:
        prepared.start_from(start)
    prepared.calibrate(data)
    if process_count() > 1:  # each has calibrated on its own part of the data
        prepared.load_state_dict(shared(prepared.state_dict))
    return prepared


def _costs(prepared: Prepared) -> dict[str, Any]:
    """What a budget does not tell about a run: the arguments of its cost models matter."""
    ledger = Ledger(prepared.facts, prepared.budget, highest_bits(prepared.facts))
    return {"costs with the most bits": list(ledger.totals)}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the random state of this process, and give it back as it was."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield
