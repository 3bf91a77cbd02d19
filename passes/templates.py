"""Nested values with their tensors taken out, and put back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import SymInt, Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class _Slot:
    """The place of a tensor, or of a size that depends on the batch."""

    kind: type
    index: int


@dataclass(frozen=True)
class _Object:
    """An object without those of its attributes that hold tensors, and these."""

    value: Any
    fields: Mapping[str, Template]


@dataclass(frozen=True)
class Template:
    """A nested value with its tensors taken out.

    Attributes:
        spec: Its structure.
        leaves: Its leaves: slots, objects, constants.
    """

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]

    def same(self, other: Template) -> bool:
        """Whether the other value is equal but for its tensors."""
        if self.spec != other.spec or len(self.leaves) != len(other.leaves):
            return False
        return all(map(_same, self.leaves, other.leaves))


Values: TypeAlias = tuple[list[Tensor], list[Any]]
"""Tensors, and sizes that depend on the batch, in the order in which they were taken."""


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, _Object) and isinstance(other, _Object):
        return one.fields.keys() == other.fields.keys() and all(
            field.same(other.fields[name]) for name, field in one.fields.items()
        )
    return type(one) is type(other) and bool(one == other)


def take(value: Any, values: Values) -> Template:
    """Take the tensors out of a nested value: append them to `values`, return the rest."""
    leaves, spec = pytree.tree_flatten(value)
    return Template(spec, tuple(_taken(leaf, values) for leaf in leaves))


def _taken(leaf: Any, values: Values) -> Any:
    for kind, found in zip((Tensor, SymInt), values, strict=True):
        if isinstance(leaf, kind):
            found.append(leaf)
            return _Slot(kind, len(found) - 1)
    own = vars(leaf) if hasattr(leaf, "__dict__") and not isinstance(leaf, type | nn.Module) else {}
    fields: dict[str, Template] = {}
    for name, attribute in own.items():
        before = len(values[0])
        template = take(attribute, values)
        if len(values[0]) > before:
            fields[name] = template
    if not fields:
        return leaf
    shell = copy.copy(leaf)
    for name in fields:
        setattr(shell, name, None)
    return _Object(shell, fields)


def put(template: Template, values: Values) -> Any:
    """The inverse of `take`."""
    return pytree.tree_unflatten([_back(leaf, values) for leaf in template.leaves], template.spec)


def _back(leaf: Any, values: Values) -> Any:
    if isinstance(leaf, _Slot):
        return values[leaf.kind is SymInt][leaf.index]
    if isinstance(leaf, _Object):
        value = copy.copy(leaf.value)
        for name, field in leaf.fields.items():
            setattr(value, name, put(field, values))
        return value
    return leaf
