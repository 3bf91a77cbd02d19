"""Shape propagation: every node's `meta["val"]` becomes a fake tensor of the example batch.

Where a size or a number depends on values (how many elements a mask selects, the largest of some
lengths), fake tensors cannot tell. The graph is then run once on the example inputs, and what those
nodes returned is kept in `meta["cgmq_example"]`, where later propagations find it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import Argument, Target
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from cgmq_fx.passes.copying import copy_graph
from cgmq_fx.passes.guard import WorkGuard, check_arithmetic, check_value
from cgmq_fx.passes.infra import Pass, PassResult
from cgmq_fx.passes.inputs import ExampleInputs
from cgmq_fx.passes.quantizer import BiasQuantizer, Quantizer
from cgmq_fx.passes.state import reachable_from_inputs

EXAMPLE = "cgmq_example"
"""The `node.meta` key of what an op returned for the example: a number, a `Like`, a tuple."""

DOUBLED = "cgmq_doubled"
"""The `node.meta` key of the shape that a node's tensor has for twice as many samples."""

_UNKNOWABLE = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass(frozen=True, slots=True)
class Like:
    """The shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


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
        try:
            self._propagate(module)
        except _UNKNOWABLE:
            if not self.trusted:  # nothing of a file that is not trusted is executed
                raise
            self._propagate(module, _examples(module, self.inputs))
        return PassResult(module, modified=False)

    def _propagate(self, module: GraphModule, examples: Mapping[str, Any] | None = None) -> None:
        mode = FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=self.trusted)
        leaves = self.inputs.leaves
        fake = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in leaves]
        kind = _Propagator if self.trusted else _GuardedPropagator
        with torch.no_grad():
            propagator = kind(module, mode)
            propagator.examples = examples or {}
            propagator.run(*fake, enable_io_processing=False)


@dataclass(frozen=True)
class CompleteShapes(Pass):
    """Record the shapes and dtypes of nodes that were added since `PropagateShapes`.

    Before: a graph where that pass has been, and others behind it. After: every node has its
    `meta["val"]`; where one was known it is kept, which saves most of the work in large graphs.
    """

    inputs: ExampleInputs

    def run(self, module: GraphModule) -> PassResult:
        """Interpret what is new, on the fake tensors that are there."""
        mode = _mode_of(module)
        if mode is None:
            return PropagateShapes(self.inputs).run(module)
        leaves = [None] * len(module.graph.find_nodes(op="placeholder"))
        with torch.no_grad():
            _Completer(module, mode).run(*leaves, enable_io_processing=False)
        return PassResult(module, modified=False)


@dataclass(frozen=True)
class CompareBatches(Pass):
    """Record the shapes of another batch: what they tell of samples, no accident of sizes does.

    Before: a graph with the shapes of its example inputs. After: `meta["cgmq_doubled"]` of every
    node that depends on an input is the shape of its tensor for the inputs `doubled`, which have
    twice as many samples. No node has it if there are no such inputs, the graph does not take them,
    or values decide on its sizes.
    """

    doubled: ExampleInputs | None
    trusted: bool = True

    def run(self, module: GraphModule) -> PassResult:
        """Interpret what depends on the inputs once more."""
        for node in module.graph.nodes:
            node.meta.pop(DOUBLED, None)
        mode, known = _mode_of(module), any(EXAMPLE in n.meta for n in module.graph.nodes)
        if self.doubled is not None and mode is not None and not known:
            with suppress(Exception):  # whatever it is, the graph does not take this batch
                self._record(module, self.doubled.leaves, mode)
        return PassResult(module, modified=False)

    def _record(self, module: GraphModule, leaves: list[Any], mode: FakeTensorMode) -> None:
        doubler = (_Doubler if self.trusted else _GuardedDoubler)(module, mode)
        with torch.no_grad():
            fake = [_contiguous(mode, x) if isinstance(x, Tensor) else x for x in leaves]
            doubler.run(*fake, enable_io_processing=False)
        for node, shape in doubler.shapes.items():
            node.meta[DOUBLED] = shape


def varying_axes(node: Node) -> tuple[int, ...]:
    """The axes of a tensor whose sizes follow the number of samples, after `CompareBatches`."""
    doubled = node.meta.get(DOUBLED)
    if doubled is None:
        return ()
    sizes = enumerate(zip(node.meta["val"].shape, doubled, strict=True))
    return tuple(axis for axis, (size, other) in sizes if size != other)


def _contiguous(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A tensor of a shape, however that is laid out in memory."""
    return mode.from_tensor(tensor).contiguous()


def _mode_of(module: GraphModule) -> FakeTensorMode | None:
    """The mode of the fake tensors in a graph."""
    found: FakeTensorMode | None = detect_fake_mode([n.meta.get("val") for n in module.graph.nodes])
    return found


class _Propagator(FakeTensorProp):
    """FakeTensorProp for inputs that are fake already, and state that must not be written to.

    Attributes:
        examples: What nodes return for the example inputs, by name, where that was found out.
    """

    examples: Mapping[str, Any]

    def run(self, *args: object, **kwargs: object) -> object:
        with self._mode:
            return torch.fx.Interpreter.run(self, *args, **kwargs)  # type: ignore[arg-type]

    def get_attr(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._mode.from_tensor(value) if isinstance(value, Tensor) else value

    def call_module(
        self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]
    ) -> Any:
        owner = self.fetch_attr(str(target))
        if isinstance(owner, Quantizer | BiasQuantizer):
            return args[0]  # of the same shape and dtype; running it would be most of the work
        return super().call_module(target, args, kwargs)

    def run_node(self, n: Node) -> Any:
        try:
            return super().run_node(n)
        except _UNKNOWABLE:
            if n.name in self.examples:
                n.meta[EXAMPLE] = self.examples[n.name]
            if EXAMPLE not in n.meta:
                raise
            n.meta["val"] = _made(n.meta[EXAMPLE])
            return n.meta["val"]


class _Completer(_Propagator):
    """The same, keeping what is known."""

    def run_node(self, n: Node) -> Any:
        return n.meta["val"] if "val" in n.meta else super().run_node(n)


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


class _Doubler(_Propagator):
    """The same for another batch: it keeps what depends on no input, and leaves `meta` as it is.

    Attributes:
        shapes: The shapes of the tensors that depend on an input.
    """

    def __init__(self, module: GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module, mode)
        self.shapes: dict[Node, tuple[int, ...]] = {}
        self._live = reachable_from_inputs(module.graph)
        self._made: dict[Any, Any] = {}

    def run_node(self, n: Node) -> Any:
        if n not in self._live:
            return n.meta.get("val")
        value = Interpreter.run_node(self, n)
        check_value(n, value)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        return value

    def call_function(
        self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not isinstance(target, torch._ops.OpOverload):
            return super().call_function(target, args, kwargs)
        call = (target, _like((*args, *kwargs.items())))  # models repeat their layers
        if call not in self._made:
            self._made[call] = super().call_function(target, args, kwargs)
        return self._made[call]


class _GuardedDoubler(_Doubler, _GuardedPropagator):
    """The same for a graph that is not trusted."""


def _examples(module: GraphModule, inputs: ExampleInputs) -> dict[str, Any]:
    """Run a graph once, on copies of its state; what its nodes return, by name."""
    recorder = _Recorder(copy_graph(module))
    with torch.no_grad():
        recorder.run(*inputs.map(torch.clone).leaves, enable_io_processing=False)
    return recorder.found


class _Recorder(Interpreter):
    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function":
            self.found[n.name] = _like(value)
        return value


def _like(value: Any) -> Any:
    """A value without its numbers: `Like` for a tensor."""
    if isinstance(value, Tensor):
        return Like(tuple(value.shape), value.dtype)
    return tuple(map(_like, value)) if isinstance(value, tuple | list) else value


def _made(like: Any) -> Any:
    """A value of that kind; within a fake mode it has no memory."""
    if isinstance(like, Like):
        return torch.empty(like.shape, dtype=like.dtype)
    return tuple(map(_made, like)) if isinstance(like, tuple) else like
