"""A graph as JSON and back: nodes, calls of known ops, and nothing that runs on loading.

Calls are written by name and looked up in a fixed set: ATen operators without access to files, a few
arithmetic functions on sizes, and the modules of this library. Nothing is imported or evaluated.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from cgmq_fx.cost_models.errors import ArtifactError
from cgmq_fx.cost_models.facts import Role
from cgmq_fx.passes.quantizer import BiasQuantizer, Quantizer, QuantizerSpec, TrainingFlag

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in [
            "add",
            "sub",
            "mul",
            "truediv",
            "floordiv",
            "mod",
            "pow",
            "neg",
            "getitem",
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "and_",
        ]
    },
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ["sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum"]
    },
    **{f"math.{name}": getattr(math, name) for name in ["ceil", "floor", "trunc"]},
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_FORBIDDEN = frozenset({"from_file", "set_", "resize_", "set_data", "_print"})
_NAMESPACES = frozenset({"aten", "cgmq_fx"})
_ENUMS: tuple[tuple[str, type], ...] = (
    ("dtype", torch.dtype),
    ("layout", torch.layout),
    ("memory_format", torch.memory_format),
)
_MAX_DEPTH = 32


def graph_to_json(module: GraphModule) -> dict[str, Any]:
    """Write a graph as plain values.

    Args:
        module: A graph of ATen ops and modules of this library.

    Raises:
        ArtifactError: Naming the node that cannot be written.
    """
    codegen = module.graph._codegen
    info = codegen.pytree_info if isinstance(codegen, _PyTreeCodeGen) else None
    return {
        "nodes": [_node_to_json(node) for node in module.graph.nodes],
        "modules": {
            name: _module_to_json(name, owner)
            for name, owner in module.named_modules()
            if isinstance(owner, Quantizer | BiasQuantizer | TrainingFlag)
        },
        "inputs": None if info is None else list(info.orig_args),
        "in_spec": None if info is None else _spec_to_json(info.in_spec),
        "out_spec": None if info is None or info.out_spec is None else _spec_to_json(info.out_spec),
    }


def graph_from_json(data: Mapping[str, Any], root: nn.Module) -> GraphModule:
    """Rebuild a graph.

    Args:
        data: What `graph_to_json` gave, from a file that is not trusted.
        root: A module with the graph's parameters and buffers; modules are added to it.

    Raises:
        ArtifactError: If the data is not such a graph, or calls something that is not allowed.
    """
    try:
        for name, entry in data["modules"].items():
            _install(root, name, _module_from_json(entry))
        graph = _nodes_from_json(data["nodes"])
        if data["in_spec"] is not None:
            out = None if data["out_spec"] is None else _spec_from_json(data["out_spec"])
            names = [_identifier(name) for name in data["inputs"]]
            info = _PyTreeInfo(names, _spec_from_json(data["in_spec"]), out)
            graph.set_codegen(_PyTreeCodeGen(info))
        graph.lint()
        return GraphModule(root, graph, class_name="QuantizedGraph")
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"the graph in the file is damaged: {error}") from error


def _node_to_json(node: Node) -> dict[str, Any]:
    return {
        "op": node.op,
        "name": node.name,
        "target": _target_to_json(node),
        "args": [_to_json(a, node) for a in node.args],
        "kwargs": {k: _to_json(v, node) for k, v in node.kwargs.items()},
    }


def _target_to_json(node: Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        _check_overload(node.target)
        return str(node.target)
    if node.target in _NAMES:
        return _NAMES[node.target]
    raise ArtifactError(f"{node.name} calls {node.target}, which an artifact cannot express")


def _nodes_from_json(rows: list[dict[str, Any]]) -> Graph:
    graph = Graph()
    made: dict[str, Node] = {}
    for row in rows:
        name, op = _identifier(row["name"]), row["op"]
        args = tuple(_from_json(a, made) for a in row["args"])
        kwargs = {_identifier(k): _from_json(v, made) for k, v in row["kwargs"].items()}
        if op not in ("placeholder", "get_attr", "call_module", "call_function", "output"):
            raise ArtifactError(f"{name} is a {op!r}, which an artifact cannot hold")
        target = _function(row["target"]) if op == "call_function" else _path(row["target"])
        if name in made:
            raise ArtifactError(f"two nodes have the name {name}")
        made[name] = graph.create_node(op, target, args, kwargs, name)
    return graph


def _function(name: str) -> Callable[..., Any]:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    parts = [_identifier(part) for part in str(name).split(".")]
    if len(parts) != 3 or parts[0] not in _NAMESPACES:
        raise ArtifactError(f"the file calls {name!r}, which is not allowed")
    packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
    overload = getattr(packet, parts[2], None)
    if not isinstance(overload, torch._ops.OpOverload):
        raise ArtifactError(f"the file calls {name!r}, which this version of torch does not have")
    _check_overload(overload)
    return overload


def _check_overload(overload: torch._ops.OpOverload) -> None:
    name = overload._opname
    if overload.namespace not in _NAMESPACES or name in _FORBIDDEN:
        raise ArtifactError(f"{overload} is not allowed in an artifact")


def _to_json(value: Any, node: Node, depth: int = 0) -> Any:
    if depth > _MAX_DEPTH:
        raise ArtifactError(f"the arguments of {node.name} are nested too deeply")
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        rows = [_to_json(v, node, depth + 1) for v in value]
        return {"tuple": rows} if isinstance(value, tuple) else rows
    if isinstance(value, slice):
        return {
            "slice": [_to_json(v, node, depth + 1) for v in (value.start, value.stop, value.step)]
        }
    if isinstance(value, torch.device):
        return {"device": value.type}
    for name, kind in _ENUMS:
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    raise ArtifactError(f"{node.name} has an argument of type {type(value).__name__}: {value!r}")


def _from_json(value: Any, made: Mapping[str, Node], depth: int = 0) -> Any:
    if depth > _MAX_DEPTH:
        raise ArtifactError("the arguments of a node are nested too deeply")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_from_json(v, made, depth + 1) for v in value]
    ((kind, content),) = value.items()
    if kind == "node":
        return made[content]
    if kind == "float":
        return float(content)
    if kind in ("tuple", "slice"):
        parts = [_from_json(v, made, depth + 1) for v in content]
        return tuple(parts) if kind == "tuple" else slice(*parts)
    if kind == "device":
        return torch.device("cpu")
    found = getattr(torch, _identifier(content), None)
    if not isinstance(found, dict(_ENUMS)[kind]):
        raise ArtifactError(f"{content!r} is no {kind}")
    return found


def _module_to_json(name: str, owner: nn.Module) -> dict[str, Any]:
    if isinstance(owner, TrainingFlag):
        return {"type": "TrainingFlag"}
    if isinstance(owner, BiasQuantizer):
        signs = {"input_signed": owner.input_signed, "weight_signed": owner.weight_signed}
        return {"type": "BiasQuantizer", **signs}
    if not isinstance(owner, Quantizer):
        raise ArtifactError(f"{name} is a {type(owner).__name__}, which an artifact cannot hold")
    spec = owner.spec
    return {
        "type": "Quantizer",
        "role": spec.role.value,
        "signed": owner.signed,
        "bit_widths": list(spec.bit_widths),
        "gate_shape": list(spec.gate_shape),
        "range_shape": list(spec.range_shape),
        "batched": spec.batched,
    }


def _module_from_json(entry: Mapping[str, Any]) -> nn.Module:
    kind = entry["type"]
    if kind == "TrainingFlag":
        return TrainingFlag()
    if kind == "BiasQuantizer":
        return BiasQuantizer(entry["input_signed"] is True, entry["weight_signed"] is True)
    if kind != "Quantizer":
        raise ArtifactError(f"the file holds a module of type {kind!r}, which is not known")
    spec = QuantizerSpec(
        Role(entry["role"]),
        entry["signed"] is True,
        tuple(int(b) for b in entry["bit_widths"]),
        tuple(int(s) for s in entry["gate_shape"]),
        tuple(int(s) for s in entry["range_shape"]),
        entry["batched"] is True,
    )
    return Quantizer(spec, torch.device("meta"))


def _install(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at a dotted path; its tensors are those that stand there already."""
    owner, _, last = _path(name).rpartition(".")
    parent = root
    for part in owner.split(".") if owner else []:
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    old = parent._modules.get(last)
    if isinstance(module, Quantizer):
        if old is None or set(old._parameters) | set(old._buffers) != {"log_range", "bits"}:
            raise ArtifactError(f"the file has no range or no bits for {name}")
        module.log_range = nn.Parameter(old.get_parameter("log_range").data)
        module.bits = old.get_buffer("bits")
        shapes = (tuple(module.log_range.shape), tuple(module.bits.shape))
        if shapes != (module.spec.range_shape, module.spec.gate_shape):
            raise ArtifactError(f"the range or the bits of {name} have the wrong shape")
    parent.add_module(last, module)


def _spec_to_json(spec: pytree.TreeSpec) -> Any:
    if spec.is_leaf():
        return "leaf"
    children = [_spec_to_json(child) for child in spec.children()]
    if spec.type in (list, tuple):
        return {spec.type.__name__: children}
    if spec.type is dict and all(isinstance(k, str) for k in spec.context):
        return {"dict": [list(spec.context), children]}
    raise ArtifactError(
        f"the model takes or returns a {spec.type.__name__}, which an artifact cannot hold; tensors, "
        "tuples, lists and dicts with string keys it can"
    )


def _spec_from_json(data: Any, depth: int = 0) -> pytree.TreeSpec:
    return pytree.tree_structure(_skeleton(data, depth))


def _skeleton(data: Any, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise ArtifactError("the inputs or outputs are nested too deeply")
    if data == "leaf":
        return 0
    ((kind, content),) = data.items()
    if kind == "dict":
        keys, children = content
        pairs = zip(keys, children, strict=True)
        return {str(key): _skeleton(child, depth + 1) for key, child in pairs}
    children = [_skeleton(child, depth + 1) for child in content]
    if kind == "list":
        return children
    if kind == "tuple":
        return tuple(children)
    raise ArtifactError(f"the file describes inputs or outputs of the unknown kind {kind!r}")


def _identifier(name: Any) -> str:
    """A Python identifier, and nothing that could be code when the graph prints itself."""
    if not isinstance(name, str) or not name.isidentifier():
        raise ArtifactError(f"{str(name)[:80]!r} is no name")
    return name


def _path(name: Any) -> str:
    """A dotted path of names or numbers."""
    if not isinstance(name, str) or not all(
        p.isidentifier() or p.isdigit() for p in name.split(".")
    ):
        raise ArtifactError(f"{str(name)[:80]!r} is no path")
    return name
