"""Lowered graphs in QONNX form: one `Quant` per tensor, at the bit-width that it really has.

QONNX (Pappalardo et al., arXiv 2206.07527) keeps all tensors float and marks their grids: a `Quant`
scales, rounds, clips to a bit-width and scales back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from cgmq_fx.passes.codes import is_dequantize, is_quantize
from cgmq_fx.passes.infra import Pass, PassResult
from cgmq_fx.passes.optable import argument
from cgmq_fx.passes.state import drop_unused_state, tensor_at

QUANT = "qonnx.custom_op.general::Quant"
_NARROWEST = 2


def quant(x: Tensor, step: Tensor, zero: Tensor, bits: Tensor, signed: bool) -> Tensor:
    """A call that torch.onnx writes as the `Quant` node of QONNX.

    Signed codes are narrow: without the lowest one, so that they are symmetric. (It can be traced;
    its values are of no use.)

    Args:
        x: Any shape.
        step: Shape () or one that broadcasts against `x`.
        zero: The code of 0, which is 0.
        bits: Shape (), a whole number as float.
        signed: Whether codes below zero exist.
    """
    found: Tensor = torch.onnx.ops.symbolic(
        QUANT,
        (x, step, zero, bits),
        {"signed": int(signed), "narrow": int(signed), "rounding_mode": "ROUND"},
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )
    return found


def width_of(low: int, high: int, signed: bool) -> int:
    """The least bits of a grid that has all codes from `low` to `high`."""
    most = max(-low, high)
    return max(most.bit_length() + signed, _NARROWEST)


def _ends(bits: int, signed: bool) -> tuple[int, int]:
    """The lowest and the highest code of a grid."""
    most = 2 ** (bits - signed) - 1
    return (-most if signed else 0), most


@dataclass(frozen=True)
class MarkQuants(Pass):
    """Replace codes by `Quant` nodes.

    Before: a lowered graph. After: no op of this library is left; every tensor that was quantized
    is float and passes through `quant`: activations, weights and biases. Limits that no bit-width
    has are a clamp in front of it.
    """

    def run(self, module: GraphModule) -> PassResult:
        """Replace every dequantize, and the quantize before it."""
        for node in list(module.graph.nodes):
            if is_dequantize(node):
                codes = node.args[0]
                activation = isinstance(codes, Node) and is_quantize(codes)
                new = _activation(module, node) if activation else _constant(module, node)
                node.replace_all_uses_with(new)
        module.graph.eliminate_dead_code()
        drop_unused_state(module)
        return PassResult(module, modified=True)


def _activation(module: GraphModule, pair: Node) -> Node:
    codes = pair.args[0]
    assert isinstance(codes, Node)
    lows, highs = list(argument(codes, "low")), list(argument(codes, "high"))
    source, axis = codes.args[0], int(argument(codes, "axis"))
    rank = len(codes.meta["val"].shape)
    step = _along(_state(module, pair.args[1]), axis, rank)
    signed = min(lows) < 0
    limits = list(zip(lows, highs, strict=True))
    bits = max(width_of(low, high, signed) for low, high in limits)
    with module.graph.inserting_before(pair):
        if any(_ends(bits, signed) != limit for limit in limits):
            source = _clamped(module, source, pair, step, limits, axis, rank)
        return _quant(module, source, pair, step, bits, signed)


def _clamped(
    module: GraphModule,
    source: Any,
    like: Node,
    step: Tensor,
    limits: list[tuple[int, int]],
    axis: int,
    rank: int,
) -> Node:
    """Values between limits that no grid has."""
    ends = [_along(torch.tensor(column), axis, rank) * step for column in zip(*limits, strict=True)]
    if all(end.numel() == 1 for end in ends):
        numbers = [float(end) for end in ends]
        return module.graph.call_function(torch.ops.aten.clamp.default, (source, *numbers))
    reads = [_read(module, f"{like.name}_end_{i}", end) for i, end in enumerate(ends)]
    return module.graph.call_function(torch.ops.aten.clamp.Tensor, (source, *reads))


def _constant(module: GraphModule, node: Node) -> Node:
    """A weight or a bias, at the least bits that hold its codes."""
    codes = _state(module, node.args[0])
    step = _along(_state(module, node.args[1]), int(argument(node, "axis")), codes.dim())
    most = int(codes.abs().max()) if codes.numel() else 0
    bits = width_of(-most, most, signed=True)
    with module.graph.inserting_before(node):
        stored = str(getattr(node.args[0], "target", node.name)).removesuffix("_codes")
        values = _read(module, f"{stored}_values", codes * step)
        return _quant(module, values, node, step, bits, signed=True)


def _quant(
    module: GraphModule, value: Any, like: Node, step: Tensor, bits: int, signed: bool
) -> Node:
    zero = _read(module, "cgmq_zero", torch.zeros(()))
    scale = _read(module, f"{like.name}_scale", step)
    width = _read(module, f"{like.name}_bits", torch.tensor(bits, dtype=step.dtype))
    return module.graph.call_function(quant, (value, scale, zero, width, signed))


def _read(module: GraphModule, name: str, tensor: Tensor) -> Node:
    module.register_buffer(name, tensor)
    return module.graph.get_attr(name)


def _state(module: GraphModule, node: Any) -> Tensor:
    found = tensor_at(module, node.target)
    assert found is not None
    return found


def _along(vector: Tensor, axis: int, rank: int) -> Tensor:
    """A vector along one axis of a tensor of `rank`; a single number without dimensions."""
    if vector.numel() == 1:
        return vector.reshape(())
    return vector.reshape([-1 if i == axis else 1 for i in range(rank)])
