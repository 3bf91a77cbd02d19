"""Trees of tensors and plain values as tensors by name and JSON, and back: no pickle.

Dictionaries keep the kind of their keys (optimizers count their parameters), tuples stay tuples,
and floats keep every bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cgmq_fx.cost_models.errors import CheckpointError

_MAX_DEPTH = 32


def pack(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Take a tree apart.

    Args:
        tree: Dictionaries with strings or whole numbers as keys, lists and tuples of tensors,
            arrays, numbers, text, booleans and None.

    Returns:
        What `json.dumps` takes, and the tensors that it refers to, copied to the CPU.

    Raises:
        CheckpointError: Naming the place of what is none of these.
    """
    tensors: dict[str, Tensor] = {}
    return _packed(tree, "", tensors), tensors


def unpack(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put a tree together again; `data` need not be trusted.

    Raises:
        CheckpointError: If `data` is not what `pack` gives.
    """
    try:
        return _unpacked(data, tensors, 0)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint is damaged: {error!r}") from error


def _packed(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if path.count("/") > _MAX_DEPTH:
        raise CheckpointError(f"{path} is nested too deeply for a checkpoint")
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, np.ndarray):
        return {"array": _packed(torch.from_numpy(value), path, tensors)["tensor"]}
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(value, list | tuple):
        rows = [_packed(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
        return {"tuple": rows} if isinstance(value, tuple) else rows
    if isinstance(value, Mapping) and all(type(k) in (str, int) for k in value):
        return {"dict": [[k, _packed(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    raise CheckpointError(f"{path} is a {type(value).__name__}, which a checkpoint cannot hold")


def _unpacked(data: Any, tensors: Mapping[str, Tensor], depth: int) -> Any:
    if depth > _MAX_DEPTH + 1:
        raise ValueError("nested too deeply")
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, list):
        return [_unpacked(v, tensors, depth + 1) for v in data]
    ((kind, content),) = data.items()
    if kind == "float":
        return float(content)
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "tuple":
        return tuple(_unpacked(v, tensors, depth + 1) for v in content)
    if kind != "dict":
        raise ValueError(f"the unknown kind {kind!r}")
    return {key: _unpacked(v, tensors, depth + 1) for key, v in content}
