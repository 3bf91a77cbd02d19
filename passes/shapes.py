"""Shape propagation: every node's `meta["val"]` becomes a fake tensor of the example batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.node import Argument, Target
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.guard import WorkGuard, check_arithmetic, check_value
from cgmq_fx.passes.infra import Pass, PassResult


@dataclass(frozen=True)
class PropagateShapes(Pass):
    """Record concrete shapes and dtypes.

    Before: any graph. After: `meta["val"]` of every node is what it would return for the example
    inputs, without data; the nodes themselves are unchanged. A graph that is not `trusted` runs no
    kernel where an op has no fake one, and is refused if it asks for more than models do.
    """

    inputs: ExampleInputs
    trusted: bool = True

    def run(self, module: GraphModule) -> PassResult:
        """Interpret the graph on fake tensors."""
        leaves = pytree.tree_leaves((self.inputs.args, dict(self.inputs.kwargs)))
        mode = FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=self.trusted)
        fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in leaves]
        kind = _Propagator if self.trusted else _GuardedPropagator
        with torch.no_grad():
            kind(module, mode).run(*fake, enable_io_processing=False)
        return PassResult(module, modified=False)


class _Propagator(FakeTensorProp):
    """FakeTensorProp for inputs that are fake already, and state that must not be written to."""

    def run(self, *args: object, **kwargs: object) -> object:
        with self._mode:
            return torch.fx.Interpreter.run(self, *args, **kwargs)  # type: ignore[arg-type]

    def get_attr(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._mode.from_tensor(value) if isinstance(value, torch.Tensor) else value


class _GuardedPropagator(_Propagator):
    """The same for a graph that is not trusted."""

    def __init__(self, module: GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module, mode)
        self._guard = WorkGuard(len(module.graph.nodes))

    def run(self, *args: object, **kwargs: object) -> object:
        with self._mode, self._guard:
            return torch.fx.Interpreter.run(self, *args, **kwargs)  # type: ignore[arg-type]

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        check_value(n, value)
        return value

    def call_function(
        self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]
    ) -> Any:
        if isinstance(target, torch._ops.OpOverload):
            self._guard.count(target, args, kwargs)
        else:
            check_arithmetic(target, (*args, *kwargs.values()))
        return super().call_function(target, args, kwargs)
