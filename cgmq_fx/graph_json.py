"""A graph as JSON and back: nodes, calls of known ops, and nothing that runs on loading.

Calls are written by name and looked up in a fixed set: ATen operators without access to files, a
few arithmetic functions on sizes, and the modules of this library. Nothing is imported. But torch
prints a graph as Python source and executes that, so whatever reaches the source (names, paths,
keyword names, strings) is checked to be nothing else, when reading and when writing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from cgmq_fx.cost_models.errors import ArtifactError
from cgmq_fx.cost_models.facts import Role
from cgmq_fx.passes.bias import BIASES
from cgmq_fx.passes.grid import BITS_DTYPE, allowed_bit_width
from cgmq_fx.passes.infra import module_path
from cgmq_fx.passes.insert import QUANTIZERS
from cgmq_fx.passes.opaque import OpaqueCall
from cgmq_fx.passes.portable import portable
from cgmq_fx.passes.quantizer import BiasQuantizer, Quantizer, QuantizerSpec, TrainingFlag
from cgmq_fx.passes.shapes import EXAMPLE, Like
from cgmq_fx.spec_json import MAX_DEPTH, spec_from_json, spec_to_json
from cgmq_fx.untrusted import (
    NAMESPACES,
    argument_name,
    check_arguments,
    check_overload,
    identifier,
    plain_text,
    tensor_path,
)

_OPERATORS = "add sub mul truediv floordiv mod pow neg getitem eq ne lt le gt ge and_"
_SIZES = "sym_int sym_float sym_max sym_min sym_not sym_ite sym_sum"
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS.split()},
    **{f"torch.{name}": getattr(torch, name) for name in _SIZES.split()},
    **{f"math.{name}": getattr(math, name) for name in ["ceil", "floor", "trunc"]},
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_OWN = (f"{QUANTIZERS}.", f"{BIASES}.")
_MODULES = (Quantizer, BiasQuantizer, TrainingFlag)
_ENUMS: tuple[tuple[str, type], ...] = (
    ("dtype", torch.dtype),
    ("layout", torch.layout),
    ("memory_format", torch.memory_format),
)
_MAX_NODES = 1 << 16


def graph_to_json(module: GraphModule) -> dict[str, Any]:
    """Write a graph as plain values.

    Args:
        module: A graph of ATen ops and modules of this library.

    Raises:
        ArtifactError: Naming the node that cannot be written.
    """
    codegen = module.graph._codegen
    info = codegen.pytree_info if isinstance(codegen, _PyTreeCodeGen) else None
    for owner in module.modules():
        if isinstance(owner, OpaqueCall):
            raise ArtifactError(
                f"{owner.path} ({type(owner.inner).__name__}) could not be captured and runs as it "
                "is; a file that executes nothing cannot hold its code"
            )
    return {
        "nodes": [_node_to_json(node) for node in module.graph.nodes],
        "modules": {
            name: _module_to_json(name, owner)
            for name, owner in sorted(module.named_modules())
            if isinstance(owner, _MODULES)
        },
        "inputs": None if info is None else [argument_name(name) for name in info.orig_args],
        "in_spec": None if info is None else spec_to_json(info.in_spec),
        "out_spec": None if info is None or info.out_spec is None else spec_to_json(info.out_spec),
    }


def graph_from_json(
    data: Mapping[str, Any], root: nn.Module, libraries: Collection[str] = ()
) -> GraphModule:
    """Rebuild a graph.

    Args:
        data: What `graph_to_json` gave, from a file that is not trusted.
        root: A module with the graph's parameters and buffers; modules are added to it.
        libraries: Namespaces of ops of other libraries that the graph may call.

    Raises:
        ArtifactError: If the data is not such a graph, or calls something that is not allowed.
    """
    try:
        for name, entry in data["modules"].items():
            _install(root, name, _module_from_json(entry))
        graph = _nodes_from_json(data["nodes"], root, libraries)
        if data["in_spec"] is not None:
            graph.set_codegen(_PyTreeCodeGen(_signature(graph, data)))
        graph.lint()
        return portable(root, graph)
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"the graph in the file is damaged: {error}") from error


def _node_to_json(node: Node) -> dict[str, Any]:
    row = {
        "op": node.op,
        "name": node.name,
        "target": _target_to_json(node),
        "args": [_to_json(a, node) for a in node.args],
        "kwargs": {k: _to_json(v, node) for k, v in node.kwargs.items()},
        "module": plain_text(module_path(node)),
    }
    if EXAMPLE in node.meta:
        row["example"] = _to_json(_example_rows(node.meta[EXAMPLE]), node)
    return row


def _target_to_json(node: Node) -> str:
    if node.op == "placeholder":
        return argument_name(node.target)
    if node.op != "call_function":
        return tensor_path(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        check_overload(node.target, [node.target.namespace])
        return str(node.target)
    if node.target in _NAMES:
        return _NAMES[node.target]
    raise ArtifactError(f"{node.name} calls {node.target}, which an artifact cannot express")


def _nodes_from_json(
    rows: list[dict[str, Any]], root: nn.Module, libraries: Collection[str]
) -> Graph:
    if len(rows) > _MAX_NODES:
        raise ArtifactError(f"a graph in a file has at most {_MAX_NODES} nodes, not {len(rows)}")
    graph = Graph()
    made: dict[str, Node] = {}
    for row in rows:
        name, op = identifier(row["name"]), row["op"]
        args = tuple(_from_json(a, made) for a in row["args"])
        kwargs = {identifier(k): _from_json(v, made) for k, v in row["kwargs"].items()}
        if name in made:
            raise ArtifactError(f"two nodes have the name {name}")
        target = _target(op, row["target"], root, libraries)
        if isinstance(target, torch._ops.OpOverload):
            check_arguments(target, args, kwargs)
        node = graph.create_node(op, target, args, kwargs, name)
        node.meta["nn_module_stack"] = {"": (plain_text(row["module"]), "")}
        if "example" in row:
            node.meta[EXAMPLE] = _example(_from_json(row["example"], {}))
        made[name] = node
    _check_nodes(graph)
    return graph


def _example_rows(like: Any) -> Any:
    if isinstance(like, Like):
        return [list(like.shape), like.dtype]
    return tuple(map(_example_rows, like)) if isinstance(like, tuple) else like


def _example(value: Any) -> Any:
    """What a node returned for the example inputs: a number, a shape and a dtype, or several."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, tuple):
        return tuple(map(_example, value))
    shape, dtype = value
    if not isinstance(dtype, torch.dtype) or not all(type(s) is int and s >= 0 for s in shape):
        raise ArtifactError("the file describes an example value that is neither number nor tensor")
    return Like(tuple(shape), dtype)


def _target(op: str, target: Any, root: nn.Module, libraries: Collection[str]) -> Any:
    """What a node calls or reads: looked up in the tree of modules, never by `getattr`."""
    if op == "call_function":
        return _function(target, libraries)
    if op == "placeholder":
        return argument_name(target)
    if op == "output":
        return op
    owner, _, name = tensor_path(target).rpartition(".")
    parent = _module_at(root, owner)
    if op == "get_attr" and (name in parent._parameters or name in parent._buffers):
        return target
    if op == "call_module" and isinstance(parent._modules.get(name), _MODULES):
        return target
    raise ArtifactError(f"the graph has a {op!r} of {target!r}, which the file does not hold")


def _module_at(root: nn.Module, path: str) -> nn.Module:
    for part in path.split(".") if path else []:
        child = root._modules.get(part)
        if child is None:
            raise ArtifactError(f"the file has no module {path!r}")
        root = child
    return root


def _check_nodes(graph: Graph) -> None:
    """What holds for every graph that is written: one end, and bits that only quantizers read."""
    nodes = list(graph.nodes)
    ends = [node for node in nodes if node.op == "output"]
    if not nodes or ends != nodes[-1:] or len(nodes[-1].args) != 1:
        raise ArtifactError("the graph does not end with its one output")
    for node in nodes:
        if node.op == "placeholder" and (node.args or node.kwargs):
            raise ArtifactError(f"the input {node} has a default, which an artifact cannot hold")
        own = node.op == "get_attr" and str(node.target).startswith(_OWN)
        if own and any(user.op != "call_module" for user in node.users):
            raise ArtifactError(f"{node.target} is read by something that is no quantizer")


def _signature(graph: Graph, data: Mapping[str, Any]) -> _PyTreeInfo:
    """How the graph is called: (args, kwargs), and what it returns."""
    taken = spec_from_json(data["in_spec"])
    given = None if data["out_spec"] is None else spec_from_json(data["out_spec"])
    parts = taken.children() if taken.type is tuple else []
    if [part.type for part in parts] != [tuple, dict]:
        raise ArtifactError("the inputs in the file are not positional and keyword arguments")
    names = [argument_name(name) for name in data["inputs"]]
    keywords = [argument_name(name) for name in parts[1].context]
    if len(names) != parts[0].num_children + len(keywords):
        raise ArtifactError("the names in the file do not fit its inputs")
    if taken.num_leaves != len(graph.find_nodes(op="placeholder")):
        raise ArtifactError("the inputs in the file do not fit its graph")
    returned = graph.output_node().args[0]
    if given is not None and (
        not isinstance(returned, tuple | list) or len(returned) != given.num_leaves
    ):
        raise ArtifactError("the outputs in the file do not fit its graph")
    return _PyTreeInfo(names, taken, given)


def _function(name: str, libraries: Collection[str]) -> Callable[..., Any]:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    parts = [identifier(part) for part in str(name).split(".")]
    if len(parts) != 3 or parts[0] not in (*NAMESPACES, *libraries):
        raise ArtifactError(
            f"the file calls {name!r}, which is not allowed; if it is an op of a library that you "
            f"trust, import that and pass libraries=[{parts[0]!r}]"
        )
    packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
    overload = getattr(packet, parts[2], None)
    if not isinstance(overload, torch._ops.OpOverload):
        raise ArtifactError(f"the file calls {name!r}, which this version of torch does not have")
    check_overload(overload, libraries)
    return overload


def _to_json(value: Any, node: Node, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise ArtifactError(f"the arguments of {node.name} are nested too deeply")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return plain_text(value)
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
    if depth > MAX_DEPTH:
        raise ArtifactError("the arguments of a node are nested too deeply")
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return plain_text(value)
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
    found = vars(torch).get(identifier(content))  # getattr would import torch's lazy modules
    if not isinstance(found, dict(_ENUMS)[kind]):
        raise ArtifactError(f"{content!r} is no {kind}")
    return found


def _module_to_json(name: str, owner: nn.Module) -> dict[str, Any]:
    if isinstance(owner, TrainingFlag):
        return {"type": "TrainingFlag"}
    if isinstance(owner, BiasQuantizer):
        signs = {"input_signed": owner.input_signed, "weight_signed": owner.weight_signed}
        options = {"power_of_two": owner.power_of_two, "axis": owner.axis}
        return {"type": "BiasQuantizer", **signs, **options}
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
        "power_of_two": spec.power_of_two,
    }


def _module_from_json(entry: Mapping[str, Any]) -> nn.Module:
    kind = entry["type"]
    if kind == "TrainingFlag":
        return TrainingFlag()
    if kind == "BiasQuantizer":
        signs = entry["input_signed"] is True, entry["weight_signed"] is True
        axis = entry.get("axis")
        if axis not in (None, 0, 1, 2, 3, 4):
            raise ArtifactError(f"the file has a bias along axis {axis!r}")
        return BiasQuantizer(*signs, entry.get("power_of_two") is True, axis)
    if kind != "Quantizer":
        raise ArtifactError(f"the file holds a module of type {kind!r}, which is not known")
    widths = entry["bit_widths"]
    if not all(type(b) is int and allowed_bit_width(b) for b in widths):
        raise ArtifactError(f"the file has bit-widths that no quantizer can take: {widths}")
    spec = QuantizerSpec(
        Role(entry["role"]),
        entry["signed"] is True,
        tuple(widths),
        tuple(int(s) for s in entry["gate_shape"]),
        tuple(int(s) for s in entry["range_shape"]),
        entry["batched"] is True,
        entry.get("power_of_two") is True,
    )
    return Quantizer(spec, torch.device("meta"))


def _install(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at a dotted path; its tensors are those that stand there already."""
    owner, _, last = tensor_path(name).rpartition(".")
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
        bits = old.get_buffer("bits")
        shapes = (tuple(module.log_range.shape), tuple(bits.shape))
        if shapes != (module.spec.range_shape, module.spec.gate_shape):
            raise ArtifactError(f"the range or the bits of {name} have the wrong shape")
        if not module.log_range.is_floating_point() or not bool(module.log_range.isfinite().all()):
            raise ArtifactError(f"the range of {name} is not a finite number")
        if bits.dtype.is_floating_point or bits.dtype.is_complex or bits.dtype is torch.bool:
            raise ArtifactError(f"the bits of {name} are no whole numbers, but {bits.dtype}")
        widths = torch.tensor(module.spec.bit_widths, dtype=torch.int64)
        if not bool(torch.isin(bits.long(), widths).all()):
            raise ArtifactError(f"{name} has bits that are not among its bit-widths")
        module.bits = bits.to(BITS_DTYPE)  # earlier files have wider ones
    parent.add_module(last, module)
