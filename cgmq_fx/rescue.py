"""When training goes wrong: what is to blame, and what can still be saved."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from cgmq_fx.cost_models.errors import CgmqError
from cgmq_fx.history import History
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.infra import place
from cgmq_fx.passes.quantizer import Quantizer
from cgmq_fx.prepared import Prepared
from cgmq_fx.result import Result

_SMALLEST = -80.0
"""Natural logarithm of the smallest range whose finest step float32 can still hold."""


def blame(module: GraphModule, inputs: ExampleInputs) -> str:
    """What is the first thing in a forward pass that is not finite, in words."""
    if not _finite(inputs.tensors):
        return "the inputs of this batch have values that are not finite"
    for found in (broken_state(module), _First(module).node(inputs)):
        if found is not None:
            return found
    return "every value in the graph is finite, so the loss itself or its target is to blame"


def broken_state(module: GraphModule) -> str | None:
    """The first range or weight that is not usable any more, in words, or None."""
    for name, quantizer in module.named_modules():
        if isinstance(quantizer, Quantizer):
            low, high = quantizer.log_range.detach().aminmax()
            if not float(low) >= _SMALLEST or not float(high) <= -_SMALLEST:
                what = "collapsed to zero" if float(high) < 0 else "is not finite or far too large"
                return f"the range of the quantizer {name.rpartition('.')[2]} {what}"
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not _finite([tensor]):
            return f"{name} has values that are not finite"
    return None


def broken_gradient(module: GraphModule) -> str | None:
    """The first parameter whose gradient is not finite, by name, or None."""
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    if not grads or bool(torch.stack([g.sum().float() for g in grads.values()]).isfinite().all()):
        return None
    return next((name for name, grad in grads.items() if not _finite([grad])), None)


class Rescue:
    """Keeps the last good state of a run, and makes a result of it.

    Args:
        prepared: The model that is trained.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._good: dict[str, Any] = {}
        self.keep()

    def keep(self) -> None:
        """Remember the current state, on the CPU, unless it is broken."""
        if broken_state(self._prepared.model) is None:
            state = self._prepared.state_dict()
            self._good = pytree.tree_map_only(Tensor, lambda t: t.cpu(), state)

    def result(self, optimizer: Optimizer, history: History) -> Result | None:
        """The current state, or the last good one, as a result; None if nothing can be made of it.

        Args:
            optimizer: Its gradients are dropped first: memory may be what is missing.
            history: What was recorded so far.
        """
        optimizer.zero_grad(set_to_none=True)
        try:
            if broken_state(self._prepared.model) is not None:
                self._prepared.load_state_dict(self._good)
            result = self._prepared.finalize()
        except (CgmqError, RuntimeError, MemoryError):
            return None
        result.history = history
        return result


class _First(Interpreter):
    """Finds the first node whose output is not finite."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self._found: Node | None = None

    def node(self, inputs: ExampleInputs) -> str | None:
        leaves = pytree.tree_leaves((inputs.args, dict(inputs.kwargs)))
        with torch.no_grad():
            self.run(*leaves, enable_io_processing=False)
        if self._found is None:
            return None
        where = place(self._found)
        return f"the output of {self._found.name} is not finite" + (f" ({where})" if where else "")

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if self._found is None and not _finite(pytree.tree_leaves(value)):
            self._found = n
        return value


def _finite(values: Iterable[Any]) -> bool:
    tensors = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    return all(bool(t.detach().isfinite().all()) for t in tensors)
