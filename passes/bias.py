"""Biases on the int32 grid of their accumulators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from cgmq_fx.passes.infra import Pass, PassResult
from cgmq_fx.passes.insert import QUANTIZERS, operands
from cgmq_fx.passes.meeting import weight_axis
from cgmq_fx.passes.normaliser import Normaliser
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


@dataclass(frozen=True, slots=True)
class Rounding:
    """A bias that is rounded to the grid of its accumulator.

    Attributes:
        quantizer: What rounds it.
        bias: What is rounded, with a normaliser behind the layer folded into it.
        input: Name of the quantizer of the layer's input.
        weight: Name of the quantizer of its weight.
    """

    quantizer: BiasQuantizer
    bias: Tensor
    input: str
    weight: str


def roundings(module: GraphModule) -> Iterator[Rounding]:
    """Every bias that is rounded, in graph order."""
    for node in module.graph.find_nodes(op="call_module"):
        owner = module.get_submodule(str(node.target))
        quantizer = owner.rounding if isinstance(owner, Normaliser) else owner
        if not isinstance(quantizer, BiasQuantizer):
            continue
        reads: Any = node.args[1:] if isinstance(owner, Normaliser) else node.args
        bias = tensor_at(module, reads[0].target)
        if bias is None:
            continue
        if isinstance(owner, Normaliser):
            bias = owner.folded(bias)
        first, second = (str(read.target).split(".")[-2] for read in (reads[1], reads[3]))
        yield Rounding(quantizer, bias.detach(), first, second)


def align_signs(module: GraphModule) -> None:
    """Tell bias quantizers the signs of the grids that they read, after calibration changed one."""
    for found in roundings(module):
        signs = []
        for name in (found.input, found.weight):
            quantizer = module.get_submodule(f"{QUANTIZERS}.{name}")
            signs.append(isinstance(quantizer, Quantizer) and quantizer.signed)
        found.quantizer.input_signed, found.quantizer.weight_signed = signs


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
