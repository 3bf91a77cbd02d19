"""One way to trace a model: torch.export, non-strict, into a plain GraphModule of ATen ops."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from functools import wraps
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from cgmq_fx.cost_models.errors import CaptureError
from cgmq_fx.passes.copying import copy_model
from cgmq_fx.passes.inputs import ExampleInputs
from cgmq_fx.passes.portable import portable


def trace(model: nn.Module, inputs: ExampleInputs, dynamic: bool) -> GraphModule:
    """Export a model.

    Args:
        model: The model, in the mode to be traced.
        inputs: Arguments to trace it with.
        dynamic: Whether dimension 0 of every tensor may vary, where the model lets it.

    Returns:
        The graph. Whatever torch.export raises goes through.
    """
    with _named_keywords(model, inputs), quiet(), torch.enable_grad(), _no_fast_path():
        specs = free_batch(model, inputs) if dynamic else None
        program = torch.export.export(
            model, inputs.args, dict(inputs.kwargs), dynamic_shapes=specs, strict=False
        )
        return plain(program)


def trace_with_assumptions(model: nn.Module, inputs: ExampleInputs, dynamic: bool) -> GraphModule:
    """Export a model whose control flow depends on values, taking the example's branches.

    The graph asserts what it took for granted, so other values raise instead of computing something
    else. This is what `torch.export.draft_export` does, without its log files.

    Returns:
        The graph; `assumptions` lists what it asserts.
    """
    model, parameters = _with_plain_tensors(model)
    real_values = functorch_config.patch(fake_tensor_propagate_real_tensors=True)
    named = _named_keywords(model, inputs)
    with named, quiet(), torch.enable_grad(), _no_fast_path(), real_values:
        specs = free_batch(model, inputs) if dynamic else None
        program = torch.export.export(
            model,
            inputs.args,
            dict(inputs.kwargs),
            dynamic_shapes=specs,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        module = plain(program)
    _restore_parameters(module, parameters)
    return module


def _with_plain_tensors(model: nn.Module) -> tuple[nn.Module, dict[str, bool]]:
    """A copy whose parameters are buffers, and their names with whether they are trained.

    Torch keeps no values of parameters while it traces with the example's values, and reads memory
    that nobody has written instead.
    """
    own = copy_model(model)
    names = {n: p.requires_grad for n, p in own.named_parameters(remove_duplicate=False)}
    made: dict[int, Tensor] = {}
    for name in names:
        owner, _, last = name.rpartition(".")
        module = own.get_submodule(owner)
        parameter = module._parameters.pop(last)
        if parameter is not None:
            module.register_buffer(last, made.setdefault(id(parameter), parameter.detach()))
            setattr(module, last, module._buffers[last])  # recurrent layers keep a list of them
    return own, names


def _restore_parameters(module: GraphModule, names: Mapping[str, bool]) -> None:
    made: dict[int, nn.Parameter] = {}
    for name, trained in names.items():
        owner, _, last = name.rpartition(".")
        try:
            holder = module.get_submodule(owner)
        except AttributeError:  # a module that the graph does not read
            continue
        tensor = holder._buffers.pop(last, None)
        if tensor is not None:
            parameter = made.setdefault(id(tensor), nn.Parameter(tensor, trained))
            holder.register_parameter(last, parameter)


def assumptions(module: GraphModule) -> tuple[str, ...]:
    """What a graph takes for granted of the values of its inputs, and asserts."""
    asserted = [n for n in module.graph.nodes if n.target is torch.ops.aten._assert_scalar.default]
    texts = (str(n.args[1]).partition("expression ")[2].partition(" on node")[0] for n in asserted)
    return tuple(dict.fromkeys(text for text in texts if text))


def plain(program: ExportedProgram) -> GraphModule:
    """A GraphModule of our own: the exported one refuses train() and eval().

    All its buffers are part of its state: no code is left that would make those anew that the model
    does not save.
    """
    exported = program.module(check_guards=False)
    if not isinstance(exported, GraphModule):
        raise CaptureError(f"torch.export gave a {type(exported).__name__}, not a GraphModule")
    codegen = exported.graph._codegen
    module = portable(exported, exported.graph)
    module.graph.set_codegen(codegen)
    module.recompile()
    for owner in module.modules():
        for name, buffer in [*owner.named_buffers(recurse=False, remove_duplicate=False)]:
            owner.register_buffer(name, buffer)
    return module


def free_axes(module: GraphModule, inputs: ExampleInputs) -> tuple[bool, ...] | None:
    """For each tensor of the inputs, whether its dimension 0 is a batch that export left free.

    A tensor of fewer dimensions than the largest may do without: a scale per channel that is as
    long as the batch by chance. One that has another size that is free leaves open which of the two
    is the batch. Where the sizes do not agree, an output has to have the batch as well: the length
    of a sequence is free, too, but is often gone at the end.

    Returns:
        None if the model insists on a size, or nothing tells which dimension is the batch.
    """
    values = [n.meta.get("val") for n in module.graph.nodes if n.op == "placeholder"]
    free = [_free_rows(v) for v in values if isinstance(v, Tensor)]
    own, tensors = inputs.axes, inputs.tensors
    if len(free) != len(tensors):
        return None
    widest = max((t.dim() for t in tensors), default=0)
    rows = list(zip(free, own, tensors, strict=True))
    fixed = any(batched and not is_open and t.dim() == widest for is_open, batched, t in rows)
    other = any(is_open and not batched for is_open, batched, _ in rows)
    if fixed or other or not (inputs.agrees or _returns_rows(module)):
        return None
    found = tuple(is_open and batched for is_open, batched, _ in rows)
    return found if any(found) else None


def _returns_rows(module: GraphModule) -> bool:
    """Whether dimension 0 of some output is free."""
    returned = module.graph.output_node().all_input_nodes
    return any(_free_rows(node.meta.get("val")) for node in returned)


def _free_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and is_free(value.shape[0])


def is_free(size: int | torch.SymInt) -> bool:
    """Whether a size of a traced tensor may vary."""
    from torch.fx.experimental.symbolic_shapes import free_symbols  # slow: SymPy

    return bool(free_symbols(size))


def free_batch(model: nn.Module, inputs: ExampleInputs) -> Any:
    """The dynamic shapes that leave dimension 0 of every tensor to torch.export."""

    def shapes(leaf: Any) -> Any:
        return {0: Dim.AUTO} if isinstance(leaf, Tensor) and leaf.dim() else None

    signature = inspect.signature(model.forward)
    bound = signature.bind(*inputs.args, **inputs.kwargs)  # as torch.export does: *args are one
    return pytree.tree_map(shapes, dict(bound.arguments))


@contextmanager
def _named_keywords(model: nn.Module, inputs: ExampleInputs) -> Iterator[None]:
    """Let the signature of `forward` name what `**kwargs` takes.

    torch.export fails where a size behind `**kwargs` may vary.
    """
    signature, forward = inspect.signature(model.forward), model.forward
    parameters = signature.parameters.values()
    known = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    names = [name for name in inputs.kwargs if name not in {p.name for p in known}]
    if not names:
        yield
        return

    @wraps(forward)
    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    named.__signature__ = signature.replace(parameters=[*known, *own])  # type: ignore[attr-defined]
    before = vars(model).get("forward")
    model.forward = named
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before


_CHATTY = (
    "torch.export",
    "torch.export._draft_export",
    "torch.export._trace",
    "torch.fx.experimental.symbolic_shapes",
)


@contextmanager
def quiet() -> Iterator[None]:
    """torch.export warns and logs about its own internals; those are not for the user."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stderr(StringIO()):  # it prints failed graphs
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Keep transformer layers from becoming one opaque inference op."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
