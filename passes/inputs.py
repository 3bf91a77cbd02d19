"""Example inputs: what a model is traced with, and which of their axes is the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class ExampleInputs:
    """Arguments that the model can be called with.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        batched: For each of `tensors`, whether its dimension 0 is the batch, once that was found
            out from the model; None before.
        fixed: Whether the model takes this batch size only, as far as that is known.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    batched: tuple[bool, ...] | None = None
    fixed: bool = False

    @property
    def leaves(self) -> list[Any]:
        """All leaves of the arguments, in order."""
        return pytree.tree_leaves((self.args, dict(self.kwargs)))

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors in the arguments, in order."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def batch(self) -> int | None:
        """The batch size, or None if there is no batch.

        Before `batched` is known, it is what dimension 0 of the tensors has in common. Masks (of
        booleans, or square matrices) may do without a batch if the other tensors agree, and so may
        all that have fewer dimensions than the largest: a scale per channel, say.
        """
        if self.batched is not None:
            own = [t for t, batched in zip(self.tensors, self.batched, strict=True) if batched]
            return _common_size(own)
        widest = max((t.dim() for t in self.tensors), default=0)
        agreed = self._agreed
        if agreed is not None:
            return agreed
        return _common_size([t for t in self.tensors if t.dim() == widest])

    @property
    def agrees(self) -> bool:
        """Whether all tensors but masks have the same size in dimension 0."""
        return self._agreed is not None

    @property
    def _agreed(self) -> int | None:
        shaped = [t for t in self.tensors if t.dim() > 0]
        found = _common_size(shaped)
        return found if found is not None else _common_size([t for t in shaped if not _masks(t)])

    @property
    def axes(self) -> tuple[bool, ...]:
        """`batched`, or what it would be by the sizes alone."""
        if self.batched is not None:
            return self.batched
        batch = self.batch
        return tuple(t.dim() > 0 and t.shape[0] == batch for t in self.tensors)

    def to(self, device: torch.device) -> ExampleInputs:
        """The same with all tensors on `device`, detached, and none of them of inference mode."""
        return self.map(lambda t: (t.clone() if t.is_inference() else t.detach()).to(device))

    def doubled(self) -> tuple[ExampleInputs, ...]:
        """A batch of 1 repeated to 2: export takes a size of 1 for a constant.

        Returns:
            What may be the same with two samples: all tensors with a batch repeated, or only those
            of most dimensions, as a scale of shape (1,) has none. Empty for any other batch.
        """
        if self.batch != 1:
            return ()
        widest = max(t.dim() for t in self.tensors)
        found = self._map_batched(lambda t: torch.cat([t, t]))
        least = self._map_batched(lambda t: torch.cat([t, t]) if t.dim() == widest else t)
        return (found,) if found.axes == least.axes else (found, least)

    @property
    def twice(self) -> ExampleInputs | None:
        """What has the shapes of twice as many samples, but no memory; None if there is no such."""
        if self.fixed or self.batch in (None, 1):
            return None
        return self._map_batched(lambda t: t.new_zeros(()).expand(2 * len(t), *t.shape[1:]))

    def rows(self, start: int, stop: int) -> ExampleInputs:
        """The same with these samples of the batch only."""
        return self._map_batched(lambda t: t[start:stop])

    def _map_batched(self, function: Callable[[Tensor], Tensor]) -> ExampleInputs:
        axes = iter(self.axes)
        return self.map(lambda t: function(t) if next(axes) else t)

    def arranged(self, like: ExampleInputs, names: Sequence[str]) -> ExampleInputs:
        """The same arguments in the form of others: positional where those are, in their order.

        Args:
            like: The others.
            names: Names of the positional parameters, at least.

        Returns:
            The arguments as they are if they are not the same ones.
        """
        own, others = self._by_name(names), like._by_name(names)
        if own.keys() != others.keys():
            return self
        values = _ordered(own, others)
        args = tuple(values[name] for name in names[: len(like.args)])
        found = ExampleInputs(args, {name: values[name] for name in like.kwargs})
        same = len(found.tensors) == len(like.tensors)
        return replace(found, batched=like.batched if same else None)

    def _by_name(self, names: Sequence[str]) -> dict[str, Any]:
        return {**dict(zip(names, self.args, strict=False)), **self.kwargs}

    def map(self, function: Callable[[Tensor], Tensor]) -> ExampleInputs:
        """The same with `function` applied to every tensor."""

        def apply(leaf: Any) -> Any:
            return function(leaf) if isinstance(leaf, Tensor) else leaf

        args, kwargs = pytree.tree_map(apply, (self.args, dict(self.kwargs)))
        return replace(self, args=args, kwargs=kwargs)


def _ordered(value: Any, like: Any) -> Any:
    """A value whose dicts have their keys in the order of another's, where they have the same."""
    if type(value) is dict and isinstance(like, Mapping) and value.keys() == like.keys():
        return {key: _ordered(value[key], own) for key, own in like.items()}
    return value


def _common_size(tensors: Sequence[Tensor]) -> int | None:
    """The size of dimension 0 that all of the tensors have, or None."""
    sizes = {int(t.shape[0]) if t.dim() else None for t in tensors}
    return sizes.pop() if len(sizes) == 1 else None


def _masks(tensor: Tensor) -> bool:
    """Whether a tensor may be a mask."""
    return tensor.dtype == torch.bool or (tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1])
