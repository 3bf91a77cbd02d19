"""Shape propagation: every node's `meta["val"]` becomes a fake tensor of the example batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
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
    """FakeTensorProp with its own run, which would make the inputs fake a second time."""

    def run(self, *args: object, **kwargs: object) -> object:
        with self._mode:
            return torch.fx.Interpreter.run(self, *args, **kwargs)  # type: ignore[arg-type]
