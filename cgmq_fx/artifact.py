"""The library's own file: one safetensors file with the tensors, and JSON in its header.

Loading executes nothing from the file: no pickle, no import, no evaluation. The graph is rebuilt
from a fixed set of ops (see `graph_json`) and its cost is counted again.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from math import isclose, isfinite
from pathlib import Path
from typing import Any, get_args
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.fx import GraphModule

from cgmq_fx.cost_models import Bound, Budget, Constraint, CostModel, cost_model
from cgmq_fx.cost_models.errors import (
    ArtifactError,
    BudgetError,
    CgmqError,
    CostModelError,
    TargetError,
    UnknownCostError,
)
from cgmq_fx.cost_models.tables import TableModel
from cgmq_fx.cost_models.target import parse_target, target_to_json
from cgmq_fx.given import path_of
from cgmq_fx.graph_json import graph_from_json, graph_to_json
from cgmq_fx.history import EpochRecord, GateRecord, History, Phase, StepRecord
from cgmq_fx.packed_weights import pack_weights, unpack_gates, unpack_weights
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.freeze import keep_containers
from cgmq_fx.passes.quantizer import Quantizer
from cgmq_fx.passes.state import shape_of
from cgmq_fx.recount import CostReport, verify
from cgmq_fx.result import Result
from cgmq_fx.untrusted import identifier, shown_text, tensor_path

FORMAT = 2
"""The newest format: 1 holds weights as they were trained, 2 as packed codes."""

_KEY = "cgmq_fx"
_DEFLATED = "deflated:"
_MOST_TEXT = 1 << 28
_SAME = 1e-9


def save(result: Result, path: Path, packed: bool = False) -> Path:
    """Write a result, atomically; see `Result.save`.

    Args:
        result: What is written.
        path: The file.
        packed: Whether weights are written as codes, in the bits of their gates, and the header
            deflated: the same function in a small file, but training cannot go on from it.
    """
    state: dict[str, Tensor] = result.model.state_dict(keep_vars=False)
    codes, entries = pack_weights(result.model) if packed else ({}, {})
    header = {
        "format": 2 if packed else 1,
        "budget": _budget_to_json(result),
        "graph": graph_to_json(result.model),
        "inputs": _inputs_to_json(result.inputs),
        "metrics": _with_names(_metrics(result.metrics)),
        "history": _with_names(asdict(result.history)),
        "parameters": sorted(n for n, _ in result.model.named_parameters(remove_duplicate=False)),
        "packed": entries,
    }
    kinds = _captured_kinds(result.model)
    state = {n: t.to(kinds[n]) if n in kinds else t for n, t in state.items()}
    tensors = {
        tensor_path(name): t.detach().cpu().contiguous().clone()
        for name, t in (state | codes).items()
    }
    try:
        text = json.dumps(header, allow_nan=False, separators=(",", ":"))
        text = _deflate(text) if packed else text
    except ValueError as error:
        raise ArtifactError(f"the result cannot be written as JSON: {error}") from error
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        temporary.write_bytes(serialize(tensors, {_KEY: text}))
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _with_names(value: Any) -> Any:
    """The same with "nan", "inf" and "-inf" for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: _with_names(own) for key, own in value.items()}
    return [_with_names(own) for own in value] if isinstance(value, list | tuple) else value


def _captured_kinds(model: GraphModule) -> dict[str, torch.dtype]:
    """The types that tensors had when the model was captured, whatever it was converted to since.

    The graph states them, and would not run with others.
    """
    found = {
        f"{name}.log_range": torch.float32
        for name, module in model.named_modules()
        if isinstance(module, Quantizer)
    }
    for node in model.graph.find_nodes(op="get_attr"):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_floating_point():
            found[str(node.target)] = value.dtype
    return found


def check_kept(model: GraphModule) -> None:
    """Check before training that what becomes of a model can be written to a file.

    Raises:
        ArtifactError: If its graph cannot.
    """
    graph_to_json(model)


def load(
    path: str | Path,
    *,
    libraries: Collection[str] = (),
    cost_models: Collection[CostModel] = (),
) -> Result:
    """Read a result that `Result.save` wrote, and count its cost again.

    Args:
        path: The file. It need not be trusted: nothing in it is executed.
        libraries: Namespaces of ops of other libraries that the model may call, such as
            "torchvision", if you trust these; import them first.
        cost_models: Cost models of its budget that cannot be made from their names alone, because
            they have arguments: the file has nothing but the name.

    Returns:
        The result, on the CPU.

    Raises:
        ArtifactError: If the file cannot be read, is not an artifact of this library, is damaged,
            or is of a newer format.
        BoundError: If the model in it does not satisfy the budget that the file states.
        UnknownCostError: If its budget names a cost model that is not registered here.
        CostModelError: If a cost model of its budget cannot be made from its name alone, or counts
            something else than when the file was written.
    """
    header, tensors = _read(path_of("load", path))
    version = header.get("format")
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise ArtifactError(
            f"{path} has format {version!r}, this version reads up to {FORMAT}; upgrade cgmq_fx"
        )
    try:
        entries = header.get("packed", {})
        room = unpack_gates(tensors, entries, header["graph"]["modules"])
        model = graph_from_json(header["graph"], _tree(room, set(header["parameters"])), libraries)
        keep_containers(model)
        unpack_weights(model, tensors, entries)
        inputs = _inputs_from_json(header["inputs"])
        budget = _budget_from_json(header["budget"], {m.name: m for m in cost_models})
        history = _history(header["history"])
        metrics = _metrics(header["metrics"])
        model.eval()
        report = verify(model, inputs, budget, trusted=False)
        _check_shapes(model)
        _check_costs(report, header["budget"])
    except UnknownCostError:
        raise
    except (BudgetError, TargetError) as error:
        raise ArtifactError(f"the budget in {path} cannot be read: {error}") from error
    except CgmqError:
        raise
    except Exception as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
    return Result(model, report, budget, inputs, history, metrics)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError("it is no file")
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            # Copies: the last digits of products depend on where their factors lie in memory, and
            # the file may change.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read as a safetensors file: {error}") from error
    if text is None:
        raise ArtifactError(f"{path} is a safetensors file, but not one that cgmq_fx wrote")
    try:
        header = json.loads(_inflate(text))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"the header of {path} is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise ArtifactError(f"the header of {path} is not an object")
    return header, tensors


def _deflate(text: str) -> str:
    return _DEFLATED + base64.b85encode(zlib.compress(text.encode(), 9)).decode()


def _inflate(text: str) -> str:
    """The text of a header, which may be deflated; bounded, whatever it claims to hold."""
    if not text.startswith(_DEFLATED):
        return text
    try:
        stream = zlib.decompressobj()
        content = stream.decompress(base64.b85decode(text.removeprefix(_DEFLATED)), _MOST_TEXT)
    except zlib.error as error:
        raise ValueError(f"it cannot be inflated: {error}") from error
    if not stream.eof:
        raise ValueError("it is cut off, or too large")
    return content.decode()


def _tree(tensors: Mapping[str, Tensor], parameters: set[str]) -> nn.Module:
    """A module tree that holds the tensors under their dotted names."""
    root = nn.Module()
    for full, tensor in tensors.items():
        owner, _, name = tensor_path(full).rpartition(".")
        parent = root
        for part in owner.split(".") if owner else []:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        if full in parameters:
            parent.register_parameter(name, nn.Parameter(tensor))
        else:
            parent.register_buffer(name, tensor)
    return root


def _check_shapes(model: GraphModule) -> None:
    """Gates and ranges broadcast against what they round; otherwise its cost was miscounted."""
    for node in model.graph.nodes:
        owner = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(owner, Quantizer):
            continue
        shape = shape_of(node) or ()
        for own in (owner.spec.gate_shape, owner.spec.range_shape):
            if torch.broadcast_shapes(own, shape) != shape:
                raise ArtifactError(f"{node} has gates or ranges of shape {own} on {shape}")


def _check_costs(report: CostReport, rows: list[dict[str, Any]]) -> None:
    """The cost models count what they counted when the file was written, if that stands in it."""
    for state, row in zip(report.states, rows, strict=True):
        before = float(row.get("counted", state.value))
        if not isclose(state.value, before, rel_tol=_SAME):
            raise CostModelError(
                f"{state.constraint.model.name!r} counts {state.value:g} on the model in the file, "
                f"and counted {before:g} when it was written; if the model has arguments, give it "
                "as cost_models=; a file of an older version may have been counted wrong where a "
                "size is that of the batch: quantize again"
            )


def _budget_to_json(result: Result) -> list[dict[str, Any]]:
    rows = []
    for c, state in zip(result.budget, result.cost.states, strict=True):
        target = target_to_json(c.model.target) if isinstance(c.model, TableModel) else None
        bound = {"value": c.bound.value, "relative": c.bound.relative, "base": c.bound.base}
        refers = {"reference": c.bound.reference, "counted": state.value}
        scope = None if c.scope is None else shown_text(c.scope)
        rows.append({"cost": c.model.name, "scope": scope, "target": target, **bound, **refers})
    return rows


def _budget_from_json(rows: list[dict[str, Any]], given: Mapping[str, CostModel]) -> Budget:
    constraints = []
    for row in rows:
        chip = row["target"]
        target = None if chip is None else parse_target(json.dumps(chip).encode(), "the artifact")
        reference = None if row["reference"] is None else float(row["reference"])
        relative, base = row["relative"] is True, int(row["base"])
        bound = Bound(float(row["value"]), relative, base, reference)
        scope = None if row["scope"] is None else shown_text(row["scope"])
        name = str(row["cost"])
        model = given[name] if name in given else cost_model(name, target)
        constraints.append(Constraint(model, bound, scope))
    return Budget(tuple(constraints))


def _inputs_to_json(inputs: ExampleInputs) -> dict[str, Any]:
    return {
        "args": [_input_to_json(a) for a in inputs.args],
        "kwargs": {k: _input_to_json(v) for k, v in inputs.kwargs.items()},
        "batched": None if inputs.batched is None else list(inputs.batched),
        "fixed": inputs.fixed,
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
    kwargs = {str(k): _input_from_json(v) for k, v in data["kwargs"].items()}
    inputs = ExampleInputs(args, kwargs, fixed=data.get("fixed") is True)
    count, known = len(inputs.tensors), data.get("batched")
    if known is None:  # written before this was, when sizes had to agree
        return inputs if inputs.agrees else replace(inputs, batched=(False,) * count)
    if len(known) != count or any(type(own) is not bool for own in known):
        raise ValueError("it does not say for each input whether it has a batch")
    return replace(inputs, batched=tuple(known))


def _input_from_json(data: Mapping[str, Any]) -> Any:
    if "shape" in data:
        dtype = vars(torch).get(identifier(data["dtype"]))
        if not isinstance(dtype, torch.dtype):
            raise ArtifactError(f"{data['dtype']!r} is no dtype")
        return torch.zeros(()).to(dtype).expand([int(s) for s in data["shape"]])
    ((kind, content),) = data.items()
    if kind == "dict":
        return {str(k): _input_from_json(v) for k, v in content.items()}
    if kind == "value":
        return content
    rows = [_input_from_json(v) for v in content]
    return tuple(rows) if kind == "tuple" else rows


def _history(data: Mapping[str, Any]) -> History:
    steps = [
        StepRecord(
            int(r["step"]),
            int(r["steps"]),
            _phase(r["phase"]),
            _numbers(r["costs"]),
            None if r.get("loss") is None else float(r["loss"]),
        )
        for r in data["steps"]
    ]
    epochs = [
        EpochRecord(
            int(r["epoch"]),
            _phase(r["phase"]),
            float(r["loss"]),
            _metrics(r["metrics"]),
            _numbers(r["costs"]),
            r["satisfied"] is True,
            {shown_text(n): (int(a), int(b)) for n, (a, b) in r.get("silent", {}).items()},
        )
        for r in data["epochs"]
    ]
    gates = [
        GateRecord(int(r["step"]), _numbers(r["gates"]), _numbers(r["bits"]))
        for r in data.get("gates", [])
    ]
    return History(steps, epochs, gates, tuple(map(str, data.get("quantizers", []))))


def _phase(name: Any) -> Phase:
    if name not in get_args(Phase):
        raise ArtifactError(f"{name!r} is no phase")
    return "search" if name == "search" else "tune"


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    return {shown_text(name): float(value) for name, value in values.items()}


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(float(v) for v in values)
