"""The library's own file: one safetensors file with the tensors, and JSON in its header.

Loading executes nothing from the file: no pickle, no import, no evaluation. The graph is rebuilt
from a fixed set of ops (see `graph_json`) and its cost is counted again.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cgmq_fx.cost_models import Bound, Budget, cost_model
from cgmq_fx.cost_models.errors import ArtifactError, CgmqError
from cgmq_fx.graph_json import _identifier, _path, graph_from_json, graph_to_json
from cgmq_fx.history import EpochRecord, History, StepRecord
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.result import Result
from cgmq_fx.verify import verify

FORMAT = 1
_KEY = "cgmq_fx"


def save(result: Result, path: Path) -> Path:
    """Write a result, atomically; see `Result.save`."""
    header = {
        "format": FORMAT,
        "budget": _budget_to_json(result),
        "graph": graph_to_json(result.model),
        "inputs": _inputs_to_json(result.inputs),
        "metrics": result.metrics,
        "history": asdict(result.history),
        "parameters": [name for name, _ in result.model.named_parameters(remove_duplicate=False)],
    }
    state = result.model.state_dict(keep_vars=False)
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}
    handle, temporary = tempfile.mkstemp(dir=path.resolve().parent, suffix=".tmp")
    os.close(handle)
    try:
        save_file(tensors, temporary, {_KEY: json.dumps(header, allow_nan=False)})
        Path(temporary).replace(path)
    except ValueError as error:
        raise ArtifactError(f"the result cannot be written as JSON: {error}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def load(path: str | Path) -> Result:
    """Read a result that `Result.save` wrote, and count its cost again.

    Args:
        path: The file. It need not be trusted: nothing in it is executed.

    Returns:
        The result, on the CPU.

    Raises:
        ArtifactError: If the file cannot be read, is not an artifact of this library, is damaged, or
            is of a newer format.
        BoundError: If the model in it does not satisfy the budget that the file states.
        UnknownCostError: If its budget names a cost model that is not registered here.
    """
    header, tensors = _read(Path(path))
    version = header.get("format")
    if not isinstance(version, int) or version > FORMAT:
        raise ArtifactError(
            f"{path} has format {version!r}, this version reads up to {FORMAT}; upgrade cgmq_fx"
        )
    try:
        model = graph_from_json(header["graph"], _tree(tensors, set(header["parameters"])))
        inputs = _inputs_from_json(header["inputs"])
        budget = _budget_from_json(header["budget"])
        history = _history(header["history"])
        metrics = {str(k): float(v) for k, v in header["metrics"].items()}
        model.eval()
        report = verify(model, inputs, budget)
    except CgmqError:
        raise
    except Exception as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
    return Result(model, report, budget, inputs, history, metrics)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read as a safetensors file: {error}") from error
    if text is None:
        raise ArtifactError(f"{path} is a safetensors file, but not one that cgmq_fx wrote")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"the header of {path} is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise ArtifactError(f"the header of {path} is not an object")
    return header, tensors


def _tree(tensors: Mapping[str, Tensor], parameters: set[str]) -> nn.Module:
    """A module tree that holds the tensors under their dotted names."""
    root = nn.Module()
    for full, tensor in tensors.items():
        owner, _, name = _path(full).rpartition(".")
        parent = root
        for part in owner.split(".") if owner else []:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        if full in parameters and tensor.is_floating_point():
            parent.register_parameter(name, nn.Parameter(tensor))
        else:
            parent.register_buffer(name, tensor)
    return root


def _budget_to_json(result: Result) -> list[dict[str, Any]]:
    return [
        {"cost": c.model.name, "value": c.bound.value, "relative": c.bound.relative}
        for c in result.budget
    ]


def _budget_from_json(rows: list[dict[str, Any]]) -> Budget:
    bounds = ((r["cost"], Bound(float(r["value"]), r["relative"] is True)) for r in rows)
    return Budget(tuple(cost_model(str(name)) <= bound for name, bound in bounds))


def _inputs_to_json(inputs: ExampleInputs) -> dict[str, Any]:
    return {
        "args": [_input_to_json(a) for a in inputs.args],
        "kwargs": {k: _input_to_json(v) for k, v in inputs.kwargs.items()},
    }


def _input_to_json(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_input_to_json(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": {str(k): _input_to_json(v) for k, v in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise ArtifactError(f"an input of type {type(value).__name__} cannot be written to an artifact")


def _inputs_from_json(data: Mapping[str, Any]) -> ExampleInputs:
    args = tuple(_input_from_json(a) for a in data["args"])
    return ExampleInputs(args, {str(k): _input_from_json(v) for k, v in data["kwargs"].items()})


def _input_from_json(data: Mapping[str, Any]) -> Any:
    if "shape" in data:
        dtype = getattr(torch, _identifier(data["dtype"]))
        return torch.zeros(()).to(dtype).expand([int(s) for s in data["shape"]])
    ((kind, content),) = data.items()
    if kind == "dict":
        return {str(k): _input_from_json(v) for k, v in content.items()}
    if kind == "value":
        return content
    rows = [_input_from_json(v) for v in content]
    return tuple(rows) if kind == "tuple" else rows


def _history(data: Mapping[str, Any]) -> History:
    steps = [StepRecord(**{**row, "costs": tuple(row["costs"])}) for row in data["steps"]]
    epochs = [EpochRecord(**{**row, "costs": tuple(row["costs"])}) for row in data["epochs"]]
    return History(steps, epochs)
