"""Capture: from the user's model to one graph form, a torch.fx GraphModule of ATen ops.

`torch.export` (non-strict) takes far more models than symbolic tracing. The graph is captured in
evaluation mode; the flags of dropout and batch norm are switched by `SwitchModes` afterwards.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils import _pytree as pytree

from cgmq_fx.cost_models.errors import CaptureError


@dataclass(frozen=True)
class ExampleInputs:
    """Arguments that the model can be called with.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors in the arguments, in order."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    @property
    def batch(self) -> int | None:
        """The batch size: what dimension 0 of all tensors has in common, or None."""
        sizes = {t.shape[0] for t in self.tensors if t.dim() > 0}
        return sizes.pop() if len(sizes) == 1 else None

    def to(self, device: torch.device) -> ExampleInputs:
        """The same with all tensors on `device`, detached."""
        return self.map(lambda t: t.detach().to(device))

    def at_least_two(self) -> ExampleInputs:
        """The same with a batch of 1 repeated to 2: export takes a size of 1 for a constant."""
        if self.batch != 1:
            return self
        return self.map(lambda t: torch.cat([t, t]) if t.dim() else t)

    def map(self, function: Callable[[Tensor], Tensor]) -> ExampleInputs:
        """The same with `function` applied to every tensor."""

        def apply(leaf: Any) -> Any:
            return function(leaf) if isinstance(leaf, Tensor) else leaf

        return ExampleInputs(
            pytree.tree_map(apply, self.args), pytree.tree_map(apply, dict(self.kwargs))
        )


@dataclass(frozen=True)
class Captured:
    """A captured model.

    Attributes:
        module: The graph; its state is a copy, the user's model keeps its own.
        inputs: The example inputs, on the model's device.
        dynamic: Whether it was captured for any batch size.
    """

    module: GraphModule
    inputs: ExampleInputs
    dynamic: bool


def capture(model: nn.Module | ExportedProgram, inputs: ExampleInputs) -> Captured:
    """Turn a model into a graph of ATen ops with a dynamic batch, if it has one.

    Args:
        model: The user's model, not modified, or an exported program.
        inputs: Arguments to trace it with.

    Returns:
        The graph and the inputs as they were used.

    Raises:
        CaptureError: If the model cannot be called with the inputs, or torch.export cannot trace
            it.
    """
    if isinstance(model, ExportedProgram):
        with _quiet():
            module = _plain(copy.deepcopy(_module_of(model)))
        return Captured(module, inputs.to(device_of(module)), _any_batch(module))
    own = _copy(model).eval()
    inputs = inputs.to(device_of(own)).map(torch.clone).at_least_two()
    _call(own, inputs)
    if inputs.batch is not None:
        try:
            module = _plain(_export(own, inputs, dynamic=True))
            return Captured(module, inputs, _any_batch(module))
        except Exception:  # noqa: BLE001 - any failure of a dynamic export means: try a fixed batch
            return Captured(_plain(_explained(own, inputs)), inputs, dynamic=False)
    return Captured(_plain(_explained(own, inputs)), inputs, dynamic=False)


def device_of(model: nn.Module) -> torch.device:
    """The device of a model: that of its first parameter or buffer, else the CPU."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _copy(model: nn.Module) -> nn.Module:
    try:
        with _quiet():
            return copy.deepcopy(model)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({error}); cgmq_fx works on a copy so that "
            "your model stays as it is. Often a non-leaf tensor is kept as an attribute: delete it "
            "or detach it first"
        ) from error


def _call(model: nn.Module, inputs: ExampleInputs) -> None:
    try:
        with torch.no_grad():
            copy.deepcopy(model)(*inputs.args, **inputs.kwargs)
    except Exception as error:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in inputs.tensors)
        raise CaptureError(
            f"{type(model).__name__} fails on the example inputs ({shapes}): "
            f"{type(error).__name__}: {_first_line(error)}. Pass example_inputs= that it accepts"
        ) from error


def _explained(model: nn.Module, inputs: ExampleInputs) -> GraphModule:
    try:
        return _export(model, inputs, dynamic=False)
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot capture {type(model).__name__}: {type(error).__name__}: "
            f"{_first_line(error)}{_user_line(error)}. Usual causes are control flow that depends "
            "on values of tensors, and calls that leave PyTorch"
        ) from error


def _export(model: nn.Module, inputs: ExampleInputs, dynamic: bool) -> GraphModule:
    def shapes(leaf: Any) -> Any:
        return {0: Dim.AUTO} if isinstance(leaf, Tensor) and leaf.dim() else None

    specs: Any = None
    if dynamic:
        names = dict(zip(_parameter_names(model), inputs.args, strict=False)) | dict(inputs.kwargs)
        whole = len(names) == len(inputs.args) + len(inputs.kwargs)
        specs = pytree.tree_map(shapes, names if whole else inputs.args)
    with _quiet(), torch.enable_grad(), _no_fast_path():
        program = torch.export.export(
            model, inputs.args, dict(inputs.kwargs), dynamic_shapes=specs, strict=False
        )
        return _module_of(program)


def _parameter_names(model: nn.Module) -> list[str]:
    import inspect

    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind in kinds]


def _module_of(program: ExportedProgram) -> GraphModule:
    module = program.module(check_guards=False)
    if not isinstance(module, GraphModule):
        raise CaptureError(f"torch.export gave a {type(module).__name__}, not a GraphModule")
    return module


def _any_batch(module: GraphModule) -> bool:
    """Whether the batch size stayed free: export may find that the model insists on one."""
    values = [n.meta.get("val") for n in module.graph.nodes if n.op == "placeholder"]
    sizes = [v.shape[0] for v in values if isinstance(v, Tensor) and v.dim()]
    return bool(sizes) and all(free_symbols(size) for size in sizes)


def _plain(exported: GraphModule) -> GraphModule:
    """A GraphModule of our own: the exported one refuses train() and eval()."""
    codegen = exported.graph._codegen
    module = GraphModule(exported, exported.graph, class_name="QuantizedGraph")
    module.graph.set_codegen(codegen)
    module.recompile()
    return module


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export warns about its own internals; those warnings are not the user's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Keep transformer layers from becoming one opaque inference op."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300].rstrip(".") if lines else "no message"


def _user_line(error: BaseException) -> str:
    """The innermost line of the traceback that is not inside torch or this library."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and __file__ != f.filename]
    return f" (at {own[-1].filename}, line {own[-1].lineno})" if own else ""
