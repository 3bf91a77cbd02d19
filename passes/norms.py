"""Batch norm that has been folded into a layer normalises by batch statistics while training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.fx import GraphModule, Node

from cgmq_fx.passes.bias import BIASES
from cgmq_fx.passes.infra import Pass, PassResult
from cgmq_fx.passes.meeting import weight_axis
from cgmq_fx.passes.normalise import FOLDED_NORM, FoldedNorm, is_shared
from cgmq_fx.passes.normaliser import Normaliser, is_telling
from cgmq_fx.passes.optable import ComputeOp, argument, compute_op, set_argument
from cgmq_fx.passes.processes import process_count
from cgmq_fx.passes.quantizer import BiasQuantizer, Quantizer
from cgmq_fx.passes.state import tensor_at

NORMS = "cgmq_norms"
_META = ("val", "stack_trace", "nn_module_stack")
"""What a node that takes the place of another takes over of its `meta`."""


@dataclass(frozen=True)
class NormaliseBatches(Pass):
    """Put a `Normaliser` behind every layer that a batch norm has been folded into.

    Before: a graph with quantizers, after `FoldBatchNorm`. After: the same function in evaluation
    mode; such layers have no bias, it is the shift of the normaliser. Left as they are: layers
    whose weight stays in float or has one range for all channels or steps of powers of two, for
    these cannot take up a factor per channel again.
    """

    def run(self, module: GraphModule) -> PassResult:
        """Insert all normalisers."""
        module.add_module(NORMS, nn.Module())
        modified = False
        for node in list(module.graph.nodes):
            op = compute_op(node)
            if op is not None and FOLDED_NORM in node.meta and _takes_factors(module, node, op):
                _insert(module, node, op)
                modified = True
            node.meta.pop(FOLDED_NORM, None)
        return PassResult(module, modified)


@dataclass(frozen=True)
class FoldNormalisers(Pass):
    """Fold every `Normaliser` into its layer.

    Before: a graph with normalisers. After: the same function in evaluation mode without them, in
    the form that it had before `NormaliseBatches`: weights and ranges have taken up the factors.
    """

    def run(self, module: GraphModule) -> PassResult:
        """Fold and remove all normalisers."""
        found = list(normalisers(module))
        for node, normaliser in found:
            _fold(module, node, normaliser)
        if hasattr(module, NORMS):
            delattr(module, NORMS)
        return PassResult(module, bool(found))


def normalisers(module: GraphModule) -> Iterator[tuple[Node, Normaliser]]:
    """The nodes that call a normaliser, in graph order."""
    for node in list(module.graph.find_nodes(op="call_module")):
        owner = module.get_submodule(str(node.target))
        if isinstance(owner, Normaliser):
            yield node, owner


def normalised_weights(module: nn.Module) -> set[int]:
    """The ids of the weights whose scale normalisers undo, in batches as in calibration."""
    if not isinstance(module, GraphModule):
        return set()
    return {id(_weight(module, node)[0]) for node, owner in normalisers(module) if bool(owner.told)}


@contextmanager
def measured_norms(module: GraphModule) -> Iterator[None]:
    """Let normalisers start from the batches that the graph is called with here; not after errors.

    What the graph does in evaluation mode stays the same.
    """
    found = {node: _Moments() for node, _ in normalisers(module)}
    hooks = [
        owner.register_forward_pre_hook(partial(_measure, found[node]))
        for node, owner in normalisers(module)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for node, owner in normalisers(module):
        if found[node].count:
            owner.restart(found[node].mean, found[node].variance, _shift(module, node))
            owner.told.fill_(found[node].told)


@contextmanager
def normalised_batches(module: GraphModule) -> Iterator[None]:
    """Let a graph in evaluation mode normalise by the statistics of what it is called with.

    Processes do not wait for each other meanwhile.
    """
    owners = [owner for _, owner in normalisers(module)]
    with unshared(module):
        try:
            for owner in owners:
                owner.train()
            yield
        finally:
            for owner in owners:
                owner.eval()


@contextmanager
def unshared(module: GraphModule) -> Iterator[None]:
    """Let a graph be called by one of several processes alone."""
    shared = [owner for _, owner in normalisers(module) if owner.shared]
    try:
        for owner in shared:
            owner.shared = False
        yield
    finally:
        for owner in shared:
            owner.shared = True


def own_norms(module: GraphModule) -> list[str]:
    """The nodes of `SyncBatchNorm` that normalise by a process's own part of the batch."""
    return [
        node.name
        for node in module.graph.find_nodes(
            op="call_function", target=torch.ops.aten.batch_norm.default
        )
        if is_shared(node)
    ]


def agree_on_norms(module: GraphModule) -> None:
    """Take the means of the moving averages over all processes, each of which calls this."""
    owners = [owner for _, owner in normalisers(module)]
    if not owners or process_count() == 1:
        return
    found = [tensor for owner in owners for tensor in (owner.mean, owner.variance)]
    flat = torch.cat([tensor.double() for tensor in found])
    distributed.all_reduce(flat)
    parts = (flat / process_count()).split([tensor.numel() for tensor in found])
    for tensor, part in zip(found, parts, strict=True):
        tensor.copy_(part)


def forget_norms(module: GraphModule) -> None:
    """Take the shifts for biases of layers that have been folded; before the first step."""
    for _, owner in normalisers(module):
        owner.mean.zero_()


class _Moments:
    """Mean and variance per channel, added up over batches."""

    def __init__(self) -> None:
        self.count = 0
        self.told = True
        self.mean: Any = 0.0
        self._spread: Any = 0.0

    def add(self, x: Tensor, processes: int) -> None:
        """Count shape (batch, channels, ...), the part of one of so many processes."""
        rows = x.detach().double().movedim(1, 0).flatten(1)
        size = rows.shape[1]
        if not size:
            return
        self.told = self.told and is_telling(x, processes)
        delta = rows.mean(1) - self.mean
        total = self.count + size
        self._spread = self._spread + rows.var(1, correction=0) * size
        self._spread = self._spread + delta.square() * (self.count * size / total)
        self.mean = self.mean + delta * (size / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """Shape (channels,)."""
        found: Tensor = self._spread / self.count
        return found


def _measure(moments: _Moments, owner: Normaliser, args: tuple[Tensor, ...]) -> None:
    moments.add(args[0], process_count() if owner.shared else 1)


def _takes_factors(module: GraphModule, node: Node, op: ComputeOp) -> bool:
    """Whether weight and range of a layer can be multiplied per output channel."""
    weight, bias = argument(node, op.weight), argument(node, op.bias or "")
    axis = weight_axis(node, op)
    if weight.op != "call_module" or axis is None or not isinstance(bias, Node):
        return False
    quantizer = module.get_submodule(str(weight.target))
    if not isinstance(quantizer, Quantizer) or weight.args[0].op != "get_attr":
        return False
    if not quantizer.signed or quantizer.spec.power_of_two:
        return False
    channels = node.meta[FOLDED_NORM].mean.numel()
    ranges = quantizer.spec.range_shape
    per_channel = len(ranges) > axis and ranges[axis] == quantizer.log_range.numel() == channels
    return per_channel and _own_bias(module, bias)


def _own_bias(module: GraphModule, bias: Node) -> bool:
    """Whether a bias is a tensor of the state, rounded or not, that nothing else reads."""
    if bias.op == "call_module":
        if not isinstance(module.get_submodule(str(bias.target)), BiasQuantizer):
            return False
        return len(bias.users) == 1 and _own_bias(module, bias.args[0])  # type: ignore[arg-type]
    return bias.op == "get_attr" and len(bias.users) == 1


def _insert(module: GraphModule, node: Node, op: ComputeOp) -> None:
    bias = argument(node, op.bias or "")
    rounding, reads = None, (bias,)
    if bias.op == "call_module":
        rounding, reads = module.get_submodule(str(bias.target)), bias.args
        delattr(module.get_submodule(BIASES), str(bias.target).rpartition(".")[2])
    shift = tensor_at(module, reads[0].target)
    assert shift is not None
    assert rounding is None or isinstance(rounding, BiasQuantizer)
    norm: FoldedNorm = node.meta[FOLDED_NORM]
    mean, variance = norm.mean.to(shift), norm.variance.to(shift)
    owner = Normaliser(mean, variance, rounding, shared=norm.shared)
    with torch.no_grad():
        shift.add_(owner.factor * owner.mean)
    module.get_submodule(NORMS).add_module(node.name, owner)
    with module.graph.inserting_after(node):
        call = module.graph.call_module(f"{NORMS}.{node.name}")
    call.meta = {key: node.meta[key] for key in _META if key in node.meta}
    node.replace_all_uses_with(call)
    call.args = (node, *reads)
    set_argument(node, op.bias or "", None)
    if bias.op == "call_module":
        module.graph.erase_node(bias)


def _fold(module: GraphModule, node: Node, owner: Normaliser) -> None:
    """Undo `_insert`, with weight, range and bias as they are after training."""
    layer, *reads = node.all_input_nodes
    op = compute_op(layer)
    assert op is not None
    weight, quantizer = _weight(module, node)
    shift = _shift(module, node)
    with torch.no_grad():
        factor, bias = owner.factor, owner.folded(shift)
        per_channel = factor.to(weight.dtype).reshape(quantizer.log_range.shape)
        weight.mul_(per_channel)
        quantizer.log_range.add_(per_channel.abs().log())
        shift.copy_(bias)
    with module.graph.inserting_before(layer):
        own = reads[0]
        if owner.rounding is not None:
            module.get_submodule(BIASES).add_module(layer.name, owner.rounding)
            own = module.graph.call_module(f"{BIASES}.{layer.name}", tuple(reads))
            own.meta = {key: reads[0].meta[key] for key in _META if key in reads[0].meta}
    set_argument(layer, op.bias or "", own)
    node.replace_all_uses_with(layer)
    module.graph.erase_node(node)


def _weight(module: GraphModule, node: Node) -> tuple[Tensor, Quantizer]:
    """The weight of the layer before a normaliser, and its quantizer."""
    layer: Any = node.args[0]
    op = compute_op(layer)
    assert op is not None
    call = argument(layer, op.weight)
    weight = tensor_at(module, call.args[0].target)
    quantizer = module.get_submodule(str(call.target))
    assert weight is not None
    assert isinstance(quantizer, Quantizer)
    return weight, quantizer


def _shift(module: GraphModule, node: Node) -> Tensor:
    found: Any = node.args[1]
    shift = tensor_at(module, found.target)
    assert shift is not None
    return shift
