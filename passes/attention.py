"""Attention: the fused op becomes its two products, so that they are quantized and counted."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.overrides import TorchFunctionMode

from cgmq_fx.passes.infra import Pass, PassResult
from cgmq_fx.passes.inputs import ExampleInputs
from cgmq_fx.passes.optable import argument
from cgmq_fx.passes.state import shape_of, value_of

_ATEN = torch.ops.aten
_LOG = logging.getLogger(__name__)

TRAINING_DROPOUT = "cgmq_training_dropout"
"""The `node.meta` key of the dropout that fused attention has in training mode only."""


class _Probabilities(TorchFunctionMode):
    """Records the dropout of every fused attention that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            named = dict(zip(_ARGUMENTS, args, strict=False)) | (kwargs or {})
            self.found.append(float(named.get("dropout_p", 0.0)))
        return func(*args, **(kwargs or {}))


_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p")


def note_training_dropout(graph: Graph, model: nn.Module, inputs: ExampleInputs) -> None:
    """Note the dropout that the model's fused attention has in training mode.

    A model captured in evaluation mode hands a probability of 0 to fused attention, where nothing
    tells that it would not be 0 in training. So a copy is called once in training mode.

    Args:
        graph: The graph of the model, captured in evaluation mode.
        model: The model.
        inputs: What to call it with.
    """
    nodes = [n for n in graph.nodes if n.target is _ATEN.scaled_dot_product_attention.default]
    if not nodes:
        return
    mode, own, failed = _Probabilities(), inputs.map(torch.clone), ""
    try:
        with torch.random.fork_rng(), torch.no_grad(), mode:
            copy.deepcopy(model).train()(*own.args, **own.kwargs)
    except Exception as error:  # noqa: BLE001 - whatever the code of the model raises
        failed = f", where it fails ({error})"
    if len(mode.found) == len(nodes):
        for node, probability in zip(nodes, mode.found, strict=True):
            if probability and not argument(node, "dropout_p"):
                node.meta[TRAINING_DROPOUT] = probability
    elif failed or any(mode.found):
        _LOG.warning(
            "dropout inside of fused attention is left out: the model calls it %d times, but %d "
            "times in training mode%s",
            len(nodes),
            len(mode.found),
            failed,
        )


@dataclass(frozen=True)
class DecomposeAttention(Pass):
    """Replace scaled dot-product attention by matmul, softmax, matmul.

    Before: a graph with shapes. After: no fused attention; the values are equal to rounding, rows
    that a mask hides completely are zero as they were, dropout on the attention weights stays.
    """

    def run(self, module: GraphModule) -> PassResult:
        """Replace every fused attention."""
        modified = False
        for node in list(module.graph.nodes):
            if node.target is _ATEN.scaled_dot_product_attention.default:
                with module.graph.inserting_before(node):
                    result = _Writer(module.graph, node).attention()
                node.replace_all_uses_with(result)
                module.graph.erase_node(node)
                modified = True
        return PassResult(module, modified)


class _Writer:
    """Writes the nodes that replace one attention."""

    def __init__(self, graph: Graph, node: Node) -> None:
        self._graph = graph
        self._node = node
        self._meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}

    def attention(self) -> Node:
        query, key, value = (argument(self._node, name) for name in ("query", "key", "value"))
        if argument(self._node, "enable_gqa"):
            key, value = self._repeated(key, query), self._repeated(value, query)
        turned = self._call(_ATEN.transpose.int, key, -2, -1)
        scores = self._call(_ATEN.matmul.default, query, turned)
        scale = argument(self._node, "scale")
        if scale is None:
            scale = 1 / sqrt((shape_of(query) or (1,))[-1])
        scores = self._call(_ATEN.mul.Scalar, scores, scale)
        weights = self._weights(self._masked(scores, query, key))
        return self._call(_ATEN.matmul.default, weights, value)

    def _weights(self, scores: Node) -> Node:
        hidden = argument(self._node, "attn_mask") is not None
        if hidden:  # a row that is hidden completely is zero, where plain softmax has no number
            weights = self._call(_ATEN._safe_softmax.default, scores, -1)
        else:
            weights = self._call(_ATEN.softmax.int, scores, -1)
        always = argument(self._node, "dropout_p")
        probability = always or self._node.meta.get(TRAINING_DROPOUT)
        if not probability:
            return weights
        return self._call(_ATEN.dropout.default, weights, probability, bool(always))

    def _masked(self, scores: Node, query: Node, key: Node) -> Node:
        mask = argument(self._node, "attn_mask")
        if argument(self._node, "is_causal"):
            sizes = [self._call(_ATEN.sym_size.int, x, -2) for x in (query, key)]
            device = value_of(query).device
            ones = self._call(_ATEN.ones.default, sizes, dtype=torch.bool, device=device)
            seen = self._call(_ATEN.tril.default, ones)
            return self._hide(scores, seen)
        if mask is None:
            return scores
        if value_of(mask).dtype == torch.bool:
            return self._hide(scores, mask)
        return self._call(_ATEN.add.Tensor, scores, mask)

    def _hide(self, scores: Node, seen: Node) -> Node:
        hidden = self._call(_ATEN.logical_not.default, seen)
        return self._call(_ATEN.masked_fill.Scalar, scores, hidden, float("-inf"))

    def _repeated(self, heads: Node, query: Node) -> Node:
        few, many = (shape_of(heads) or (0,))[-3], (shape_of(query) or (0,))[-3]
        return self._call(_ATEN.repeat_interleave.self_int, heads, many // few, -3)

    def _call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        name = getattr(target, "_opname", None)
        node = self._graph.create_node("call_function", target, args, kwargs, name)
        node.meta = dict(self._meta)
        return node
