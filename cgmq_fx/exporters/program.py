"""From a lowered graph to an `ExportedProgram`, which exporters of PyTorch take."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from cgmq_fx.cost_models.errors import ExportError
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.codes import IN_ATEN
from cgmq_fx.passes.optable import argument
from cgmq_fx.passes.tracing import free_batch


def exported_program(module: GraphModule, inputs: ExampleInputs) -> ExportedProgram:
    """Capture a lowered graph with the ops of `passes/codes.py` in it.

    The batch is dynamic where the graph allows it: whether it does is tried.

    Args:
        module: The lowered graph, in evaluation mode.
        inputs: Inputs to trace it with; a batch of 1 is traced as 2, where the graph takes that.

    Raises:
        ExportError: If torch.export cannot trace it.
    """
    for given in inputs.doubled()[:1] or ((inputs,) if inputs.batch else ()):
        with suppress(Exception):  # whatever it is, a fixed batch is tried next
            return _traced(module, given, free_batch(module, given))
    try:
        return _traced(module, inputs, None)
    except Exception as error:
        raise ExportError(f"torch.export cannot trace the lowered graph: {error}") from error


def _traced(module: GraphModule, inputs: ExampleInputs, shapes: Any) -> ExportedProgram:
    with quiet(), torch.no_grad():
        return torch.export.export(
            module, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes, strict=False
        )


def constants_returned(module: GraphModule) -> list[Any]:
    """What a graph returns that no node makes: numbers, flags and text, but not None."""
    leaves = pytree.tree_leaves(module.graph.output_node().args)
    return [leaf for leaf in leaves if leaf is not None and not isinstance(leaf, Node)]


def in_aten(program: ExportedProgram) -> ExportedProgram:
    """The same program in ATen ops alone: whoever runs it needs nothing of this library."""
    with quiet(), torch.no_grad():
        decomposed: ExportedProgram = program.run_decompositions(IN_ATEN)
        return decomposed


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


def draws(node: Node) -> bool:
    """Whether a node draws random numbers where a model is deployed."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    return argument(node, "train", argument(node, "training", True)) is True
