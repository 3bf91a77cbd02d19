"""What the words of a command line name: models and example inputs."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cgmq_fx.cli.common import numbers

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool")


def load_model(name: str) -> nn.Module | ExportedProgram:
    """A model from `package.module:factory` or a `.pt2` file.

    Raises:
        OptionError: If there is no such file, module or factory, or it gives no model.
    """
    import torch

    from cgmq_fx.cost_models.errors import OptionError

    if name.endswith(".pt2"):
        if not Path(name).is_file():
            raise OptionError(f"there is no file {name}")
        try:
            return torch.export.load(name)
        except Exception as error:
            raise OptionError(f"cannot read {name} as a model of torch.export: {error}") from error
    module, colon, factory = name.partition(":")
    if not colon:
        raise OptionError(f"{name!r} is neither package.module:factory nor a .pt2 file")
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 - sys.path holds strings
    try:
        made = getattr(importlib.import_module(module), factory)()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise OptionError(f"cannot make a model of {name!r}: {reason}") from error
    finally:
        sys.path.pop(0)
    if not isinstance(made, torch.nn.Module):
        raise OptionError(f"{name} gives a {type(made).__name__}, not a torch.nn.Module")
    return made


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
