"""Opaque modules: what cannot be captured runs as it is, as one node of the graph.

While a model is traced, a `_StandIn` takes the place of a module that cannot be traced and writes
one call of `cgmq_fx::opaque` into the graph; what it returns has the shapes that the module
returned for the example inputs. Afterwards `RestoreOpaque` puts the module itself, as an
`OpaqueCall`, in the place of that call.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node
from torch.utils.flop_counter import FlopCounterMode

from cgmq_fx.cost_models.errors import CaptureError, DataError
from cgmq_fx.passes.infra import Pass, PassResult
from cgmq_fx.passes.inputs import ExampleInputs
from cgmq_fx.passes.templates import Template, Values, put, take
from cgmq_fx.passes.tracing import is_free

OPAQUE = "cgmq_opaque"


@dataclass(frozen=True)
class Example:
    """One call of a module that cannot be captured, with the example inputs.

    Attributes:
        path: Path of the module in the user's model.
        inner: The module.
        result: What it returned.
        batch: The batch size of the example, or None.
        macs: Multiply-accumulates of the whole batch, by torch's counter.
        trains: Whether it returns the same structure in training mode; detectors do not.
    """

    path: str
    inner: nn.Module
    result: Any
    batch: int | None
    macs: int
    trains: bool

    @property
    def outputs(self) -> list[Tensor]:
        """The tensors in the result."""
        values: Values = ([], [])
        take(self.result, values)
        return values[0]


@dataclass(frozen=True)
class Call:
    """A call of `cgmq_fx::opaque` that was written into a graph.

    Attributes:
        example: What the module does for the example inputs.
        arguments: What it is called with: (args, kwargs).
    """

    example: Example
    arguments: Template


class OpaqueCall(nn.Module):
    """A call of a module that runs as it is: tensors in, a list of tensors out.

    Attributes:
        inner: The user's module.
        path: Its path in the user's model.
        macs: Multiply-accumulates of the example batch, by torch's counter.
    """

    def __init__(self, call: Call, tensors: int) -> None:
        super().__init__()
        self.inner = call.example.inner
        self.path = call.example.path
        self.macs = call.example.macs
        self._arguments = call.arguments
        self._tensors = tensors
        self._like = [(tuple(t.shape), t.dtype) for t in call.example.outputs]
        self._results = take(call.example.result, ([], []))
        self._trains = call.example.trains

    def train(self, mode: bool = True) -> OpaqueCall:
        """Switch modes, unless the module returns something else while it trains."""
        super().train(mode)
        if not self._trains:
            self.inner.eval()
        return self

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters and buffers of the user's module, named as in the user's model."""
        for name, tensor in (*self.inner.named_parameters(), *self.inner.named_buffers()):
            yield f"{self.path}.{name}", tensor

    def forward(self, *values: Any) -> list[Tensor]:
        """Run the module.

        Raises:
            DataError: If it returned something else than a graph can know: other numbers or
                another structure than for the example inputs.
        """
        mode = detect_fake_mode(values)
        if mode is not None:
            device = next((v.device for v in values if isinstance(v, Tensor)), None)
            with mode:
                return [torch.empty(s, dtype=dtype, device=device) for s, dtype in self._like]
        given: Values = (list(values[: self._tensors]), list(values[self._tensors :]))
        args, kwargs = put(self._arguments, given)
        found: Values = ([], [])
        same = take(self.inner(*args, **kwargs), found).same(self._results)
        if not same or not all(map(self._fits, found[0], self._like)):
            raise DataError(
                f"{self.path} ({type(self.inner).__name__}), which could not be captured and runs "
                "as it is, returned other numbers or another structure than for the example inputs"
            )
        return found[0]

    @staticmethod
    def _fits(tensor: Tensor, like: tuple[tuple[int, ...], torch.dtype]) -> bool:
        """Whether a result has the shape that the graph was written for; its rows are free."""
        shape, _ = like
        return tensor.dim() == len(shape) and tuple(tensor.shape[1:]) == shape[1:]


_CALLS: ContextVar[list[Call]] = ContextVar("cgmq_fx_opaque_calls")


@torch.library.custom_op("cgmq_fx::opaque", mutates_args=())
def _opaque(tensors: Sequence[Tensor], numbers: Sequence[int], call: int) -> list[Tensor]:
    """Stands for a `Call` while a model is traced; it is never executed."""
    raise CaptureError("a graph with opaque modules was run before they were put back")


@_opaque.register_fake
def _(tensors: Sequence[Tensor], numbers: Sequence[int], call: int) -> list[Tensor]:
    known = _CALLS.get()[call].example
    batch: Any = known.batch
    for tensor in tensors:
        if tensor.dim() and is_free(tensor.shape[0]) and tensor.shape[0] == known.batch:
            batch = tensor.shape[0]
            break
    return [
        torch.empty(_sized(t, known.batch, batch), dtype=t.dtype, device=t.device)
        for t in known.outputs
    ]


def _sized(tensor: Tensor, example: int | None, batch: Any) -> tuple[Any, ...]:
    """The shape of an output for another batch."""
    shape: list[Any] = list(tensor.shape)
    if shape and shape[0] == example:
        shape[0] = batch
    return tuple(shape)


class _StandIn(nn.Module):
    """Takes the place of a module: records its calls, then stands for them while tracing."""

    def __init__(self, inner: nn.Module, path: str, batch: int | None) -> None:
        super().__init__()
        self.inner = inner
        self.recording = True
        self._path = path
        self._batch = batch
        self._examples: list[Example] = []
        self._position = 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Record a call, or write it into the graph."""
        if self.recording:
            return self._record(args, kwargs)
        example = self._examples[self._position % len(self._examples)]
        self._position += 1
        given: Values = ([], [])
        arguments = take((args, kwargs), given)
        calls = _CALLS.get()
        calls.append(Call(example, arguments))
        tensors = torch.ops.cgmq_fx.opaque(*given, len(calls) - 1)
        return put(take(example.result, ([], [])), (list(tensors), []))

    def _record(self, args: Any, kwargs: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = self.inner(*args, **kwargs)
        macs = counter.get_total_flops() // 2
        own = copy.deepcopy(result)
        trains = _same_when_training(self.inner, args, kwargs, take(own, ([], [])))
        self._examples.append(Example(self._path, self.inner, own, self._batch, macs, trains))
        return result


def _same_when_training(module: nn.Module, args: Any, kwargs: Any, like: Template) -> bool:
    try:
        args, kwargs = copy.deepcopy((args, kwargs))
        result = copy.deepcopy(module).train()(*args, **kwargs)
    except Exception:  # noqa: BLE001 - whatever it misses in training mode, it cannot be had here
        return False
    return take(result, ([], [])).same(like)


@contextmanager
def stand_ins(
    model: nn.Module, paths: Sequence[str], inputs: ExampleInputs
) -> Iterator[list[Call]]:
    """Within the context, the modules at `paths` are written into a graph as opaque calls.

    Args:
        model: The model; it is as it was when the context ends.
        paths: Which of its modules to replace.
        inputs: What to run the model with, once, to see how they are called.

    Yields:
        The calls, which tracing fills.
    """
    calls: list[Call] = []
    made: dict[nn.Module | None, _StandIn] = {
        (module := model.get_submodule(path)): _StandIn(module, path, inputs.batch)
        for path in paths
    }
    places = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent._modules.items()
        if child in made
    ]
    token = _CALLS.set(calls)
    try:
        for parent, name, child in places:
            parent._modules[name] = made[child]
        if made:
            with torch.no_grad():
                model(*inputs.args, **inputs.kwargs)
        for stand_in in made.values():
            stand_in.recording = False
        yield calls
    finally:
        for parent, name, child in places:
            parent._modules[name] = child
        _CALLS.reset(token)


def culprit(error: BaseException, model: nn.Module) -> str | None:
    """Path of the innermost module in whose `forward` an error arose, or None if it is unknown."""
    # torch traces shared modules through proxies, which have the module's own dictionary
    paths = {id(vars(module)): path for path, module in model.named_modules()}
    found: str | None = None
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for link in chain:
        trace = link.__traceback__
        while trace is not None:
            code, owner = trace.tb_frame.f_code, trace.tb_frame.f_locals.get("self")
            own = getattr(owner, "__dict__", None) if code.co_name == "forward" else None
            path = paths.get(id(own))
            if path is not None and (found is None or len(path) >= len(found)):
                found = path
            trace = trace.tb_next
    return found or None


def opaque_call(module: GraphModule, node: Node) -> OpaqueCall | None:
    """The opaque module that a node calls, or None."""
    if node.op != "call_module" or not str(node.target).startswith(f"{OPAQUE}."):
        return None
    owner = module.get_submodule(str(node.target))
    return owner if isinstance(owner, OpaqueCall) else None


@dataclass(frozen=True)
class RestoreOpaque(Pass):
    """Put the modules that could not be captured in the place of the calls that stand for them.

    Before: a captured graph with calls of `cgmq_fx::opaque`. After: each is a call of an
    `OpaqueCall`, which owns the user's module and returns a list of tensors.
    """

    calls: tuple[Call, ...]

    def run(self, module: GraphModule) -> PassResult:
        """Replace every call."""
        found = [n for n in module.graph.nodes if n.target is torch.ops.cgmq_fx.opaque.default]
        if found:
            module.add_submodule(OPAQUE, nn.Module())
        for node in found:
            _restore(module, node, self.calls)
        return PassResult(module, bool(found))


def _restore(module: GraphModule, node: Node, calls: Sequence[Call]) -> None:
    tensors, numbers, index = node.args
    if not (isinstance(tensors, list) and isinstance(numbers, list) and isinstance(index, int)):
        raise CaptureError(f"{node} is not a call of an opaque module")
    call = calls[index]
    name = f"{call.example.path.replace('.', '_')}_{node.name}"
    module.get_submodule(OPAQUE).add_module(name, OpaqueCall(call, len(tensors)))
    with module.graph.inserting_before(node):
        made = module.graph.call_module(f"{OPAQUE}.{name}", (*tensors, *numbers))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)
