"""Example inputs: what a model is traced with, and which of their axes is the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

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
        """The batch size: what dimension 0 of the tensors has in common, or None.

        Masks (of booleans, or square matrices) may do without a batch if the other tensors agree.
        """
        shaped = [t for t in self.tensors if t.dim() > 0]
        for tensors in (shaped, [t for t in shaped if not _may_be_mask(t)]):
            sizes = {t.shape[0] for t in tensors}
            if len(sizes) == 1:
                return int(sizes.pop())
        return None

    def to(self, device: torch.device) -> ExampleInputs:
        """The same with all tensors on `device`, detached, and none of them of inference mode."""
        return self.map(lambda t: (t.clone() if t.is_inference() else t.detach()).to(device))

    def at_least_two(self) -> ExampleInputs:
        """The same with a batch of 1 repeated to 2: export takes a size of 1 for a constant."""
        if self.batch != 1:
            return self
        return self.map(lambda t: torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t)

    def map(self, function: Callable[[Tensor], Tensor]) -> ExampleInputs:
        """The same with `function` applied to every tensor."""

        def apply(leaf: Any) -> Any:
            return function(leaf) if isinstance(leaf, Tensor) else leaf

        return ExampleInputs(
            pytree.tree_map(apply, self.args), pytree.tree_map(apply, dict(self.kwargs))
        )


def _may_be_mask(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bool or (tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1])
