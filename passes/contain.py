"""Lowered graphs for runtimes with 8-bit tensors: every op between a dequantize and a quantize.

Such runtimes (XNNPACK, LiteRT) run an op on integers if its inputs come from a dequantize and its
output goes to a quantize, and they ignore limits on codes. So quantizers move in front of the ops
that keep a grid, each of these gets codes on both sides, and limits become ops of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor
from torch.fx import GraphModule, Node

from cgmq_fx.cost_models.errors import UnsupportedModelError
from cgmq_fx.passes.aliases import last_write
from cgmq_fx.passes.codes import DEQUANTIZE, QUANTIZE, is_dequantize, is_quantize
from cgmq_fx.passes.copying import copy_graph
from cgmq_fx.passes.infra import Pass, PassResult, run_passes
from cgmq_fx.passes.oplists import JOINS
from cgmq_fx.passes.optable import argument, compute_op, preserves_grid
from cgmq_fx.passes.state import drop_unused_state, shape_of, tensor_at

_QDQ = torch.ops.quantized_decomposed
_DEQUANTIZE = (_QDQ.dequantize_per_tensor.default, _QDQ.dequantize_per_channel.default)
_LOW, _HIGH = -128, 127
_RELU = torch.ops.aten.relu.default
_CLAMP = torch.ops.aten.clamp.default
_FUSING = frozenset({torch.ops.aten.add.Tensor})
"""Ops, but for those that multiply and accumulate, that runtimes execute with a limit at 0."""


def is_pair(node: Node) -> bool:
    """Whether a node is the dequantize behind the quantize of an activation."""
    return is_dequantize(node) and isinstance(node.args[0], Node) and is_quantize(node.args[0])


def is_unsigned(quantize: Node) -> bool:
    """Whether a quantize has no codes below zero."""
    return bool(min(argument(quantize, "low")) >= 0)


def _is_single(quantize: Node) -> bool:
    low = argument(quantize, "low")
    return isinstance(low, list | tuple) and len(low) == 1


def _commutes(node: Node, unsigned: bool, joins: bool) -> bool:
    """Whether rounding to a grid can be done on the inputs of a node instead of on its output."""
    if node.op != "call_function":
        return False
    if node.target is _RELU:
        return unsigned  # whose lowest code is 0: the ReLU is part of the rounding
    return preserves_grid(node) or (joins and node.target in JOINS)


def _rounded_inputs(node: Node) -> list[Node]:
    """The tensors whose values an op that commutes keeps."""
    first = node.args[0]
    inputs = list(first) if isinstance(first, list | tuple) else [first]
    return list(dict.fromkeys(i for i in inputs if isinstance(i, Node)))


def _is_read_in_float(node: Node, besides: Node) -> bool:
    """Whether an op that computes reads the values of a node before anything rounds them.

    Args:
        node: What is read.
        besides: A reader that does not count.
    """
    kept = (user for user in node.users if user is not besides and not is_quantize(user))
    return any(not preserves_grid(user) and user.target not in JOINS for user in kept)


def _pair_behind(graph: Any, node: Node, like: Node) -> Node:
    """The values of `node` on the grid of the pair that ends in `like`."""
    quantize = like.args[0]
    assert isinstance(quantize, Node)
    with graph.inserting_after(_anchor(node)):
        codes = graph.call_function(QUANTIZE, (node, *quantize.args[1:]), dict(quantize.kwargs))
    with graph.inserting_after(codes):
        values: Node = graph.call_function(DEQUANTIZE, (codes, *like.args[1:]), dict(like.kwargs))
    return values


def _anchor(node: Node) -> Node:
    """The node to insert behind: inputs and state come before all else."""
    while {node.op, node.next.op} <= {"placeholder", "get_attr"}:
        node = node.next
    return node


def _hoist(graph: Any, pair: Node, joins: bool) -> list[Node]:
    """Move a pair in front of the op before it, if that keeps all values; the pairs made."""
    codes = pair.args[0]
    assert isinstance(codes, Node)
    source = codes.args[0]
    if (
        not isinstance(source, Node)
        or len(source.users) > 1
        or not _is_single(codes)
        or not _commutes(source, is_unsigned(codes), joins)
        or (source.target not in {_RELU, *JOINS} and all(map(is_pair, _rounded_inputs(source))))
        or any(map(last_write, (source, *_rounded_inputs(source))))
        or any(_is_read_in_float(node, source) for node in _rounded_inputs(source))
    ):
        # What is on a grid already passes the op first, and changes its grid behind it; what is
        # written in place has its values later; what is read in float would be kept twice.
        return []
    made = []
    for node in _rounded_inputs(source):
        made.append(_pair_behind(graph, node, pair))
        source.replace_input_with(node, made[-1])
    pair.replace_all_uses_with(made[0] if source.target is _RELU else source)
    for node in (pair, codes, *([source] if source.target is _RELU else [])):
        graph.erase_node(node)
    return made


def _read_state_first(graph: Any) -> None:
    """Read all tensors at the start, so that whoever needs them can stand anywhere."""
    ends = [node for node in graph.nodes if node.op == "placeholder"][-1:]
    for node in list(graph.nodes) if ends else ():
        if node.op == "get_attr":
            ends[0].append(node)


@dataclass(frozen=True)
class HoistCodes(Pass):
    """Round as early as possible.

    Before: a lowered graph. After: no quantize stands behind a max-pool, a view, a concatenation or
    another op that keeps a grid, if nobody else reads that op. All values are what they were.

    Attributes:
        joins: Whether concatenations count among these ops: their inputs then are on one grid.
    """

    joins: bool = True

    def run(self, module: GraphModule) -> PassResult:
        """Move pairs until none can move."""
        graph = module.graph
        _read_state_first(graph)
        waiting = [node for node in graph.nodes if is_pair(node)]
        while waiting:
            waiting += _hoist(graph, waiting.pop(), self.joins)
        return PassResult(module, modified=True)


@dataclass(frozen=True)
class SurroundOps(Pass):
    """Give every op that keeps a grid codes on both sides.

    Before: a lowered graph. After: the output of an op that keeps a grid, and whose inputs are on
    one, is quantized on the same one. All values are what they were.
    """

    def run(self, module: GraphModule) -> PassResult:
        """Walk in execution order: what was surrounded is the input of the next."""
        for node in list(module.graph.nodes):
            like = _grid_of(node)
            if like is not None and not all(_rounds_like(user, like) for user in node.users):
                pair = _pair_behind(module.graph, node, like)
                node.replace_all_uses_with(pair, lambda u, own=pair.args[0]: u is not own)
        return PassResult(module, modified=True)


def _rounds_like(node: Node, pair: Node) -> bool:
    """Whether a node is a quantize to the grid of a pair."""
    codes = pair.args[0]
    assert isinstance(codes, Node)
    return is_quantize(node) and node.args[1:] == codes.args[1:]


def _grid_of(node: Node) -> Node | None:
    """The pair whose grid the output of an op is on, if the op keeps grids.

    Of several on one grid, limits may be narrower where a clamp was absorbed: the widest counts.
    """
    if node.op != "call_function" or shape_of(node) is None:
        return None
    if not preserves_grid(node) and node.target not in JOINS:
        return None
    if last_write(node) is not None:
        return None
    inputs = _rounded_inputs(node)
    if not inputs or not all(map(is_pair, inputs)):
        return None
    codes = [pair.args[0] for pair in inputs if isinstance(pair.args[0], Node)]
    grids = {str((c.args[1:3], c.args[5:])) for c in codes}
    lows, highs = (np.array([argument(c, end) for c in codes]) for end in ("low", "high"))
    widest = ((lows == lows.min(0)) & (highs == highs.max(0))).all(1)
    return inputs[int(widest.argmax())] if len(grids) == 1 and widest.any() else None


@dataclass(frozen=True)
class UseContainers(Pass):
    """Write codes in signed 8-bit tensors, with PyTorch's own quantize and dequantize.

    Before: a lowered graph. After: no op of this library is left. Limits of codes that the
    container does not have are a clamp between two pairs. A limit at 0 behind an op that can
    execute it is a ReLU instead, and the codes end at 127, so that the container is the other
    limit. Biases are float numbers on the grid of their accumulators. Every reader of a tensor has
    a dequantize of its own: runtimes take it as part of the reader. Weights of ops whose results
    are not rounded at once are float numbers too.

    Attributes:
        float_weights: Whether weights stand in the graph as float numbers on their grids, with a
            quantize behind them, or as integers.

    Raises:
        UnsupportedModelError: If codes do not fit into 8 bits, or a tensor has several steps that
            is no weight.
    """

    float_weights: bool = False

    def run(self, module: GraphModule) -> PassResult:
        """Replace the two ops."""
        for node in list(module.graph.nodes):
            if is_pair(node):
                new = _activation(module, node)
            elif is_dequantize(node):
                new = _constant(module, node, self.float_weights)
            else:
                continue
            node.replace_all_uses_with(new)
        module.graph.eliminate_dead_code()
        for node in list(module.graph.nodes):
            if node.target in _DEQUANTIZE:
                _split(module.graph, node)
        drop_unused_state(module)
        return PassResult(module, modified=True)


def contained(module: GraphModule, float_weights: bool = False) -> GraphModule:
    """A copy of a lowered graph for runtimes with 8-bit tensors.

    Args:
        module: The lowered graph, with shapes.
        float_weights: Whether weights stay float numbers, with a quantize behind them.

    Raises:
        UnsupportedModelError: If some tensor does not fit into 8-bit codes with one step.
    """
    passes = [HoistCodes(), SurroundOps(), UseContainers(float_weights)]
    return run_passes(copy_graph(module), passes)


def _split(graph: Any, dequantize: Node) -> None:
    for user in list(dequantize.users)[1:]:
        with graph.inserting_before(user):
            own = graph.call_function(dequantize.target, dequantize.args, dequantize.kwargs)
        user.replace_input_with(dequantize, own)


def _state(module: GraphModule, node: Any) -> Tensor:
    found = tensor_at(module, node.target)
    assert found is not None
    return found


def _activation(module: GraphModule, pair: Node) -> Node:
    codes = pair.args[0]
    assert isinstance(codes, Node)
    low, high = argument(codes, "low"), argument(codes, "high")
    source, step = codes.args[0], _state(module, pair.args[1])
    assert isinstance(source, Node)
    if len(low) > 1 or len(high) > 1 or step.numel() > 1:
        raise UnsupportedModelError(
            f"{source} has bit-widths of its own per channel, which no 8-bit runtime executes; use "
            "Scheme(activations='tensor')"
        )
    if high[0] - low[0] > _HIGH - _LOW or low[0] < _LOW:
        raise UnsupportedModelError(
            f"{source} has codes from {low[0]} to {high[0]}, which do not fit into 8 bits; "
            "quantize with bit_widths up to 8, as the target of this format does"
        )
    scale, zero = float(step), _HIGH - high[0] if low[0] >= 0 else 0
    below, above = low[0] + zero == _LOW, high[0] + zero == _HIGH
    with module.graph.inserting_before(pair):
        if low[0] == 0 and (compute_op(source) is not None or source.target in _FUSING):
            source, below = module.graph.call_function(_RELU, (source,)), True
        values = _per_tensor(module, source, scale, zero)
        if not (below and above) and not _is_on_grid(source, scale, zero):
            limits = (low[0] * scale, high[0] * scale)
            clamped = module.graph.call_function(_CLAMP, (values, *limits))
            values = _per_tensor(module, clamped, scale, zero)
    return values


def _is_on_grid(source: Node, scale: float, zero: int) -> bool:
    """Whether a value only passed ops that keep a grid since it was rounded to this one."""
    while source.op == "call_function":
        if source.target is _QDQ.dequantize_per_tensor.default:
            return source.args[1:3] == (scale, zero)
        if not preserves_grid(source) and source.target not in JOINS:
            return False
        if last_write(source) is not None:
            return False
        source = source.all_input_nodes[0]
    return False


def _per_tensor(module: GraphModule, value: Any, scale: float, zero: int) -> Node:
    options = (scale, zero, _LOW, _HIGH, torch.int8)
    codes = module.graph.call_function(_QDQ.quantize_per_tensor.default, (value, *options))
    return module.graph.call_function(_QDQ.dequantize_per_tensor.default, (codes, *options))


def _gives_codes(weight: Node) -> bool:
    """Whether what reads a weight is rounded at once: else runtimes execute it in float."""
    readers = [user for reader in weight.users for user in reader.users]
    return all(is_quantize(user) for user in readers)


def _constant(module: GraphModule, node: Node, float_weights: bool) -> Node:
    """A weight or a bias."""
    stored, axis = node.args[0], int(argument(node, "axis"))
    codes, step = _state(module, stored), _state(module, node.args[1])
    if codes.dtype not in (torch.int8, torch.int32):
        raise UnsupportedModelError(
            f"{stored} has codes of more than 8 bits; quantize with bit_widths up to 8, as the "
            "target of this format does"
        )
    name, graph = str(stored), module.graph
    as_values = codes.dtype is torch.int32 or not (float_weights or _gives_codes(node))
    with graph.inserting_before(node):
        if as_values or float_weights:
            along = [-1 if i == axis else 1 for i in range(codes.dim())] if step.dim() else []
            module.register_buffer(f"{name}_values", codes * step.reshape(along))
            values = graph.get_attr(f"{name}_values")
        if as_values:
            return values
        options: tuple[Any, ...] = (-_HIGH, _HIGH, torch.int8)
        if step.dim():
            module.register_buffer(f"{name}_zeros", torch.zeros(step.numel(), dtype=torch.int64))
            options = (node.args[1], graph.get_attr(f"{name}_zeros"), axis, *options)
            pair = (_QDQ.quantize_per_channel.default, _QDQ.dequantize_per_channel.default)
        else:
            options = (float(step), 0, *options)
            pair = (_QDQ.quantize_per_tensor.default, _QDQ.dequantize_per_tensor.default)
        own = graph.call_function(pair[0], (values, *options)) if float_weights else stored
        return graph.call_function(pair[1], (own, *options))
