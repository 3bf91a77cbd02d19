"""Rounded tensors are not kept for the backward pass: they are rounded again when it needs them.

The ops that read a rounded tensor would keep it, besides the tensor that the quantizer keeps for
its own gradient: twice the activations of the float model. They keep how to make it instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import GraphModule

_MARK = "_cgmq_fx_rounding"


class Kept(NamedTuple):
    """A rounded tensor, or a view of one.

    Attributes:
        rounding: What makes the tensor.
        shape: Size, strides and offset of the view; None for the tensor itself.
    """

    rounding: Callable[[], Tensor]
    shape: tuple[torch.Size, tuple[int, ...], int] | None


def remember(rounded: Tensor, rounding: Callable[[], Tensor]) -> None:
    """Take note how `rounded` can be made again; it then need not be kept."""
    setattr(rounded, _MARK, rounding)


def pack(tensor: Tensor) -> Tensor | Kept:
    """What is kept for `tensor`."""
    rounding = getattr(tensor, _MARK, None)
    if rounding is not None:
        return Kept(rounding, None)
    base = tensor._base
    rounding = getattr(base, _MARK, None)
    if base is None or rounding is None or tensor.dtype != base.dtype:
        return tensor
    return Kept(rounding, (tensor.size(), tensor.stride(), int(tensor.storage_offset())))


def unpack(kept: Tensor | Kept) -> Tensor:
    """The tensor that `pack` was given."""
    if isinstance(kept, Tensor):
        return kept
    with torch.no_grad():
        rounded = kept.rounding()
        return rounded if kept.shape is None else rounded.as_strided(*kept.shape)


def recompute_rounded(module: GraphModule) -> None:
    """Have every forward pass of `module` keep how to round instead of what was rounded.

    Copies of the module do not do so. `torch.compile` decides on its own what it keeps.
    """
    open_hooks: list[saved_tensors_hooks] = []

    def enter(*_: Any) -> None:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            open_hooks.append(saved_tensors_hooks(pack, unpack))
            open_hooks[-1].__enter__()

    def leave(*_: Any) -> None:
        if not torch.compiler.is_compiling() and open_hooks:
            open_hooks.pop().__exit__()

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)
