"""Capture: from the user's model to one graph form, a torch.fx GraphModule of ATen ops.

Four ways are tried in turn: `torch.export` (non-strict) with any batch size; with the batch size
of the example; with the smallest modules that stand in the way kept as they are; and with the
control flow that the example takes, asserted, which goes before modules that hold products. The
graph is captured in evaluation mode; the flags of dropout and batch norm are switched by
`SwitchModes` afterwards.
"""

from __future__ import annotations

import copy
import logging
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, is_dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from cgmq_fx.cost_models.errors import CaptureError, UnsupportedModelError
from cgmq_fx.passes.attention import note_training_dropout
from cgmq_fx.passes.copying import copy_graph, copy_model
from cgmq_fx.passes.infra import run_passes
from cgmq_fx.passes.inputs import ExampleInputs
from cgmq_fx.passes.opaque import OpaqueCall, RestoreOpaque, culprit, stand_ins
from cgmq_fx.passes.quantizer import Quantizer
from cgmq_fx.passes.tracing import (
    assumptions,
    free_axes,
    plain,
    quiet,
    trace,
    trace_with_assumptions,
)

__all__ = ["Captured", "ExampleInputs", "capture", "device_of"]

_MOST_OPAQUE = 64
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captured:
    """A captured model.

    Attributes:
        module: The graph; its state is a copy, the user's model keeps its own.
        inputs: The example inputs, on the model's device; their `batched` is known if `dynamic`.
        dynamic: Whether it was captured for any batch size.
        steps: What was tried before, and why it failed, one line per attempt.
    """

    module: GraphModule
    inputs: ExampleInputs
    dynamic: bool
    steps: tuple[str, ...] = ()


def capture(model: nn.Module | ExportedProgram, inputs: ExampleInputs) -> Captured:
    """Turn a model into a graph of ATen ops with a dynamic batch, if it has one.

    Args:
        model: The user's model, not modified, or an exported program.
        inputs: Arguments to trace it with.

    Returns:
        The graph and the inputs as they were used.

    Raises:
        CaptureError: If the model cannot be called with the inputs, or nothing of it can be
            captured.
        UnsupportedModelError: If it has been quantized already.
    """
    if isinstance(model, nn.Module) and any(isinstance(m, Quantizer) for m in model.modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__} has quantizers already: it comes from quantize or prepare; "
            "give the float model, and the result as start= to go on from there"
        )
    if isinstance(model, ExportedProgram):
        with quiet():
            module = plain(copy.deepcopy(model))
        own_inputs = inputs.to(device_of(module))
        return _captured(module, own_inputs, dynamic=True)
    own = _copy(model).eval()
    inputs, output = _accepted(own, inputs.to(device_of(own)).map(torch.clone))
    _plain_output(own, output)
    found = _Attempts(own, inputs).run()
    _report(own, found)
    return found


def _report(model: nn.Module, found: Captured) -> None:
    """Log what was tried; that parts are kept or assumed is worth a warning."""
    for step in found.steps:
        _LOG.info("tried %s", step)
    kept = [m.path for m in found.module.modules() if isinstance(m, OpaqueCall)]
    taken = assumptions(found.module)
    if kept or taken:
        _LOG.warning(
            "%s could not be captured whole (%s); %s",
            type(model).__name__,
            found.steps[0] if found.steps else "no reason known",
            f"kept in float as they are: {', '.join(dict.fromkeys(kept))}"
            if kept
            else f"assumed, and checked whenever it runs: {', '.join(taken)}",
        )


class _Attempts:
    """The ways to capture a model, tried in turn."""

    def __init__(self, model: nn.Module, inputs: ExampleInputs) -> None:
        self._model = model
        self._inputs = inputs
        self._steps: list[str] = []
        self._sizes = (True, False) if inputs.batch is not None else (False,)

    def run(self) -> Captured:
        """Try all, and explain the first failure if none works."""
        opaque: list[str] = []
        first: Exception | None = None
        while len(opaque) <= _MOST_OPAQUE:
            found = self._whole(opaque)
            if isinstance(found, Captured):
                return self._preferred(found)
            first = first or found
            path = culprit(found, self._model)
            if path is None or path in opaque:
                break
            opaque = [p for p in opaque if not p.startswith(f"{path}.")] + [path]
        assumed = self._assumed()
        if assumed is not None:
            return assumed
        raise CaptureError(_explanation(self._model, first)) from first

    def _preferred(self, found: Captured) -> Captured:
        """What is kept stays float; where that multiplies, assumptions are the lesser evil."""
        kept = [m for m in found.module.modules() if isinstance(m, OpaqueCall)]
        if not any(call.macs for call in kept):
            return found
        return self._assumed() or found

    def _whole(self, opaque: Sequence[str]) -> Captured | Exception:
        """Export with the modules at `opaque` as they are; the error if that fails."""
        error: Exception | None = None
        for dynamic in self._sizes:
            try:
                with stand_ins(self._model, opaque, self._inputs.map(torch.clone)) as calls:
                    module = trace(self._model, self._inputs.map(torch.clone), dynamic)
                module = run_passes(module, [RestoreOpaque(tuple(calls))])
                note_training_dropout(module.graph, self._model, self._inputs)
                return _captured(module, self._inputs, dynamic, self._steps)
            except Exception as failure:  # noqa: BLE001 - any failure means: try the next way
                size = "any batch size" if dynamic else "the batch size of the example"
                kept = f", {', '.join(opaque)} kept as they are" if opaque else ""
                self._steps.append(f"torch.export for {size}{kept}: {_reason(failure)}")
                error = failure
        return error or CaptureError("nothing was tried")

    def _assumed(self) -> Captured | None:
        for dynamic in self._sizes:
            try:
                module = trace_with_assumptions(self._model, self._inputs.map(torch.clone), dynamic)
                self._run(module)
            except Exception as failure:  # noqa: BLE001 - the last way of all
                self._steps.append(f"torch.export with the example's values: {_reason(failure)}")
                continue
            return _captured(module, self._inputs, dynamic, self._steps)
        return None

    def _run(self, module: GraphModule) -> None:
        """Run a copy of a graph on the example inputs: what it assumes has to hold for them."""
        inputs = self._inputs.map(torch.clone)
        with torch.no_grad():
            copy_graph(module)(*inputs.args, **inputs.kwargs)


def _captured(
    module: GraphModule, inputs: ExampleInputs, dynamic: bool, steps: Sequence[str] = ()
) -> Captured:
    """What was captured, with its batch if that was to be free and is."""
    axes = free_axes(module, inputs) if dynamic else None
    return Captured(module, replace(inputs, batched=axes), axes is not None, tuple(steps))


def device_of(model: nn.Module) -> torch.device:
    """The device of a model: that of its first parameter or buffer, else the CPU."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _copy(model: nn.Module) -> nn.Module:
    named = (*model.named_parameters(), *model.named_buffers())
    if without := [name for name, tensor in named if tensor.is_meta]:
        raise CaptureError(
            f"{without[0]} has no values (it is on the meta device); load them first"
        )
    try:
        with quiet():
            return copy_model(model)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({error}); cgmq_fx works on a copy so that "
            "your model stays as it is. Delete what cannot be copied from its attributes first (an "
            "open file, a lock, a hook that holds one)"
        ) from error


def _accepted(model: nn.Module, inputs: ExampleInputs) -> tuple[ExampleInputs, Any]:
    """The inputs with two samples, if the model takes those, else as they are; and its output."""
    for more in inputs.doubled():
        with suppress(CaptureError):
            return more, _call(model, more)
    return inputs, _call(model, inputs)


def _call(model: nn.Module, inputs: ExampleInputs) -> Any:
    try:
        with torch.no_grad():
            own = inputs.map(torch.clone)  # some models write into their inputs, or into lists
            return copy.deepcopy(model)(*own.args, **own.kwargs)
    except Exception as error:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in inputs.tensors)
        raise CaptureError(
            f"{type(model).__name__} fails on the example inputs ({shapes}): {_reason(error)}. "
            "Pass example_inputs= that it accepts"
        ) from error


def _plain_output(model: nn.Module, output: Any) -> None:
    """Let a model that returns objects which torch.export does not know return their tensors.

    A dataclass is registered with torch.export; any other object becomes a dict of its attributes.
    """
    while True:
        unknown = [leaf for leaf in pytree.tree_leaves(output) if not _is_plain(leaf)]
        known = {type(leaf) for leaf in unknown if is_dataclass(leaf)}
        for kind in known:
            torch.export.register_dataclass(kind)
        if not known:
            break
    if not unknown:
        return
    forward = model.forward

    @wraps(forward)
    def plainly(*args: Any, **kwargs: Any) -> Any:
        return plain_value(forward(*args, **kwargs))

    model.forward = plainly


def _is_plain(leaf: Any) -> bool:
    return leaf is None or isinstance(
        leaf, Tensor | int | float | complex | str | bool | torch.SymInt | torch.SymFloat
    )


def plain_value(value: Any) -> Any:
    """A nested value whose objects are dicts of those attributes that hold tensors."""
    return pytree.tree_map(lambda leaf: leaf if _is_plain(leaf) else _attributes(leaf), value)


def _attributes(value: Any) -> dict[str, Any] | None:
    found = {name: plain_value(own) for name, own in getattr(value, "__dict__", {}).items()}
    held = {n: v for n, v in found.items() if any(isinstance(x, Tensor) for x in _leaves(v))}
    return held or None


def _leaves(value: Any) -> list[Any]:
    leaves: list[Any] = pytree.tree_leaves(value)
    return leaves


def _explanation(model: nn.Module, error: Exception | None) -> str:
    if error is None:
        return f"{type(model).__name__} cannot be captured"
    return (
        f"torch.export cannot capture {type(model).__name__}: {_reason(error)}{_user_line(error)}. "
        f"{_remedy(error)}"
    )


def _remedy(error: Exception) -> str:
    """What to do, in plain words, by what torch.export raised."""
    text = f"{type(error).__name__} {error}"
    for mark, advice in _REMEDIES.items():
        if mark in text:
            return advice
    return (
        "Usual causes are control flow that depends on values of tensors, and calls that leave "
        "PyTorch; move them into a module of their own, which is then kept as it is"
    )


_REMEDIES = {
    "DataDependent": (
        "The code there branches on, or makes a size from, values of tensors, which no graph can "
        "know. Write it with torch.where or masks, or move it into a submodule of its own, which "
        "is then kept as it is, in float"
    ),
    "numpy": (
        "The code there leaves PyTorch for NumPy. Write it with torch functions, or move it into a "
        "submodule of its own, which is then kept as it is, in float"
    ),
}


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    first = lines[0][:300].rstrip(".") if lines else "no message"
    return f"{type(error).__name__}: {first}"


def _user_line(error: BaseException) -> str:
    """The innermost line of the traceback that is not inside torch or this library."""
    here = __file__.rpartition("/")[0]
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and not f.filename.startswith(here)]
    return f" (at {own[-1].filename}, line {own[-1].lineno})" if own else ""
