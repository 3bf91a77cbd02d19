"""Checks of what a file says before torch prints it: a graph becomes Python source that is run.

Names, paths, keyword names and strings end up in that source, and ops are what it calls, so each is
checked to be nothing else. The same checks run when a graph is written, so what is written loads.
"""

from __future__ import annotations

import re
from keyword import iskeyword
from typing import Any
from unicodedata import normalize

import torch

from cgmq_fx.cost_models.errors import ArtifactError
from cgmq_fx.passes.oplists import FREE

_FORBIDDEN = frozenset(
    {
        "data",
        "from_file",
        "record_stream",
        "resize",
        "resize_",
        "resize_as",
        "resize_as_",
        "set",
        "set_",
        "set_data",
    }
)
_UNSAFE_TYPES = ("Storage", "Stream", "QScheme", "Dict", "__torch__")
NAMESPACES = frozenset({"aten", "cgmq_fx"})
_PART = re.compile(r"[\w-]+")
_SHADOWS = frozenset(["self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree"])
"""What the source that torch prints needs under these names."""


def identifier(name: Any) -> str:
    """A Python identifier that reads as it stands: Python normalises those in source."""
    if not isinstance(name, str) or not name.isidentifier() or normalize("NFKC", name) != name:
        raise ArtifactError(f"{str(name)[:80]!r} is no name that an artifact can hold")
    return name


def argument_name(name: Any) -> str:
    """A name that a parameter of a printed function can have."""
    if iskeyword(identifier(name)) or name in _SHADOWS:
        raise ArtifactError(f"an artifact cannot hold an input named {name!r}")
    return str(name)


def tensor_path(name: Any) -> str:
    """A dotted path of names or numbers; torch puts parts that are no identifiers in quotes."""
    if not isinstance(name, str) or not all(
        _PART.fullmatch(part) and normalize("NFKC", part) == part for part in name.split(".")
    ):
        raise ArtifactError(f"{str(name)[:80]!r} is no path that an artifact can hold")
    return name


def plain_text(value: Any) -> str:
    """A string that is printed as such; torch drops source lines with its comment "# COUNTER"."""
    if not isinstance(value, str) or not value.isprintable() or "#" in value:
        raise ArtifactError(f"{str(value)[:80]!r} is no text that an artifact can hold")
    return value


def check_overload(overload: torch._ops.OpOverload) -> None:
    """Refuse ops that reach beyond tensors: files, storages, and what is not an ATen kernel.

    `torch.ops.aten` also has TorchScript's functions, such as `aten.save`, which writes files; they
    have no kernel in the dispatcher. Private ops may trust their arguments without a check.
    """
    name, schema = overload._opname, overload._schema
    types = [str(a.type) for a in (*schema.arguments, *schema.returns)]
    private = name.startswith("_") and overload.namespace == "aten" and overload not in FREE
    if (
        overload.namespace not in NAMESPACES
        or name in _FORBIDDEN
        or private
        or any(unsafe in kind for kind in types for unsafe in _UNSAFE_TYPES)
        or not torch._C._dispatch_has_kernel(overload.name())
    ):
        raise ArtifactError(f"{overload} is not allowed in an artifact")
