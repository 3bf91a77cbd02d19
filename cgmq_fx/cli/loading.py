"""What the words of a command line name: models, example inputs, data and losses."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from cgmq_fx.cli.common import numbers

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from cgmq_fx.result import Result

_LIBRARY = Path(__file__).resolve().parents[1]
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool")


class Data(NamedTuple):
    """Batches to train on, and perhaps some to measure on."""

    train: Iterable[Any] | None
    validation: Iterable[Any] | None


def load_model(name: str, state: Path | None = None) -> nn.Module | ExportedProgram:
    """A model from `package.module:factory` or a `.pt2` file.

    Args:
        name: The model.
        state: A file with weights for it.

    Raises:
        OptionError: If there is no such file, module or factory, or it gives no model.
    """
    import torch

    from cgmq_fx.cost_models.errors import OptionError
    from cgmq_fx.passes.tracing import quiet

    if name.endswith(".pt2"):
        if not Path(name).is_file():
            raise OptionError(f"there is no file {name}")
        if state is not None:
            raise OptionError(f"{name} has its weights in it; leave out --state")
        try:
            with quiet():  # it logs what it tries
                return torch.export.load(name)
        except Exception as error:
            raise OptionError(f"cannot read {name} as a model of torch.export: {error}") from error
    if ":" not in name:
        raise OptionError(f"{name!r} is neither package.module:factory nor a .pt2 file")
    with _explained(f"cannot make a model of {name!r}"):
        made = _named(name)()
    if not isinstance(made, torch.nn.Module):
        raise OptionError(f"{name} gives a {type(made).__name__}, not a torch.nn.Module")
    if state is not None:
        with _explained(f"{state} does not fit {name}"):
            made.load_state_dict(_read_state(state))
    return made


def load_data(train: str | None, validation: str | None = None) -> Data:
    """Batches from `package.module:loader`, or `mnist`.

    A loader is a function that is called without arguments, or the batches themselves. One that
    gives a pair of iterables, none of them a tensor, gives training and validation batches.

    Raises:
        OptionError: If there are no such batches.
    """
    if train == "mnist":
        from cgmq_fx.cli.mnist import mnist

        first, second = _pair(mnist())
    else:
        first, second = (None, None) if train is None else _pair(_batches(train))
    return Data(first, second if validation is None else _batches(validation))


def load_result(file: Path, libraries: Collection[str]) -> Result:
    """A result that `quantize` wrote.

    Args:
        file: The file.
        libraries: Packages whose ops it may call; they are imported.

    Raises:
        OptionError: If a package cannot be imported.
        CgmqError: If the file cannot be read, or does not hold what it states.
    """
    from cgmq_fx.artifact import load

    import_modules(libraries)
    return load(file, libraries=libraries)


def import_modules(names: Iterable[str]) -> None:
    """Import modules, seen from the working directory.

    Raises:
        OptionError: If one cannot be imported.
    """
    for name in names:
        with _explained(f"cannot import {name!r}"):
            _imported(name)


def load_loss(name: str) -> Callable[[Any, Any], Tensor] | None:
    """A loss by its name in torch.nn.functional or as `package.module:function`.

    Returns:
        The loss, None for `teacher`.

    Raises:
        OptionError: If there is no such loss.
    """
    from torch.nn import functional

    from cgmq_fx.cost_models.errors import OptionError

    if name == "teacher":
        return None
    if ":" in name:
        with _explained(f"cannot find the loss {name!r}"):
            found = _named(name)
    else:
        found = getattr(functional, name, None)
    if not callable(found):
        raise OptionError(
            f"there is no loss {name!r}; write teacher, a function of torch.nn.functional such as "
            "cross_entropy, or package.module:function"
        )
    return found  # type: ignore[no-any-return]


def tensor(text: str) -> Tensor:
    """An input of a shape such as 1x3x32x32, or 1x16:int64: random numbers, or zeros."""
    import torch

    from cgmq_fx.cost_models.errors import OptionError

    sizes, _, name = text.lower().partition(":")
    shape, name = numbers(sizes, "x"), name or "float32"
    if name not in _DTYPES or min(shape) < 1:
        raise OptionError(
            f"{text!r} is no input; write sizes as 1x3x32x32, and a dtype where it is not float32, "
            "as 1x16:int64"
        )
    dtype: torch.dtype = getattr(torch, name)
    return torch.rand(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape).to(dtype)


def _named(name: str) -> Any:
    """The object `package.module:object`, seen from the working directory."""
    module, _, path = name.partition(":")
    return getattr(_imported(module), path)


def _imported(module: str) -> ModuleType:
    """A module, seen from the working directory, which stays on the path for other processes."""
    here = os.getcwd()  # noqa: PTH109 - sys.path holds strings
    if here not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(module)


def _batches(name: str) -> Any:
    from cgmq_fx.cost_models.errors import OptionError

    if ":" not in name:
        raise OptionError(f"{name!r} is neither package.module:loader nor mnist")
    with _explained(f"cannot get data from {name!r}"):
        found = _named(name)
        return found() if callable(found) else found


def _pair(found: Any) -> tuple[Any, Any]:
    from torch import Tensor

    if isinstance(found, tuple) and len(found) == 2 and not isinstance(found[0], Tensor):
        return found
    return found, None


def _read_state(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    import torch

    found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return found


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Say what failed in other people's code, and on which of their lines."""
    from cgmq_fx.cost_models.errors import CgmqError, OptionError

    try:
        yield
    except CgmqError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        parents = Path(frame.filename).resolve().parents
        theirs = Path.cwd() in parents and _LIBRARY not in parents
        where = f" ({Path(frame.filename).name}, line {frame.lineno})" if theirs else ""
        raise OptionError(f"{what}: {type(error).__name__}: {error}{where}") from error
