"""Code of the user's own, and what it reads: all that makes it do something else."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dis import Instruction, get_instructions
from importlib.util import find_spec
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

_VERSIONED = ("torch", "cgmq_fx", *sys.builtin_module_names)
"""Packages whose version is told on its own."""

_PYTHON = re.escape(str(Path(os.__file__).parent))
_INSTALLED = re.compile(rf"{_PYTHON}[/\\]|.*[/\\](site|dist)-packages[/\\]")
_READING = ("LOAD_GLOBAL", "LOAD_NAME")


def is_own(code: FunctionType | type | ModuleType) -> bool:
    """Whether a function, class or module is the user's: not Python's, nor an installed package's.

    What comes from no file, such as a notebook, is.
    """
    if isinstance(code, FunctionType):
        name = str(code.__globals__.get("__name__"))
    else:
        name = code.__name__ if isinstance(code, ModuleType) else str(code.__module__)
    if name.partition(".")[0] in _VERSIONED:
        return False
    file = getattr(sys.modules.get(name), "__file__", None)
    return name == "__main__" or file is None or not _INSTALLED.match(str(file))


def name_of_code(code: FunctionType | BuiltinFunctionType | type) -> str:
    """The name of a function or class, with the version of the package that it is from."""
    package = str(code.__module__).partition(".")[0]
    version = getattr(sys.modules.get(package), "__version__", None)
    own = isinstance(code, FunctionType | type) and is_own(code)
    name = f"{code.__module__}.{code.__qualname__}".removeprefix("builtins.")
    return name if version is None or own or package in _VERSIONED else f"{name} {version}"


def read_by(code: FunctionType | type) -> dict[str, Any]:
    """What a function or class of the user's consists of and reads, by name."""
    if isinstance(code, FunctionType):
        cells = zip(code.__code__.co_freevars, code.__closure__ or (), strict=True)
        more = {
            "default values": code.__defaults__,
            "keyword defaults": code.__kwdefaults__,
            "function attributes": vars(code),
        }
        given = {name: own for name, own in more.items() if own}
        return {**_globals(code), **dict(cells), "compiled code": code.__code__, **given}
    members = {
        name: own
        for name, own in vars(code).items()  # without notes of Python's, such as documentation
        if not name.startswith("__") or callable(own) or isinstance(own, classmethod)
    }
    return {**members, "base classes": code.__bases__}


def _globals(function: FunctionType) -> dict[str, Any]:
    """The globals that a function reads, and what it may read in modules of the user's."""
    scope, steps = function.__globals__, list(_steps(function.__code__))
    read = {step.argval for step in steps if step.opname in _READING}
    found = {name: scope[name] for name in read & scope.keys()} | _imported(scope, steps)
    words = {step.argval for step in steps if isinstance(step.argval, str)}
    modules: list[ModuleType] = []
    todo = sorted(found)
    for path in todo:  # grows meanwhile
        module = found[path]
        if isinstance(module, ModuleType) and is_own(module) and module not in modules:
            modules.append(module)
            held = {f"{path}.{word}": vars(module)[word] for word in words & vars(module).keys()}
            found |= held
            todo += sorted(held)
    return found


def _imported(scope: dict[str, Any], steps: list[Instruction]) -> dict[str, ModuleType]:
    """The user's modules that a function imports when it runs."""
    found = {}
    for level, names, step in zip(steps, steps[1:], steps[2:], strict=False):
        if step.opname == "IMPORT_NAME":
            with suppress(Exception):  # as it will, if it does, when the function runs
                spec = None if level.argval else find_spec(step.argval.partition(".")[0])
                if spec is None or not _INSTALLED.match(str(spec.origin)):
                    given = (step.argval, scope, None, names.argval, level.argval)
                    kind = "from" if names.argval else "import"  # which give different modules
                    found[f"{kind} {'.' * level.argval}{step.argval}"] = __import__(*given)
    return found


def _steps(code: CodeType) -> Iterator[Instruction]:
    """The instructions of code, with those of functions in it."""
    yield from (step for step in get_instructions(code) if step.opname != "EXTENDED_ARG")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _steps(constant)
