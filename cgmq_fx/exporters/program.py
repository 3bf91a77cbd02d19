"""From a lowered graph to an `ExportedProgram`, which exporters of PyTorch take."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils import _pytree as pytree

from cgmq_fx.cost_models.errors import ExportError
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.codes import IN_ATEN


def exported_program(module: GraphModule, inputs: ExampleInputs) -> ExportedProgram:
    """Capture a lowered graph with the ops of `passes/codes.py` in it.

    The batch is dynamic where the graph allows it: whether it does is tried.

    Args:
        module: The lowered graph, in evaluation mode.
        inputs: Inputs to trace it with; a batch of 1 is traced as 2.

    Raises:
        ExportError: If torch.export cannot trace it.
    """
    inputs = inputs.at_least_two()
    if inputs.batch is not None:
        try:
            return _traced(module, inputs, _free_batch(module, inputs))
        except Exception:  # noqa: BLE001 - whatever it is, a fixed batch is tried next
            pass
    try:
        return _traced(module, inputs, None)
    except Exception as error:
        raise ExportError(f"torch.export cannot trace the lowered graph: {error}") from error


def _traced(module: GraphModule, inputs: ExampleInputs, shapes: Any) -> ExportedProgram:
    with quiet(), torch.no_grad():
        return torch.export.export(
            module, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes, strict=False
        )


def _free_batch(module: GraphModule, inputs: ExampleInputs) -> Any:
    """Specifications of dynamic shapes: dimension 0 of every input is free."""

    def free(leaf: Any) -> Any:
        return {0: Dim.AUTO} if isinstance(leaf, Tensor) and leaf.dim() else None

    given = [*inputs.args, *inputs.kwargs.values()]
    names = list(inspect.signature(module.forward).parameters)
    return pytree.tree_map(free, dict(zip(names, given, strict=True)))


def in_aten(program: ExportedProgram) -> ExportedProgram:
    """The same program in ATen ops alone: whoever runs it needs nothing of this library."""
    with quiet(), torch.no_grad():
        decomposed: ExportedProgram = program.run_decompositions(IN_ATEN)
        return decomposed


def is_dynamic(program: ExportedProgram) -> bool:
    """Whether the program takes any batch size."""
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"]
    return any(bool(free_symbols(v.shape[0])) for v in values if isinstance(v, Tensor) and v.dim())


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters warn and log about their own internals; none of it is the user's."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
