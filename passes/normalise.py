"""Normalise: one canonical graph, equal to the model in float, for everything downstream."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from cgmq_fx.passes.aliases import aliases, writes
from cgmq_fx.passes.infra import Pass, PassResult
from cgmq_fx.passes.optable import (
    Layout,
    argument,
    compute_op,
    is_whole_slice,
    set_argument,
)
from cgmq_fx.passes.quantizer import TrainingFlag
from cgmq_fx.passes.state import drop_unused_state, groups_of, set_tensor, shape_of, tensor_at

FOLDED_NORM = "cgmq_folded_norm"
"""The `node.meta` key of a layer that a trained batch norm was folded into, until it is quantized:
a `FoldedNorm`."""

TRAINING_FLAG = "cgmq_training"
_ATEN = torch.ops.aten
_FLAGS = {
    "batch_norm": "training",
    "instance_norm": "use_input_stats",
    "dropout": "train",
    "feature_dropout": "train",
    "alpha_dropout": "train",
    "feature_alpha_dropout": "train",
    "rrelu": "training",
}
_SHARED = nn.SyncBatchNorm.__name__
_DETACHES = (_ATEN.detach.default, _ATEN.detach_.default)


@dataclass(frozen=True)
class RelaxViews(Pass):
    """Let views copy where they must.

    Before: a graph whose in-place ops are gone where they could be. After: `view` is `reshape`
    wherever nothing writes into its memory, so that a pass may change the memory layout of what is
    viewed (fused attention returns its heads transposed, its products do not).
    """

    def run(self, module: GraphModule) -> PassResult:
        """Replace the views."""
        modified = False
        for node in module.graph.nodes:
            if node.target is _ATEN.view.default and not any(map(writes, aliases(node))):
                node.target = _ATEN.reshape.default
                modified = True
        return PassResult(module, modified)


@dataclass(frozen=True)
class MergeState(Pass):
    """Read every parameter and buffer of the model through one node.

    Before: a captured graph, where a tensor that two modules share has two names. After: one
    `get_attr` node per tensor, so that tied weights are one tensor for every later pass.
    """

    def run(self, module: GraphModule) -> PassResult:
        """Replace every second reader of a tensor by the first."""
        first: dict[int, Node] = {}
        modified = False
        for node in list(module.graph.nodes):
            tensor = tensor_at(module, node.target) if node.op == "get_attr" else None
            if tensor is None:
                continue
            original = first.setdefault(id(tensor), node)
            if original is not node:
                node.replace_all_uses_with(original)
                module.graph.erase_node(node)
                modified = True
        return PassResult(module, modified)


@dataclass(frozen=True)
class RemoveNoOps(Pass):
    """Remove what does nothing: identities, dropout with probability 0, unread values and state.

    Checks of the dtype that a tensor had when it was captured go, too.

    Before: a graph. After: the same function of the input with fewer nodes.
    """

    def run(self, module: GraphModule) -> PassResult:
        """Bypass identities, then drop unread nodes and the state that nobody reads."""
        modified = False
        for node in list(module.graph.nodes):
            if node.target is _ATEN._assert_tensor_metadata.default:
                module.graph.erase_node(node)  # of what was captured, which passes may change
                modified = True
            elif _does_nothing(node) or _detaches_constant(module, node):
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
                modified = True
        modified |= bool(module.graph.eliminate_dead_code(_is_impure))
        modified |= drop_unused_state(module)
        return PassResult(module, modified)


def _is_impure(node: Node) -> bool:
    return node.op in ("placeholder", "output") or (node.op != "get_attr" and node.is_impure())


def _does_nothing(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is _ATEN.lift_fresh_copy.default:
        return not any(map(writes, aliases(node)))  # a constant is the same in every run
    if node.target is _ATEN.alias.default or is_whole_slice(node):
        return True
    return getattr(node.target, "_opname", "") in _FLAGS and argument(node, "p", None) == 0.0


def _detaches_constant(module: GraphModule, node: Node) -> bool:
    """Whether a node detaches what has no gradient; other detaching is the model's intention."""
    if node.target not in _DETACHES or not isinstance(node.args[0], Node):
        return False
    if node.args[0].op != "get_attr":
        return False
    tensor = tensor_at(module, node.args[0].target)
    return tensor is not None and not tensor.requires_grad


@dataclass(frozen=True)
class FoldedNorm:
    """A trained batch norm that has been folded into the layer before it.

    Attributes:
        mean: Of the layer's output without its bias, shape (channels,), in float64.
        variance: Likewise.
        shared: Whether it was one that normalises by the batches of all processes.
    """

    mean: Tensor
    variance: Tensor
    shared: bool


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold batch norm with running statistics into the convolution or linear layer before it.

    Before: a graph captured in evaluation mode, with shapes. After: the same function in evaluation
    mode; layers whose output or weight is read elsewhere keep their batch norm. Of those that have
    lost one that was trained, `meta[FOLDED_NORM]` tells which.
    """

    def run(self, module: GraphModule) -> PassResult:
        """Fold every batch norm that can be folded."""
        modified = False
        reads = Counter(str(n.target) for n in module.graph.nodes if n.op == "get_attr")
        for node in list(module.graph.nodes):
            if node.op == "call_function" and node.target is _ATEN.batch_norm.default:
                modified |= _fold(module, node, reads)
        if modified:
            module.graph.eliminate_dead_code(_is_impure)
            drop_unused_state(module)
        return PassResult(module, modified)


def _fold(module: GraphModule, norm: Node, reads: Counter[str]) -> bool:
    layer = norm.args[0]
    if not isinstance(layer, Node) or not _foldable(layer, norm, reads):
        return False
    weight_node = argument(layer, "weight")
    weight = tensor_at(module, weight_node.target)
    if weight is None:
        return False
    gamma, beta, mean, var = (
        _optional_tensor(module, argument(norm, name))
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    if mean is None or var is None:
        return False
    bias = _optional_tensor(module, argument(layer, "bias"))
    scale = (var.double() + argument(norm, "eps")).rsqrt()
    scale = scale if gamma is None else scale * gamma.double()
    if all(t is None or t.requires_grad for t in (weight, gamma, beta)):
        seen = mean.double() if bias is None else mean.double() - bias.double()
        spread = var.double() * scale.square()
        layer.meta[FOLDED_NORM] = FoldedNorm(
            (seen * scale).detach(), spread.detach(), is_shared(norm)
        )
    shift = -mean.double() if bias is None else bias.double() - mean.double()
    shift = shift * scale if beta is None else shift * scale + beta.double()
    set_tensor(module, str(weight_node.target), _scaled(layer, weight, scale))
    _set_bias(module, layer, weight_node, shift.to(weight.dtype), weight.requires_grad)
    norm.replace_all_uses_with(layer)
    module.graph.erase_node(norm)
    return True


def is_shared(norm: Node) -> bool:
    """Whether the module that a batch norm comes from is `torch.nn.SyncBatchNorm`."""
    _, owner = next(reversed((norm.meta.get("nn_module_stack") or {"": ("", "")}).values()))
    name = owner if isinstance(owner, str) else owner.__name__
    return name.rpartition(".")[2] == _SHARED


def _foldable(layer: Node, norm: Node, reads: Counter[str]) -> bool:
    op = compute_op(layer)
    if op is None or op.layout is Layout.PRODUCT or len(layer.users) != 1:
        return False
    if argument(norm, "training") or argument(norm, "running_mean") is None:
        return False
    if op.layout is Layout.LINEAR and len(shape_of(layer) or ()) != 2:
        return False
    weight, bias = argument(layer, "weight"), argument(layer, "bias")
    own = [n for n in (weight, bias) if n is not None]
    return all(n.op == "get_attr" and len(n.users) == 1 and reads[str(n.target)] == 1 for n in own)


def _scaled(layer: Node, weight: Tensor, scale: Tensor) -> Tensor:
    op = compute_op(layer)
    if op is not None and op.layout is Layout.CONV_TRANSPOSE:
        groups = groups_of(layer)
        parts = weight.double().unflatten(0, (groups, -1))
        per_group = scale.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
        scaled = (parts * per_group).flatten(0, 1)
    else:
        scaled = weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1))
    return nn.Parameter(scaled.to(weight.dtype), weight.requires_grad)


def _set_bias(
    module: GraphModule, layer: Node, weight: Node, bias: Tensor, requires_grad: bool
) -> None:
    existing = argument(layer, "bias")
    if existing is not None:
        set_tensor(module, str(existing.target), nn.Parameter(bias, requires_grad))
        return
    owner = str(weight.target).rpartition(".")[0]
    target = f"{owner}.bias" if owner else f"{weight.target}_bias"
    while tensor_at(module, target) is not None:
        target += "_folded"
    set_tensor(module, target, nn.Parameter(bias, requires_grad))
    with module.graph.inserting_before(layer):
        node = module.graph.get_attr(target)
    node.meta["val"] = bias
    set_argument(layer, "bias", node)


def _optional_tensor(module: GraphModule, node: Any) -> Tensor | None:
    return tensor_at(module, node.target) if isinstance(node, Node) else None


@dataclass(frozen=True)
class LeaveTraining(Pass):
    """Give a program that was exported in training mode the form of evaluation mode.

    Before: a captured graph. After: if all flags of dropout and batch norm were on, all are off, so
    that the other passes can tell them from those that are always on.
    """

    def run(self, module: GraphModule) -> PassResult:
        """Switch all flags off, if all are on."""
        nodes = [node for node in module.graph.nodes if _has_mode(node)]
        flags = [argument(node, _flag_of(node)) for node in nodes]
        if not nodes or not all(flag is True for flag in flags):
            return PassResult(module, modified=False)
        for node in nodes:
            set_argument(node, _flag_of(node), False)
        return PassResult(module, modified=True)


@dataclass(frozen=True)
class SwitchModes(Pass):
    """Let `train()` and `eval()` of the graph switch dropout and batch norm again.

    Before: a graph captured in evaluation mode, where the flags are constants. After: they are the
    value of one `TrainingFlag` module, which follows the mode of the whole graph; momentum, eps and
    probabilities stay what they were. Layers that always use batch statistics, and dropout that was
    on in evaluation mode, stay as they are.
    """

    def run(self, module: GraphModule) -> PassResult:
        """Replace every constant flag that is off."""
        nodes = [n for n in module.graph.nodes if _switchable(n)]
        if not nodes:
            return PassResult(module, modified=False)
        module.add_submodule(TRAINING_FLAG, TrainingFlag())
        flag = _flag_node(module.graph)
        for node in nodes:
            set_argument(node, _flag_of(node), flag)
        return PassResult(module, modified=True)


def _has_mode(node: Node) -> bool:
    """Whether a node can behave differently in training and in evaluation mode."""
    name = getattr(node.target, "_opname", "")
    if node.op != "call_function" or name not in _FLAGS:
        return False
    return name != "batch_norm" or argument(node, "running_mean") is not None


def _switchable(node: Node) -> bool:
    return _has_mode(node) and argument(node, _flag_of(node)) is False


def _flag_of(node: Node) -> str:
    """The name of the argument that says whether a node is in training mode."""
    return _FLAGS[getattr(node.target, "_opname", "")]


def _flag_node(graph: Graph) -> Node:
    first = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    with graph.inserting_before(first):
        return graph.call_module(TRAINING_FLAG)
