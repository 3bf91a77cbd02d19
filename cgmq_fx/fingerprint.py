"""What a user's function is: by name, by code, and by the options that it holds.

A name alone does not tell: it is one for every `functools.partial`, for all objects of a class, and
for all functions that another one makes. Whatever is told has to be the same in another process, so
that no address and no order of a set may get in.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterable, Mapping
from dis import get_instructions
from functools import partial
from hashlib import sha256
from sys import implementation
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

_DIGITS = 16
_MOST_TEXT = 180
_DEPTH = 16
_PLAIN = (type(None), type(...), bool, int, float, complex, str, bytes, torch.dtype)
_OF_MODULES = frozenset(vars(nn.Module()))
"""Attributes that all modules have, such as hooks, which are numbered through."""

_READING = ("LOAD_GLOBAL", "LOAD_NAME")


def name_of(value: Any) -> str | None:
    """A function, or any object, by name, code and options; None if there is none.

    A function is known by its code, with what it holds from outside: options that it is bound to,
    variables of the function that made it, globals that are plain values, tensors or callable, and
    other functions of its module. An object is known by its attributes, those that are neither
    callable nor compared by value (loaders, writers) by their class. Both hold for what is in them.

    Long ones end in a digest.
    """
    if value is None:
        return None
    text = _Teller().told(value)
    return text if len(text) <= _MOST_TEXT else f"{text[: _MOST_TEXT // 2]}... {short(text)}"


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

    def told(self, value: Any, depth: int = 0) -> str:
        """A value as text; `depth` is 0 for what is asked about."""
        if type(value) in _PLAIN:
            return repr(value)
        if isinstance(value, type | ModuleType) or depth > _DEPTH:
            return _named(value)
        if id(value) in self._met:
            return f"#{self._met[id(value)][0]}"
        if type(value) is not tuple:
            self._met[id(value)] = len(self._met), value
        try:
            return self._parts(value, depth + 1)
        except Exception:  # noqa: BLE001 - whatever its members say to being asked
            return _named(value)

    def _parts(self, value: Any, depth: int) -> str:
        if isinstance(value, FunctionType):
            return self._function(value, depth)
        if isinstance(value, MethodType):
            return f"{self.told(value.__func__, depth)} of {self.told(value.__self__)}"
        if isinstance(value, BuiltinFunctionType):
            return f"{value.__qualname__} of {self.told(value.__self__, depth)}"
        if isinstance(value, partial):
            given = (value.func, *value.args)
            return f"functools.partial{self._listed(given, value.keywords, depth)}"
        if isinstance(value, Tensor):
            return f"{value.dtype} {tensor_digest(value)}"
        if isinstance(value, torch.device):
            return value.type  # each process may have its own
        if type(value) in (list, tuple):
            return f"{type(value).__name__}{self._listed(value, {}, depth)}"
        if type(value) in (set, frozenset):
            return repr(sorted(_Teller(self._met).told(item, depth) for item in value))
        if type(value) is dict:
            return f"dict{self._listed(value.items(), {}, depth)}"
        equality: Any = type(value).__eq__
        by_value = equality is not object.__eq__
        telling = depth == 1 or by_value or (callable(value) and not _is_compiler(value))
        return self._object(value, depth) if telling else _named(value)

    def _listed(self, values: Iterable[Any], named: Mapping[str, Any], depth: int) -> str:
        own = [self.told(value, depth) for value in values]
        own += [f"{name}={self.told(named[name], depth)}" for name in sorted(named)]
        return f"({', '.join(own)})"

    def _function(self, function: FunctionType, depth: int) -> str:
        held = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        named = {name: _content(cell) for name, cell in held.items()}
        text = _named(function)
        if not _is_torch(function):
            text += f" {_code(function.__code__)}"
            named |= _globals(function)
            defaults = {"defaults": function.__defaults__, **(function.__kwdefaults__ or {})}
            named |= {name: value for name, value in defaults.items() if value is not None}
        return text + self._listed((), named, depth) if named else text

    def _object(self, value: Any, depth: int) -> str:
        code: Any = type(value).__call__ if callable(value) else None
        if isinstance(value, nn.Module):
            made, named, code = (), _attributes(value), type(value).forward
        else:
            made, named = _kept(value)
        text = _named(value) + (self._listed(made, named, depth) if made or named else "")
        own = isinstance(code, FunctionType) and not _is_torch(code)
        return f"{text} by {self.told(code, depth)}" if own else text


def _named(value: Any) -> str:
    """A module, class or function by name, anything else by the name of its class."""
    if isinstance(value, ModuleType):
        return value.__name__
    known = value if isinstance(value, type | FunctionType) else type(value)
    return f"{known.__module__}.{known.__qualname__}"


def _is_torch(function: FunctionType) -> bool:
    """Whether the version of PyTorch, which is told on its own, says what a function does."""
    return str(function.__globals__.get("__name__")).partition(".")[0] == "torch"


def _is_compiler(value: Any) -> bool:
    """Whether an object is one of `torch.compile`, which keeps what it has compiled."""
    return type(value).__module__.startswith("torch._dynamo")


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing has been put there yet
        return None


def _globals(function: FunctionType) -> dict[str, Any]:
    """The globals that a function reads and that tell what it does, by name."""
    found = {}
    for name in _reads(function.__code__) & function.__globals__.keys():
        value = function.__globals__[name]
        if isinstance(value, FunctionType):
            telling = value.__module__ == function.__module__
        else:
            called = callable(value) and not isinstance(value, type | BuiltinFunctionType)
            telling = called or type(value) in _PLAIN or isinstance(value, Tensor)
        if telling:
            found[name] = value
    return found


def _reads(code: CodeType) -> set[str]:
    """The names of globals that code reads, with the code of functions in it."""
    names = {str(i.argval) for i in get_instructions(code) if i.opname in _READING}
    return names.union(*(_reads(c) for c in code.co_consts if isinstance(c, CodeType)))


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The options, parameters, buffers and children of a module, by name."""
    options: dict[str, Any] = {n: v for n, v in vars(module).items() if n not in _OF_MODULES}
    if isinstance(module, GraphModule):
        options = {"code": module.code}
    elif _is_compiler(module):
        options = {}
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {**options, **dict(tensors), **dict(module.named_children())}


def _kept(value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What it takes to make an object again: arguments and items, and attributes by name."""
    reduced = value.__reduce_ex__(2)
    if isinstance(reduced, str):  # the name of a global
        return (reduced,), {}
    make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
    if make is copyreg.__newobj__:  # type: ignore[attr-defined]
        make, *arguments = arguments
    if not isinstance(state, tuple) or len(state) != 2:  # attributes and slots
        state = (state, None)
    parts = [part for part in state if isinstance(part, dict)]
    named = {str(name): own for part in parts for name, own in part.items()}
    others = [part for part in state if part is not None and not isinstance(part, dict)]
    given = () if make is type(value) else (make,)
    return (*given, *arguments, *others, *(items or ()), *(pairs or ())), named


def _code(code: CodeType) -> str:
    """A short digest of what code does: its instructions, names and constants."""
    constants = [_constant(c) for c in code.co_consts]
    return short(repr([implementation.cache_tag, code.co_code, code.co_names, constants]))


def _constant(value: Any) -> str:
    if isinstance(value, CodeType):
        return _code(value)
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)
