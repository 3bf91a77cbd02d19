"""Checks of what a file says before torch prints it: a graph becomes Python source that is run.

Names, paths, keyword names and strings end up in that source, and ops are what it calls, so each is
checked to be nothing else. The same checks run when a graph is written, so what is written loads.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from keyword import iskeyword
from typing import Any
from unicodedata import normalize

import torch
from torch.fx import Graph

from cgmq_fx.cost_models.errors import ArtifactError
from cgmq_fx.passes.oplists import FREE

_FORBIDDEN = frozenset(
    {
        "data",
        "from_file",
        "gru",
        "gru_cell",
        "lstm",
        "lstm_cell",
        "record_stream",
        "resize",
        "resize_",
        "resize_as",
        "resize_as_",
        "rnn_relu",
        "rnn_relu_cell",
        "rnn_tanh",
        "rnn_tanh_cell",
        "set",
        "set_",
        "set_data",
    }
)
"""Ops that reach storages, or crash on wrong arguments; recurrent layers are unrolled before."""

_UNSAFE_TYPES = ("Storage", "Stream", "QScheme", "Dict", "__torch__")
NAMESPACES = frozenset({"aten", "cgmq_fx"})
_PART = re.compile(r"[\w-]+")
_MAX_PARTS = 64
_MAX_NAME = 4096
_KINDS: tuple[tuple[str, type], ...] = (
    ("ScalarType", torch.dtype),
    ("Layout", torch.layout),
    ("MemoryFormat", torch.memory_format),
    ("Device", torch.device),
)
"""Types of arguments that torch also takes as a number, and then looks up without a check."""

_SHADOWS = frozenset(["self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree"])
"""What the source that torch prints needs under these names."""


def identifier(name: Any) -> str:
    """A Python identifier that reads as it stands: Python normalises those in source."""
    if (
        not isinstance(name, str)
        or not name.isidentifier()
        or normalize("NFKC", name) != name
        or len(name) > _MAX_NAME
    ):
        raise ArtifactError(f"{str(name)[:80]!r} is no name that an artifact can hold")
    return name


def argument_name(name: Any) -> str:
    """A name that a parameter of a printed function can have."""
    if iskeyword(identifier(name)) or name in _SHADOWS:
        raise ArtifactError(f"an artifact cannot hold an input named {name!r}")
    return str(name)


def tensor_path(name: Any) -> str:
    """A dotted path of names or numbers; torch puts parts that are no identifiers in quotes."""
    if (
        not isinstance(name, str)
        or name.count(".") >= _MAX_PARTS
        or not all(
            _PART.fullmatch(part) and normalize("NFKC", part) == part for part in name.split(".")
        )
    ):
        raise ArtifactError(f"{str(name)[:80]!r} is no path that an artifact can hold")
    return name


def plain_text(value: Any) -> str:
    """A string that is printed as such; torch drops source lines with its comment "# COUNTER"."""
    if not isinstance(value, str) or not value.isprintable() or "#" in value:
        raise ArtifactError(f"{str(value)[:80]!r} is no text that an artifact can hold")
    return value


def shown_text(value: Any) -> str:
    """A string that is only shown: it cannot move the cursor of a terminal."""
    if not isinstance(value, str) or not value.isprintable() or len(value) > _MAX_NAME:
        raise ArtifactError(f"{str(value)[:80]!r} is no text that an artifact can hold")
    return value


def check_overload(overload: torch._ops.OpOverload, libraries: Collection[str] = ()) -> None:
    """Refuse ops that reach beyond tensors: files, storages, and what is not an ATen kernel.

    Ops of other libraries are taken where the caller trusts these by name. `torch.ops.aten` also
    has TorchScript's functions, such as `aten.save`, which writes files; they have no kernel in the
    dispatcher. Private ops may trust their arguments without a check.
    """
    name, schema = overload._opname, overload._schema
    types = [str(a.type) for a in (*schema.arguments, *schema.returns)]
    private = name.startswith("_") and overload.namespace == "aten" and overload not in FREE
    if (
        overload.namespace not in (*NAMESPACES, *libraries)
        or name in _FORBIDDEN
        or private
        or any(unsafe in kind for kind in types for unsafe in _UNSAFE_TYPES)
        or not torch._C._dispatch_has_kernel(overload.name())
    ):
        raise ArtifactError(f"{overload} is not allowed in an artifact")


def libraries_of(graph: Graph) -> tuple[str, ...]:
    """The namespaces of the other libraries whose ops a graph calls."""
    called = [n.target for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    return tuple(sorted({op.namespace for op in called} - NAMESPACES))


def check_arguments(overload: torch._ops.OpOverload, args: Any, kwargs: Any) -> None:
    """Refuse a number where an op takes a dtype, a layout or the like."""
    for position, argument in enumerate(overload._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        for name, kind in _KINDS:
            if name in str(argument.real_type) and not isinstance(value, kind | None):
                raise ArtifactError(f"{overload} is called with {value!r} as its {argument.name}")
