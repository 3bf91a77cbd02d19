"""Shape propagation of a graph that is not trusted: it computes nothing and ends.

A graph from a file can ask for tensors of any size, for a list with an entry per row of one, or for
numbers with more digits than memory has room for. On fake tensors sizes cost nothing by themselves;
what does cost is counted here, and refused beyond what models need.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from cgmq_fx.cost_models.errors import ArtifactError

_CALLS_PER_NODE = 64
_CALLS = 4096
_LISTED = 1 << 14
_LISTED_PER_NODE = 16
_RANK = 32
_ELEMENTS = 1 << 40
_NUMBER = 1 << 63
_EXPONENT = 64
_ROUNDING = 64
_OPERANDS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool, slice, Tensor)


class WorkGuard(TorchDispatchMode):
    """Counts the ops that a graph comes down to, and the tensors that its ops list.

    Args:
        nodes: Nodes of the graph.
    """

    def __init__(self, nodes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls = _CALLS + _CALLS_PER_NODE * nodes
        self._listed = _LISTED + _LISTED_PER_NODE * nodes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count one op, then do it."""
        self.count(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def count(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Count one op; an op that comes down to others lists its tensors before it gets there.

        Raises:
            ArtifactError: If the graph asks for more than any model does.
        """
        given = _arguments(func, args, kwargs)
        self._calls -= 1
        self._listed -= _parts(func, given)
        if min(self._calls, self._listed) < 0 or abs(given.get("decimals", 0)) > _ROUNDING:
            raise ArtifactError(f"the graph asks for too much work at {func}")


def _arguments(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _parts(func: Any, given: Mapping[str, Any]) -> int:
    """At most how many tensors an op lists: 0 for one that returns no list."""
    if not any("List" in str(r.type) for r in func._schema.returns):
        return 0
    source = next((value for value in given.values() if isinstance(value, Tensor)), None)
    if source is None or source.dim() == 0:
        return 1
    axis = given.get("dim", 0)
    asked: int = max(given.get("sections", 0), given.get("chunks", 0))
    valid = isinstance(axis, int) and -source.dim() <= axis < source.dim()
    size = int(source.shape[axis]) if valid else max(source.shape)
    each = given.get("split_size", given.get("split_sizes", 1))
    if isinstance(each, Sequence):
        return len(each)
    if asked:
        return asked
    return -(-size // each) if isinstance(each, int) and each > 0 else size


def check_arithmetic(function: Any, args: Sequence[Any]) -> None:
    """Refuse arithmetic on what is no number: Python's also repeats lists and formats text.

    Args:
        function: A function of `operator`, `math` or on sizes, not an ATen op.
        args: What it is called with.

    Raises:
        ArtifactError: If an argument or an exponent is not what graphs hold.
    """
    values = args
    if function in (operator.getitem, torch.sym_sum):
        values = pytree.tree_leaves(args[1:] if function is operator.getitem else args)
    if not all(value is None or isinstance(value, _OPERANDS) for value in values):
        raise ArtifactError(f"{function.__name__} is called with what is no number")
    high = any(isinstance(v, int) and abs(v) > _EXPONENT for v in values[1:])
    if function is operator.pow and high:
        raise ArtifactError("the graph holds a power that is too high")


def check_value(node: Node, value: Any) -> None:
    """Refuse what no model holds: numbers beyond 64 bits, tensors of absurd rank or size.

    Args:
        node: What gave the value.
        value: Fake tensors, numbers, and tuples of them.

    Raises:
        ArtifactError: Naming the node.
    """
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            fits = leaf.dim() <= _RANK and leaf.numel() <= _ELEMENTS
        else:
            fits = not isinstance(leaf, int) or abs(leaf) <= _NUMBER
        if not fits:
            raise ArtifactError(f"{node.name} gives more than an artifact can hold")
