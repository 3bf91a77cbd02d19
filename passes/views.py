"""Views: where a tensor lies in the memory of another, and how to write there by value."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import SymInt, Tensor
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from cgmq_fx.passes.aliases import memory_path, writes
from cgmq_fx.passes.oplists import overloads
from cgmq_fx.passes.optable import argument, is_whole_slice
from cgmq_fx.passes.state import value_of

_ATEN = torch.ops.aten
_RESHAPES = overloads("view reshape flatten unflatten squeeze unsqueeze view_as reshape_as")
_SELF_INVERSE = overloads("transpose swapaxes swapdims t numpy_T mT")
_MOVES = overloads("movedim")
_IDENTITIES = overloads("alias contiguous")
_SPLITS = overloads("split chunk split_with_sizes unbind tensor_split")
_VIEWS = (
    _RESHAPES
    | _SELF_INVERSE
    | _IDENTITIES
    | _SPLITS
    | overloads(
        """
        select slice narrow diagonal permute movedim expand expand_as unfold
        view_as_real view_as_complex real imag
        """
    )
)
"""Ops that can be done again, on what their argument has become."""

_SOMETIMES = overloads("reshape reshape_as flatten contiguous")
"""Views that copy where they must; torch.export has seen whether they do."""

OF_SHAPE = overloads(
    "squeeze_ unsqueeze_ t_ transpose_ swapaxes_ swapdims_ resize_ resize_as_ as_strided_ set_"
) | overloads("detach_ requires_grad_ rename_")
"""In-place ops that change what a tensor is, not what is in its memory."""

Inverse: TypeAlias = Callable[[Graph, Node], Node]
"""Makes, of what a view shall be, what the tensor that is viewed has to be."""


def is_certain_view(node: Node) -> bool:
    """Whether a node certainly shares the memory of its first argument, and can be done again."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return False
    if writes(node):
        return node.target not in OF_SHAPE
    if node.target is operator.getitem:
        return source.target in _SPLITS
    return node.target in _VIEWS and (node.target not in _SOMETIMES or bool(_shares(node, source)))


def _shares(node: Node, source: Node) -> bool | None:
    """Whether a view that copies where it must shares memory; None if that is not known."""
    made, own = result_of(node, node.target), value_of(source)
    if made is None or not isinstance(own, Tensor):
        return None
    return bool(made.untyped_storage()._cdata == own.untyped_storage()._cdata)


def result_of(node: Node, target: Any) -> Tensor | None:
    """What an op would return for the arguments of a node, without data; None if none can tell."""
    args, kwargs = map_arg((node.args, node.kwargs), value_of)
    mode = detect_fake_mode(value_of(node))
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if mode is None or any(detect_fake_mode(tensor) is not mode for tensor in tensors):
        return None
    try:
        with mode, torch.no_grad():
            made = target(*args, **kwargs)
    except RuntimeError:  # what depends on values
        return None
    return made if isinstance(made, Tensor) else None


def certain_path(node: Node) -> list[Node]:
    """`node`, what it is a view of, and so on to the node that made the memory."""
    path = memory_path(node)
    for i, view in enumerate(path[:-1]):
        if view.target in _SOMETIMES and _shares(view, path[i + 1]) is False:
            return path[: i + 1]
    return path


def place_of(node: Node) -> tuple[Any, ...] | None:
    """The memory that a tensor lies in, and where; None if that cannot be told."""
    path = certain_path(node)
    if not all(map(is_certain_view, path[:-1])):
        return None
    moving = [v for v in path[:-1] if not (writes(v) or is_whole_slice(v))]
    return path[-1], *((v.target, v.args[1:], v.kwargs) for v in moving)


def viewed(view: Node) -> Node:
    """The tensor that a view is of."""
    source = view.args[0]
    if view.target is operator.getitem and isinstance(source, Node):
        source = source.args[0]
    assert isinstance(source, Node)
    return source


def _sizes(node: Node) -> list[int] | None:
    """The sizes of a tensor with -1 for the one that is free, if they can be written like that."""
    value = value_of(node)
    free = [isinstance(size, SymInt) for size in value.shape]
    if sum(free) > 1 or (any(free) and 0 in value.shape):
        return None
    return [-1 if is_free else int(s) for s, is_free in zip(value.shape, free, strict=True)]


def call_like(graph: Graph, like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A call whose result has the shape and the dtype of `like`."""
    name = getattr(target, "_opname", None)
    node = graph.create_node("call_function", target, args, kwargs, name)
    node.meta = {
        k: v for k, v in like.meta.items() if k in ("val", "nn_module_stack", "stack_trace")
    }
    return node


def inverse_of(view: Node) -> Inverse | None:
    """How to write into a view's tensor without writing in place, or None if that is not known."""
    whole, target, rest = viewed(view), view.target, view.args[1:]
    if target in _IDENTITIES or writes(view) or is_whole_slice(view):
        return lambda _, new: new
    if view.kwargs:
        return None
    if target in _SELF_INVERSE:
        return lambda graph, new: call_like(graph, whole, target, new, *rest)
    if target is _ATEN.permute.default:
        order: Any = argument(view, "dims")
        back = sorted(range(len(order)), key=[d % len(order) for d in order].__getitem__)
        return lambda graph, new: call_like(graph, whole, target, new, back)
    if target in _MOVES:
        ends = argument(view, "destination"), argument(view, "source")
        return lambda graph, new: call_like(graph, whole, target, new, *ends)
    if target in _RESHAPES:
        sizes = _sizes(whole)
        if sizes is None:
            return None
        return lambda graph, new: call_like(graph, whole, _ATEN.reshape.default, new, sizes)
    found = _scatter(view)
    if found is None:
        return None
    scatter, place = found
    return lambda graph, new: call_like(graph, whole, scatter, whole, new, *place)


def _scatter(view: Node) -> tuple[Any, tuple[Any, ...]] | None:
    """The op that writes a part of a tensor, and where that part lies."""
    if view.target is _ATEN.select.int:
        return _ATEN.select_scatter.default, view.args[1:]
    if view.target is _ATEN.slice.Tensor:
        return _ATEN.slice_scatter.default, view.args[1:]
    if view.target is _ATEN.diagonal.default:
        return _ATEN.diagonal_scatter.default, view.args[1:]
    if view.target is _ATEN.narrow.default:
        dim, start, length = (argument(view, name) for name in ("dim", "start", "length"))
        if isinstance(start, int) and isinstance(length, int) and start >= 0:
            return _ATEN.slice_scatter.default, (dim, start, start + length)
    if view.target is operator.getitem:
        return _part(view)
    return None


def _part(piece: Node) -> tuple[Any, tuple[Any, ...]] | None:
    """The same for one of the pieces that a tensor is split into."""
    parts, index = piece.args
    assert isinstance(parts, Node)
    pieces, dim = value_of(parts), argument(parts, "dim", 0)
    if not isinstance(pieces, list | tuple) or not isinstance(index, int):
        return None
    index %= len(pieces)
    if parts.target is _ATEN.unbind.int:
        return _ATEN.select_scatter.default, (dim, index)
    ends = [p.shape[dim] for p in pieces[: index + 1]]
    if not all(isinstance(size, int) for size in ends):
        return None
    return _ATEN.slice_scatter.default, (dim, sum(ends[:-1]), sum(ends))
