"""Removing pruned channels from a frozen graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from cgmq_fx.passes.channels import SIZED, Channels, removable_channels
from cgmq_fx.passes.infra import Pass, PassResult
from cgmq_fx.passes.optable import argument, compute_op
from cgmq_fx.passes.quantizer import BiasQuantizer, Quantizer, kept_channels
from cgmq_fx.passes.state import set_tensor, shape_of, tensor_at


def _kept(module: GraphModule, channels: Channels) -> Tensor | None:
    """The numbers of the channels to keep, at least one; None if all are to be kept."""
    quantizer = _weight_quantizer(module, channels.maker)
    kept = kept_channels(quantizer.bits, channels.axis).nonzero().flatten()
    if kept.numel() == channels.count:
        return None
    return kept if kept.numel() else torch.zeros(1, dtype=torch.int64, device=kept.device)


def _factor(node: Node, name: str) -> Node:
    """The quantizer's call on a weight or bias of a compute node, if there is one."""
    op = compute_op(node)
    assert op is not None
    found: Node = argument(node, getattr(op, name))
    return found


def _weight_quantizer(module: GraphModule, node: Node) -> Quantizer:
    quantizer = module.get_submodule(str(_factor(node, "weight").target))
    assert isinstance(quantizer, Quantizer)
    return quantizer


def _select(tensor: Tensor, axis: int, kept: Tensor) -> Tensor:
    taken = tensor.detach().index_select(axis, kept.to(tensor.device)).contiguous()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(taken, tensor.requires_grad)
    return taken


def _shorten_state(module: GraphModule, node: Node, axis: int, kept: Tensor) -> None:
    """Keep some slices of the tensor that a chain of quantizers starts from."""
    while node.op == "call_module":
        node = node.all_input_nodes[0]
    tensor = tensor_at(module, node.target)
    assert tensor is not None
    set_tensor(module, str(node.target), _select(tensor, axis, kept))


def _shorten_quantizer(quantizer: Quantizer, axis: int, count: int, kept: Tensor) -> None:
    """Keep some gates and ranges along an axis, where there is one for each of `count`."""
    spec = quantizer.spec
    if spec.gate_shape and spec.gate_shape[axis] == count:
        quantizer.bits = _select(quantizer.bits, axis, kept)
    if spec.range_shape and spec.range_shape[axis] == count:
        log_range = quantizer.log_range
        taken = _select(log_range, axis, kept)
        quantizer.log_range = nn.Parameter(taken.data, log_range.requires_grad)
    quantizer.spec = replace(
        spec,
        gate_shape=tuple(quantizer.bits.shape),
        range_shape=tuple(quantizer.log_range.shape),
    )


def _shorten_maker(module: GraphModule, channels: Channels, kept: Tensor) -> None:
    node, axis = channels.maker, channels.axis
    _shorten_quantizer(_weight_quantizer(module, node), axis, channels.count, kept)
    _shorten_state(module, _factor(node, "weight"), axis, kept)
    op = compute_op(node)
    if op is not None and op.bias and isinstance(argument(node, op.bias), Node):
        bias = _factor(node, "bias")
        assert isinstance(module.get_submodule(str(bias.target)), BiasQuantizer)
        _shorten_state(module, bias.all_input_nodes[0], 0, kept)


def _shorten_between(module: GraphModule, node: Node, count: int, kept: Tensor) -> None:
    """Let what lies between take fewer channels: quantizers, and views with sizes written out."""
    if node.op == "call_module":
        quantizer = module.get_submodule(str(node.target))
        assert isinstance(quantizer, Quantizer)
        shape = quantizer.spec.gate_shape or quantizer.spec.range_shape
        if count in shape:
            _shorten_quantizer(quantizer, shape.index(count), count, kept)
        return
    if node.target in SIZED:
        sizes: Any = node.args[1]
        last = (shape_of(node) or (0,))[-1]
        if sizes[-1] == last:
            node.update_arg(1, [*sizes[:-1], last // count * kept.numel()])


def _shorten_reader(module: GraphModule, node: Node, count: int, kept: Tensor) -> None:
    op = compute_op(node)
    assert op is not None
    axis = 1 - op.layout.output_axis  # two axes meet the channels: those that come in and go out
    factor = _factor(node, "weight")
    size = (shape_of(factor) or ())[axis]
    inside = torch.arange(size // count, device=kept.device)
    rows = (kept[:, None] * (size // count) + inside).flatten()
    if factor.op == "call_module":
        _shorten_quantizer(_weight_quantizer(module, node), axis, size, rows)
    _shorten_state(module, factor, axis, rows)


@dataclass(frozen=True)
class RemovePrunedChannels(Pass):
    """Take out the channels whose weights all have 0 bits.

    Before: a frozen graph with shapes. After: the same function without those channels: weights,
    biases, gates and ranges are shorter, and so are the weights that read them. One channel is kept
    where a layer would have none. Shapes in `meta` are out of date.
    """

    def run(self, module: GraphModule) -> PassResult:
        """Shorten every layer that has pruned channels."""
        return PassResult(module, any([_remove(module, c) for c in removable_channels(module)]))


def _remove(module: GraphModule, channels: Channels) -> bool:
    kept = _kept(module, channels)
    if kept is None:
        return False
    _shorten_maker(module, channels, kept)
    for node in channels.between:
        _shorten_between(module, node, channels.count, kept)
    for node in channels.readers:
        _shorten_reader(module, node, channels.count, kept)
    return True
