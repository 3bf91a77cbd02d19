"""Lowering: from quantizers to explicit codes, integer weights and integer biases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from cgmq_fx.cost_models.errors import PassError, UnsupportedModelError
from cgmq_fx.passes.absorb import AbsorbClamps
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.codes import DEQUANTIZE, QUANTIZE, container
from cgmq_fx.passes.copying import copy_graph
from cgmq_fx.passes.grid import PASS_THROUGH, finest_step, grid
from cgmq_fx.passes.infra import Pass, PassResult, place, run_passes
from cgmq_fx.passes.opaque import OpaqueCall
from cgmq_fx.passes.optable import argument
from cgmq_fx.passes.quantizer import (
    BiasQuantizer,
    Quantizer,
    TrainingFlag,
    bias_codes,
    bias_step,
)
from cgmq_fx.passes.shapes import PropagateShapes
from cgmq_fx.passes.state import drop_unused_state, quantizer_name, reachable_from_inputs

_OFF_GRID = 0.02
"""How far from a whole code float32 arithmetic may put a value that is on the grid."""


def _steps(quantizer: Quantizer) -> tuple[Tensor, Tensor, Tensor]:
    """Step, lowest and highest code of every gate, each of the shape of gate and range together."""
    found = grid(quantizer.limit.detach(), quantizer.bits, quantizer.signed)
    step, low, high = torch.broadcast_tensors(*found)
    return step, low, high


def _finest(quantizer: Quantizer) -> Tensor:
    """The one step per range that all its values are multiples of."""
    fixed = quantizer.log_range.detach()
    return finest_step(fixed, quantizer.bits, quantizer.signed, quantizer.spec.power_of_two)


def _axis(shape: tuple[int, ...] | torch.Size) -> int:
    """The axis that a shape such as (1, 8, 1, 1) runs along; 0 for a single number."""
    return next((i for i, size in enumerate(shape) if size > 1), 0)


def _flat(step: Tensor) -> Tensor:
    """A step of shape () or (channels,)."""
    return step.reshape(()) if step.numel() == 1 else step.reshape(-1)


def _whole(values: Tensor, what: str) -> Tensor:
    """Values that should be whole numbers, as such."""
    codes = values.round()
    if values.numel() and float((values - codes).abs().max()) > _OFF_GRID:
        raise UnsupportedModelError(
            f"{what} has bit-widths whose grids do not nest, so its values lie on no common grid; "
            "use bit-widths that double, such as 2, 4, 8"
        )
    return codes


def _check_integer(quantizer: Quantizer, node: Node) -> None:
    if bool((quantizer.bits >= PASS_THROUGH).any()):
        where = f" ({place(node)})" if place(node) else ""
        raise UnsupportedModelError(
            f"{quantizer_name(node)}{where} has channels at 32 bits, which stay float, beside "
            "quantized ones; no integer container holds both: leave 32 out of the bit-widths, or "
            "use one gate per tensor"
        )


def _state_of(module: GraphModule, target: Any) -> Any:
    """What a `get_attr` node reads."""
    for part in str(target).split("."):
        module = getattr(module, part)
    return module


class _Lowering:
    """Rewrites the quantizers of one graph."""

    def __init__(self, module: GraphModule, offset: bool) -> None:
        self._module = module
        self._graph = module.graph
        self._offset = offset
        self._live = reachable_from_inputs(module.graph)
        self._values: dict[Node, Any] = {}

    def run(self) -> None:
        """Replace every call of a module of this library."""
        for node in list(self._graph.nodes):
            if node.op != "call_module":
                continue
            owner = self._module.get_submodule(str(node.target))
            if isinstance(owner, OpaqueCall):
                kind = type(owner.inner).__name__
                raise UnsupportedModelError(
                    f"{owner.path} ({kind}) could not be captured and runs as it is; there is no "
                    "graph of it that a runtime could execute"
                )
            if isinstance(owner, TrainingFlag):
                self._fix_mode(node)
            elif isinstance(owner, Quantizer):
                _check_integer(owner, node)
                self._replace(node, owner, self._activation, self._weight)
            elif isinstance(owner, BiasQuantizer):
                self._replace(node, owner, self._bias, self._bias)

    def _fix_mode(self, flag: Node) -> None:
        """Evaluation mode becomes a constant."""
        for user in list(flag.users):
            user.args, user.kwargs = map_arg(
                (user.args, user.kwargs), lambda n: False if n is flag else n
            )

    def _replace(
        self,
        node: Node,
        owner: Any,
        live: Callable[[Node, Any], Node],
        constant: Callable[[Node, Any], Node],
    ) -> None:
        if node not in self._live:
            self._evaluate(node)  # before what it reads is lowered
        new = (live if node in self._live else constant)(node, owner)
        new.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
        node.replace_all_uses_with(new)

    def _activation(self, node: Node, quantizer: Quantizer) -> Node:
        """Codes and values of an activation: on one grid, whatever grids its channels have."""
        step, low, high = _steps(quantizer)
        name = quantizer_name(node)
        value, finest = node.args[0], _finest(quantizer)
        if step.numel() > 1:
            ratio = _whole(step / finest, name)
            value = self._pair(node, value, f"{name}_channel", step, low, high)
            low, high = (low * ratio).amin(), (high * ratio).amax()
        return self._pair(node, value, name, finest, low, high)

    def _pair(
        self, node: Node, value: Any, name: str, step: Tensor, low: Tensor, high: Tensor
    ) -> Node:
        lows, highs = ([int(v) for v in limit.reshape(-1).tolist()] for limit in (low, high))
        dtype, zero = container(min(lows), max(highs), self._offset)
        axis = _axis(step.shape)
        with self._graph.inserting_before(node):
            scale = self._state(f"{name}_step", _flat(step))
            options = (scale, zero, lows, highs, axis, dtype)
            codes = self._graph.call_function(QUANTIZE, (value, *options))
            return self._graph.call_function(DEQUANTIZE, (codes, scale, zero, axis))

    def _weight(self, node: Node, quantizer: Quantizer) -> Node:
        """An integer tensor on the finest grid of every range."""
        name, step = quantizer_name(node), _finest(quantizer)
        codes = _whole(self._evaluate(node) / step, name)
        most = int(codes.abs().max()) if codes.numel() else 0
        return self._constant(node, name, codes.to(container(-most, most)[0]), step)

    def _bias(self, node: Node, quantizer: BiasQuantizer) -> Node:
        """An int32 tensor on the grid of the accumulator."""
        step = quantizer.accumulator_step(*map(self._evaluate, node.all_input_nodes[1:]))
        bias = self._evaluate(node)
        step = bias_step(step, bias)
        codes = bias_codes(bias, step).to(torch.int32)
        return self._constant(node, f"{quantizer_name(node)}_bias", codes, step)

    def _constant(self, node: Node, name: str, codes: Tensor, step: Tensor) -> Node:
        with self._graph.inserting_before(node):
            stored = self._state(f"{name}_codes", codes.contiguous())
            scale = self._state(f"{name}_step", _flat(step))
            return self._graph.call_function(DEQUANTIZE, (stored, scale, 0, _axis(step.shape)))

    def _state(self, name: str, tensor: Tensor) -> Node:
        """A node that reads a tensor; a shared quantizer has one set of tensors."""
        known = getattr(self._module, name, None)
        while known is not None and not (isinstance(known, Tensor) and torch.equal(known, tensor)):
            name = f"{name}_"
            known = getattr(self._module, name, None)
        if known is None:
            self._module.register_buffer(name, tensor.detach().clone())
        return self._graph.get_attr(name)

    def _evaluate(self, node: Node) -> Any:
        """The value of a node that does not depend on the input."""
        if node not in self._values:
            if node.op == "get_attr":
                found = _state_of(self._module, node.target)
            else:
                args, kwargs = map_arg((node.args, node.kwargs), self._evaluate)
                call: Any = node.target
                if node.op == "call_module":
                    call = self._module.get_submodule(str(node.target))
                with torch.no_grad():
                    found = call(*args, **kwargs)
            self._values[node] = found
        return self._values[node]


@dataclass(frozen=True)
class Lower(Pass):
    """Make codes explicit.

    Before: a frozen graph in evaluation mode. After: no module of this library is left. Every
    quantized activation goes through `cgmq_fx.quantize` and `cgmq_fx.dequantize`; every quantized
    weight and bias is an integer tensor behind a `cgmq_fx.dequantize`. A tensor has one step, a
    weight one step per range: the finest of its grids, on which all its values lie. A channel-wise
    activation is rounded channel by channel first. What was float stays float. The graph computes
    what it computed before, up to float32 rounding of values that are equal.

    Attributes:
        offset: Whether activations with codes below zero go into unsigned containers with a zero
            point, which some runtimes ask for.

    Raises:
        UnsupportedModelError: If a tensor has channels that are float beside channels that are not,
            or bit-widths whose grids do not nest within one range, or if a module runs as it is.
    """

    offset: bool = False

    def run(self, module: GraphModule) -> PassResult:
        """Replace quantizers, then drop what nobody reads."""
        _Lowering(module, self.offset).run()
        for node in list(module.graph.nodes):
            if _is_idle_dropout(node):
                node.replace_all_uses_with(node.args[0])
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        drop_unused_state(module)
        return PassResult(module, modified=True)

    def check(self, module: GraphModule) -> None:
        """No quantizer is left."""
        left = [n.name for n in module.graph.nodes if n.op == "call_module"]
        if left:
            raise PassError(f"{left[0]} was not lowered")


def _is_idle_dropout(node: Node) -> bool:
    name = getattr(node.target, "_opname", "")
    return "dropout" in name and node.op == "call_function" and argument(node, "train") is False


def lower(module: GraphModule, inputs: ExampleInputs, offset: bool = False) -> GraphModule:
    """A lowered copy of a frozen graph, with shapes; see `Lower` and `AbsorbClamps`."""
    copied = copy_graph(module).eval()
    return run_passes(copied, [Lower(offset), AbsorbClamps(), PropagateShapes(inputs)])
