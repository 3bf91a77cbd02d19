"""Batches in the forms that people have them in, turned into arguments of the model.

A batch is a tensor, a tuple or list of inputs, `(inputs, target)`, `(*inputs, target)`, or a dict
whose keys are names of the model's parameters, other keys being targets. NumPy's arrays become
tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from cgmq_fx.cost_models.errors import DataError
from cgmq_fx.passes.capture import ExampleInputs

_SYNTHETIC_BATCHES = 32
_NO_TARGET = ", as every key of it is a parameter of the model"


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch.

    Attributes:
        inputs: What to call the model with.
        target: What to compare its output with; None if the batch has none.
    """

    inputs: ExampleInputs
    target: Any

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        target = pytree.tree_map(
            lambda t: (
                (t.clone() if t.is_inference() else t).to(device) if isinstance(t, Tensor) else t
            ),
            self.target,
        )
        return Batch(self.inputs.to(device), target)


@dataclass(frozen=True, slots=True)
class Signature:
    """How the model is called, as far as splitting batches needs it.

    Attributes:
        required: Fewest positional inputs.
        most: Most positional inputs.
        names: Names of the parameters, those that may be positional first.
        form: Inputs in whose form and order the model has to be called, if it has to.
    """

    required: int
    most: int
    names: tuple[str, ...]
    form: ExampleInputs | None = None

    @staticmethod
    def of(model: nn.Module | ExportedProgram) -> Signature:
        """Read the signature of the model's forward."""
        module = model.module() if isinstance(model, ExportedProgram) else model
        parameters = list(inspect.signature(module.forward).parameters.values())
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        plain = [p for p in parameters if p.kind in kinds]
        required = sum(p.default is inspect.Parameter.empty for p in plain)
        variadic = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
        return Signature(
            max(required, 1), 99 if variadic else len(plain), tuple(p.name for p in parameters)
        )

    @staticmethod
    def like(inputs: ExampleInputs, names: tuple[str, ...]) -> Signature:
        """The signature that a model has when it is always called like `inputs`."""
        count = len(inputs.args)
        own = (*names[:count], *inputs.kwargs) if inputs.kwargs else names
        return Signature(count, count, own, inputs)


def split_batch(batch: Any, signature: Signature, supervised: bool) -> Batch:
    """Tell the inputs of a batch from its target.

    Args:
        batch: A batch in any of the forms above.
        signature: How the model is called.
        supervised: Whether a target is needed.

    Raises:
        DataError: If the batch has none of the forms, or no target where one is needed.
    """
    found = _split(_as_tensors(batch), signature, supervised)
    if supervised and found.target is None:
        raise DataError(
            f"a loss was given, but the batch ({_describe(batch)}) has no target"
            f"{_NO_TARGET if isinstance(batch, Mapping) else ''}; make batches (inputs, target), "
            "or leave out loss= so that the float model is the teacher"
        )
    if signature.form is None:
        return found
    return replace(found, inputs=found.inputs.arranged(signature.form, signature.names))


def _as_tensors(batch: Any) -> Any:
    """The batch with tensors in place of NumPy's arrays."""
    if not any(isinstance(leaf, np.ndarray) for leaf in pytree.tree_leaves(batch)):
        return batch
    try:
        return pytree.tree_map(lambda x: _as_tensor(x) if isinstance(x, np.ndarray) else x, batch)
    except (TypeError, ValueError) as error:
        raise DataError(f"a batch holds an array that is no tensor: {error}") from error


def _as_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """An array as a tensor; a copy where PyTorch cannot share its steps or its order of bytes."""
    if any(step < 0 or step % array.itemsize for step in array.strides if array.itemsize):
        array = array.copy(order="C")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _split(batch: Any, signature: Signature, supervised: bool) -> Batch:
    if isinstance(batch, Tensor | ExampleInputs):
        return Batch(as_inputs(batch), None)
    if isinstance(batch, Mapping):
        return _split_mapping(batch, signature)
    if not isinstance(batch, tuple | list) or not batch:
        raise DataError(
            f"cannot read a batch of type {type(batch).__name__}; give tensors, (inputs, target), "
            "or dicts with the names of the model's parameters"
        )
    size = len(batch)
    if size == 2 and isinstance(batch[0], Mapping):
        return Batch(_split_mapping(batch[0], signature).inputs, batch[1])
    if size == 2 and isinstance(batch[0], tuple | list):
        if signature.most == 1:
            return Batch(ExampleInputs((batch[0],)), batch[1])
        return Batch(ExampleInputs(tuple(batch[0])), batch[1])
    fits = signature.required <= size <= signature.most
    if fits and not supervised and size != signature.required + 1:
        return Batch(ExampleInputs(tuple(batch)), None)
    if signature.required <= size - 1 <= signature.most:
        return Batch(ExampleInputs(tuple(batch[:-1])), batch[-1])
    if fits:
        return Batch(ExampleInputs(tuple(batch)), None)
    raise DataError(
        f"the batch has {size} parts ({_describe(batch)}), but the model takes "
        f"{signature.required} to {signature.most} inputs"
    )


def _split_mapping(batch: Mapping[Any, Any], signature: Signature) -> Batch:
    names = set(signature.names)
    inputs = {str(k): v for k, v in batch.items() if k in names}
    rest = {str(k): v for k, v in batch.items() if k not in names}
    if not inputs:
        raise DataError(
            f"none of the batch's keys ({', '.join(map(str, batch))}) is a parameter of the model "
            f"({', '.join(signature.names)})"
        )
    target = None if not rest else next(iter(rest.values())) if len(rest) == 1 else rest
    return Batch(ExampleInputs((), inputs), target)


def _describe(batch: Any) -> str:
    leaves = pytree.tree_leaves(batch)
    return ", ".join(
        str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in leaves[:6]
    )


def check_constants(inputs: ExampleInputs, expected: ExampleInputs) -> None:
    """Check that what is no tensor is what the model was captured with.

    Raises:
        DataError: If a number, a flag or a text differs.
    """
    found, captured = _constants(inputs), _constants(expected)
    for name, value in captured.items():
        if found.get(name, value) != value:
            raise DataError(
                f"the model was captured with {name} = {value!r}, and is given {found[name]!r}: "
                "what is no tensor stands in the graph, so that it is the same for all inputs; "
                "quantize a model for each value"
            )


def keep_constants(model: GraphModule, expected: ExampleInputs) -> None:
    """Let a model refuse numbers, flags and texts that it was not captured with."""
    known = any(isinstance(h, _Constants) for h in model._forward_pre_hooks.values())
    if _constants(expected) and not known:
        model.register_forward_pre_hook(_Constants(expected), with_kwargs=True)


@dataclass(frozen=True)
class _Constants:
    """A hook that looks at what a model is called with."""

    expected: ExampleInputs

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check_constants(ExampleInputs(args, kwargs), self.expected)


def _constants(inputs: ExampleInputs) -> dict[str, Any]:
    """Numbers, flags and texts by their place among the inputs."""
    args = {f"input {i}": value for i, value in enumerate(inputs.args)}
    kinds = (bool, int, float, str)
    return {
        f"{name}{pytree.keystr(path)}": leaf
        for name, value in {**args, **inputs.kwargs}.items()
        for path, leaf in pytree.tree_flatten_with_path(value)[0]
        if isinstance(leaf, kinds)
    }


def first_batch(data: Iterable[Any], name: str) -> Any:
    """The first batch of re-iterable data.

    Raises:
        DataError: If the data is empty or can be iterated only once, or is one tensor.
    """
    if isinstance(data, Tensor):
        raise DataError(
            f"{name} is a tensor of shape {tuple(data.shape)}, whose rows would be taken for "
            "batches; give batches: [tensor], tensor.split(64), or a DataLoader"
        )
    if isinstance(data, Iterator):
        raise DataError(
            f"{name} can be iterated only once (it is a {type(data).__name__}), but it is needed "
            "in every epoch; give a list, a DataLoader, or an object with __iter__"
        )
    if not isinstance(data, Iterable):
        raise DataError(f"{name} must be an iterable of batches, not a {type(data).__name__}")
    for batch in _guarded(data, name):
        return batch
    raise DataError(f"{name} is empty: it has no batches")


def _guarded(data: Iterable[Any], name: str) -> Iterator[Any]:
    """Batches; what their source raises is an error that says where."""
    done = 0
    try:
        for batch in data:
            yield batch
            done += 1
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise DataError(
            f"{name} failed at batch {done + 1}: {type(error).__name__}: {error}"
        ) from error


def batch_count(data: Iterable[Any]) -> int:
    """Batches per epoch: from `len`, else counted in one pass."""
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in _guarded(data, "the data"))


def example_inputs_of(
    model: nn.Module | ExportedProgram, given: Any, data: Iterable[Any] | None, supervised: bool
) -> ExampleInputs:
    """Inputs to trace the model with: given, its own, or the first batch's.

    Args:
        model: The user's model.
        given: What the user passed: a tensor, a tuple of positional or a dict of keyword arguments.
        data: Batches to take them from, if nothing was given.
        supervised: Whether batches carry a target.

    Raises:
        DataError: If the shapes of the inputs cannot be known; the message says what to pass.
    """
    if not isinstance(model, nn.Module | ExportedProgram):
        raise DataError(
            f"the model must be a torch.nn.Module or an ExportedProgram, not {type(model).__name__}"
        )
    if given is not None:
        return as_inputs(given)
    if data is not None:
        batch = first_batch(data, "the data")
        return split_batch(batch, Signature.of(model), supervised).inputs
    own = _own_inputs(model)
    if own is None:
        raise DataError(
            f"the input shapes of {type(model).__name__} are not known; pass example_inputs= (a "
            "tensor, a tuple of positional or a dict of keyword arguments) or train_data"
        )
    return own


def as_inputs(given: Any) -> ExampleInputs:
    """A tensor, a tuple or list of positional, or a dict of keyword arguments, as inputs."""
    if isinstance(given, ExampleInputs):
        return given
    if isinstance(given, Mapping):
        return ExampleInputs((), dict(given))
    return ExampleInputs(tuple(given) if isinstance(given, tuple | list) else (given,))


def _own_inputs(model: nn.Module | ExportedProgram) -> ExampleInputs | None:
    if isinstance(model, ExportedProgram):
        example = model.example_inputs
        return ExampleInputs(tuple(example[0]), dict(example[1])) if example else None
    for name in ("example_input_array", "dummy_inputs"):  # Lightning, Transformers
        own = getattr(model, name, None)
        if own is not None:
            return as_inputs(own)
    if isinstance(model, torch.fx.GraphModule):
        values = [_traced_value(n) for n in model.graph.nodes if n.op == "placeholder"]
        if values and all(v is not None for v in values):
            return ExampleInputs(tuple(values))
    return None


def _traced_value(node: torch.fx.Node) -> Tensor | None:
    found = node.meta.get("val", node.meta.get("tensor_meta", node.meta.get("example_value")))
    if found is None or not hasattr(found, "shape"):
        return None
    shape = [int(size) for size in found.shape]
    return _random_like(torch.empty(shape, dtype=found.dtype, device="meta"), torch.Generator())


class SyntheticBatches:
    """Random inputs in the form of example inputs: normal numbers, and integers as in the example.

    Args:
        inputs: The example.
        seed: Seed of the generator; no global random state is touched.
        batches: How many per epoch.
    """

    def __init__(self, inputs: ExampleInputs, seed: int, batches: int = _SYNTHETIC_BATCHES) -> None:
        self._inputs = inputs
        self._seed = seed
        self._batches = batches

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(self._seed)
        for _ in range(self._batches):
            yield self._inputs.map(lambda t: _random_like(t, generator).to(t.device))


def _random_like(example: Tensor, generator: torch.Generator) -> Tensor:
    if example.is_floating_point():
        return torch.randn(example.shape, generator=generator).to(example.dtype)
    if example.is_complex():
        return torch.randn(example.shape, generator=generator, dtype=torch.complex64)
    if example.device.type == "meta" or example.numel() == 0:
        return torch.zeros(example.shape, dtype=example.dtype)
    pick = torch.randint(example.numel(), example.shape, generator=generator)
    return example.detach().cpu().reshape(-1)[pick]


def calibration_batches(
    data: Iterable[Any], signature: Signature, supervised: bool, count: int, device: torch.device
) -> list[ExampleInputs]:
    """The inputs of the first `count` batches.

    Raises:
        DataError: If the data cannot be iterated, or a batch does not fit the model.
    """
    batches = islice(_guarded(data, "the data"), count)
    return [split_batch(raw, signature, supervised).inputs.to(device) for raw in batches]
