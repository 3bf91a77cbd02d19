"""Biases on the int32 grid of their accumulators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import nn
from torch.fx import GraphModule, Node

from cgmq_fx.passes.infra import Pass, PassResult
from cgmq_fx.passes.insert import QUANTIZERS, operands
from cgmq_fx.passes.meeting import weight_axis
from cgmq_fx.passes.optable import ComputeOp, argument, compute_op, set_argument
from cgmq_fx.passes.quantizer import BiasQuantizer, Quantizer
from cgmq_fx.passes.state import quantizer_of, shape_of, tensor_at

BIASES = "cgmq_biases"


def _bias(module: GraphModule, node: Node, op: ComputeOp) -> Node | None:
    """The bias of a compute node, if it is a vector of the model's state."""
    bias = argument(node, op.bias) if op.bias else None
    if not isinstance(bias, Node) or bias.op != "get_attr":
        return None
    tensor = tensor_at(module, bias.target)
    return bias if tensor is not None and tensor.dim() == 1 else None


Key: TypeAlias = tuple[Node, str, str]
"""A bias and the quantizers of input and weight: what decides the grid of the bias."""


def _quantize(
    module: GraphModule, node: Node, op: ComputeOp, bias: Node, made: dict[Key, Node]
) -> bool:
    """Put a `BiasQuantizer` between the bias and `node`, if both factors are on grids.

    Nodes that add the same bias on the same grid (the steps of a recurrence) read one of `made`.
    """
    found = [quantizer_of(module, factor) for factor in operands(node, op)]
    if found[0] is None or found[1] is None:
        return False
    (input_name, first), (weight_name, second) = found[0], found[1]
    channels = (shape_of(bias) or (0,))[0]
    if first.log_range.numel() != 1 or second.log_range.numel() not in (1, channels):
        return False
    key = (bias, input_name, weight_name)
    if key not in made:
        axis = weight_axis(node, op) if 0 in second.spec.bit_widths else None
        quantizer = BiasQuantizer(first.signed, second.signed, first.spec.power_of_two, axis)
        module.get_submodule(BIASES).add_module(node.name, quantizer)
        with module.graph.inserting_before(node):
            made[key] = _call(module, node, key)
    set_argument(node, op.bias or "", made[key])
    return True


def _call(module: GraphModule, node: Node, key: Key) -> Node:
    """The node that calls the bias quantizer named after `node`."""
    bias, *quantizers = key
    steps = [
        _read(module, f"{QUANTIZERS}.{name}.{tensor}")
        for name in quantizers
        for tensor in ("log_range", "bits")
    ]
    call = module.graph.call_module(f"{BIASES}.{node.name}", (bias, *steps))
    call.meta = {"val": bias.meta["val"]} if "val" in bias.meta else {}
    return call


def _read(module: GraphModule, target: str) -> Node:
    node = module.graph.get_attr(target)
    node.meta["val"] = tensor_at(module, target)
    return node


def align_signs(module: GraphModule) -> None:
    """Tell bias quantizers the signs of the grids that they read, after calibration changed one."""
    for node in module.graph.nodes:
        owner = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(owner, BiasQuantizer):
            signs = []
            for read in (node.args[1], node.args[3]):
                quantizer = module.get_submodule(str(read.target).rpartition(".")[0])
                signs.append(isinstance(quantizer, Quantizer) and quantizer.signed)
            owner.input_signed, owner.weight_signed = signs


@dataclass(frozen=True)
class QuantizeBiases(Pass):
    """Round every bias to the grid of its accumulator, input step times weight step.

    Before: a graph with quantizers. After: every bias of a compute node whose two factors are on
    grids passes through a `BiasQuantizer` that reads the steps of both.
    """

    def run(self, module: GraphModule) -> PassResult:
        """Insert all bias quantizers."""
        module.add_module(BIASES, nn.Module())
        modified = False
        made: dict[Key, Node] = {}
        for node in list(module.graph.nodes):
            op = compute_op(node)
            bias = _bias(module, node, op) if op else None
            if op is not None and bias is not None:
                modified |= _quantize(module, node, op, bias, made)
        return PassResult(module, modified)
