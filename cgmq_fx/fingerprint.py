"""What a user's function is: by name and options, by its code, and by what that code reads.

A name alone does not tell: it is one for every `functools.partial`, for all objects of a class, and
for what was changed in a file between two runs. Whatever is told has to be the same in another
process, so that no address and no order of a set may get in.
"""

from __future__ import annotations

import copyreg
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from enum import Enum
from functools import partial
from hashlib import sha256
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.jit import ScriptFunction, ScriptModule

from cgmq_fx.own_code import is_own, name_of_code, read_by

_DIGITS = 16
_MOST_TEXT = 180
_DEPTH = 32
_MOST = 100_000
"""How many objects are told of; those beyond, or too deep, are known by their class."""

_PLAIN = (
    *(type(None), type(...), bool, int, float, complex, str),
    *(torch.dtype, torch.layout, torch.memory_format),
)
_WRAPPED = (
    *("__func__", "__self__", "__wrapped__", "__closure__", "fget", "fset"),
    *("func", "args", "keywords", "cell_contents", "co_code", "co_names", "co_varnames"),
    "co_consts",
)
"""What tells what methods, decorators, cells and code of Python's own are."""

_OF_MODULES = frozenset(vars(nn.Module()))
"""Attributes that all modules have, such as hooks, which are numbered through."""

_PLACES = re.compile(r" #.*|___torch_mangle_\d+\.")
"""In the graph of a script: lines of source, and numbers that keep classes apart."""


def fingerprint(**values: Any) -> dict[str, str | None]:
    """What functions, or any objects, are, by their names; then the parts of the code behind them.

    An object is known by its class and its attributes; one that is neither callable nor compared by
    value by its class alone, if it is a package's, or a loader or writer. Functions and classes
    that are the user's own are known by their code and by all that it reads, with what that reads;
    those of installed packages by name and version.

    Long ones end in a digest.
    """
    return _Teller().parts(values)


def short(content: str | bytes) -> str:
    """A short digest."""
    plain = content.encode(errors="replace") if isinstance(content, str) else content
    return sha256(plain).hexdigest()[:_DIGITS]


def tensor_digest(tensor: Tensor) -> str:
    """The shape of a tensor and a digest of its numbers."""
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{tuple(tensor.shape)} {short(plain.numpy().tobytes())}"


class _Teller:
    """Tells of one value; what it meets again (it may go in circles) it tells by a number."""

    def __init__(self, met: Mapping[int, tuple[int, Any]] | None = None) -> None:
        self._met = dict(met or {})  # keeps them alive: addresses are used again
        self._code: list[FunctionType | type] = []  # told at the end: calls go deeper than data
        self._count = 0

    def parts(self, values: Mapping[str, Any]) -> dict[str, str | None]:
        """All that tells what values are."""
        parts = {name: None if own is None else self._cut(own, 0) for name, own in values.items()}
        for code in self._code:  # grows meanwhile
            read = read_by(code)
            for name in sorted(read):
                part = f"{name} of {name_of_code(code)}"
                part += f" #{self._met[id(code)][0]}" if part in parts else ""  # as lambdas are
                parts[part] = self._cut(read[name], 1)
        return parts

    def _cut(self, value: Any, depth: int) -> str:
        text = self._told(value, depth)
        return text if len(text) <= _MOST_TEXT else f"{text[: _MOST_TEXT // 2]}... {short(text)}"

    def _told(self, value: Any, depth: int) -> str:
        """A value as text, code by its name; `depth` is 0 for what is asked about."""
        if type(value) in _PLAIN:
            return repr(value)
        self._count += 1
        if isinstance(value, ModuleType):
            return value.__name__
        code = isinstance(value, FunctionType | BuiltinFunctionType | type)
        if self._count > _MOST and not code:
            return type(value).__qualname__
        name = name_of_code(value if code else type(value))
        if id(value) in self._met:
            return f"#{self._met[id(value)][0]}"
        if type(value) not in (tuple, frozenset):
            self._met[id(value)] = len(self._met), value
        if isinstance(value, FunctionType | type) and is_own(value):
            self._code.append(value)
        elif not isinstance(value, type) and depth <= _DEPTH:
            with suppress(Exception):  # whatever its members say to being asked
                return self._whole(name, value, depth)
        return name

    def _whole(self, name: str, value: Any, depth: int) -> str:
        if isinstance(value, Tensor):
            return f"{value.dtype} {tensor_digest(value)}"
        if isinstance(value, bytes):
            return short(value)
        if isinstance(value, torch.device):
            return value.type  # each process may have its own
        if type(value) in (set, frozenset):
            return f"{name}({', '.join(sorted(map(self._alone, value)))})"
        items, named = _held(value, asked=depth == 0)
        if is_own(type(value)) and not isinstance(value, FunctionType):
            name = self._told(type(value), depth)
        inner = 0 if isinstance(value, MethodType) else depth + 1
        own = [self._told(item, inner) for item in items]
        own += [f"{part}={self._told(named[part], inner)}" for part in sorted(named, key=str)]
        return f"{name}({', '.join(own)})" if own else name

    def _alone(self, value: Any) -> str:
        """A value that has no place among others."""
        plain = type(value) in _PLAIN
        return repr(value) if plain else str(_Teller(self._met).parts({"item": value}))


def _held(value: Any, *, asked: bool) -> tuple[Iterable[Any], Mapping[str, Any]]:
    """What makes a value what it is, apart from its class: items, and more by name."""
    kind: Any = type(value)
    if isinstance(value, ScriptFunction):
        return (_graph(value),), {}
    if isinstance(value, nn.Module):
        return (), _attributes(value)
    if isinstance(value, partial):
        return (value.func, *value.args), value.keywords
    if kind in (tuple, list):
        return value, {}
    if kind is dict:
        return sorted(value.items(), key=_order), {}
    if kind.__module__ in ("builtins", "functools"):
        wrapped = [getattr(value, name) for name in _WRAPPED if hasattr(value, name)]
        if wrapped:
            return [part for part in wrapped if part is not None], {}
    if callable(value):
        telling = not _is_compiler(value)
    elif kind.__eq__ is not object.__eq__ or isinstance(value, Enum):
        telling = not hasattr(kind, "close")  # a progress bar
    else:
        telling = is_own(kind) and not hasattr(kind, "close") and not hasattr(kind, "__iter__")
    return _kept(value) if asked or telling else ((), {})


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The options, parameters, buffers and children of a module, by name."""
    options = {} if _is_compiler(module) else vars(module)
    if isinstance(module, GraphModule):
        options = {"code": module.code}
    elif isinstance(module, ScriptModule):
        options = {"code": _graph(module)}
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    named = {**options, **dict(tensors), **dict(module.named_children())}
    return {name: own for name, own in named.items() if name not in _OF_MODULES}


def _graph(script: Any) -> str:
    return _PLACES.sub("", str(script.inlined_graph))


def _is_compiler(value: Any) -> bool:
    """Whether an object is one of `torch.compile`, which keeps what it has compiled."""
    return type(value).__module__.startswith("torch._dynamo")


def _kept(value: Any) -> tuple[Iterable[Any], Mapping[str, Any]]:
    """What it takes to make an object again: arguments and items, and attributes by name."""
    reduce = copyreg.dispatch_table.get(type(value))
    try:
        reduced = value.__reduce_ex__(2) if reduce is None else reduce(value)
    except Exception:  # noqa: BLE001 - it is not made to be kept
        return (), vars(value)
    if isinstance(reduced, str):  # the name of a global
        return (reduced,), {}
    make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
    known = (type(value), copyreg.__newobj__)  # type: ignore[attr-defined]
    made = [part for part in (make, *arguments) if not any(part is own for own in known)]
    made += [*(items or ()), *sorted(pairs or (), key=_order)]
    states = state if isinstance(state, tuple) else (state,)  # attributes, and slots
    if any(part is not None and not isinstance(part, dict) for part in states):
        return [*made, state], {}
    return made, {name: own for part in states for name, own in (part or {}).items()}


def _order(pair: tuple[Any, Any]) -> str:
    return repr(pair[0]) if type(pair[0]) in _PLAIN else ""
