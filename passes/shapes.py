"""Shape propagation: every node's `meta["val"]` becomes a fake tensor of the example batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.node import Argument, Target
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.infra import Pass, PassResult


@dataclass(frozen=True)
class PropagateShapes(Pass):
    """Record concrete shapes and dtypes.

    Before: any graph. After: `meta["val"]` of every node is what it would return for the example
    inputs, without data; the nodes themselves are unchanged.
    """

    inputs: ExampleInputs

    def run(self, module: GraphModule) -> PassResult:
        """Interpret the graph on fake tensors."""
        leaves = pytree.tree_leaves((self.inputs.args, dict(self.inputs.kwargs)))
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in leaves]
        with torch.no_grad():
            _Propagator(module, mode).run(*fake, enable_io_processing=False)
        return PassResult(module, modified=False)


class _Propagator(FakeTensorProp):
    """FakeTensorProp for inputs that are fake already, and state that must not be written to."""

    def run(self, *args: object, **kwargs: object) -> object:
        with self._mode:
            return torch.fx.Interpreter.run(self, *args, **kwargs)  # type: ignore[arg-type]

    def get_attr(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
