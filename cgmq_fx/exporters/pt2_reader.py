"""What a `.pt2` file costs, read from the file alone.

`torch.export.load` is not used: what it may execute of a file that is not trusted is not known. The
archive is a zip with JSON and raw tensors; the graph in it goes through the same checks as that of
the library's own artifact (`graph_json`), and its shapes are worked out anew.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from cgmq_fx.cost_models.errors import ArtifactError
from cgmq_fx.exporters.code_bits import Array, Shape
from cgmq_fx.exporters.cost_graph import CostGraph, Counted, Manifest
from cgmq_fx.exporters.pt2_norms import compose_norms
from cgmq_fx.graph_json import graph_from_json
from cgmq_fx.passes.inputs import ExampleInputs
from cgmq_fx.passes.shapes import DOUBLED, CompareBatches, PropagateShapes

MANIFEST = "cgmq_fx.json"
_ATEN = torch.ops.aten
_MOST_BYTES = 1 << 32
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
    28: torch.uint16,
}
"""The numbers that torch.export gives to dtypes."""

_CODES = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32)
_FORMATS = {
    1: "contiguous_format",
    2: "channels_last",
    3: "channels_last_3d",
    4: "preserve_format",
}
_WITHOUT_COST = ("layout", "device", "pin_memory")
_KINDS = ("as_int", "as_ints", "as_float", "as_floats", "as_bool", "as_bools", "as_string")


def read_pt2(path: Path) -> Counted:
    """Read a file; nothing in it is executed.

    Raises:
        ArtifactError: If it is not a file that this library exported, is damaged, or holds
            something that cannot be counted.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            files = _Files(archive, path)
            manifest = Manifest.from_json(files.json(f"extra/{MANIFEST}"), str(path))
            program = files.json("models/model.json")["graph_module"]
            module, names = _graph(program, files)
        inputs = _inputs(program, manifest.batch)
        compose_norms(module)
        PropagateShapes(inputs, trusted=False).run(module)
        CompareBatches(inputs.twice, trusted=False).run(module)
        graph, outputs = _Reader(module, names, manifest).read()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    except zipfile.BadZipFile as error:
        raise ArtifactError(f"{path} is not a .pt2 file, or is damaged: {error}") from error
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return Counted(graph, tuple(outputs), manifest)


class _Files:
    """The files of an archive, under the one folder that torch puts them into."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self._archive = archive
        self._path = path
        names = archive.namelist()
        if sum(info.file_size for info in archive.infolist()) > _MOST_BYTES:
            raise ArtifactError(f"{path} inflates to more than {_MOST_BYTES:,} bytes")
        self._folder = names[0].partition("/")[0] if names else ""

    def read(self, name: str) -> bytes:
        """The content of a file."""
        try:
            return self._archive.read(f"{self._folder}/{name}")
        except KeyError:
            raise ArtifactError(
                f"{self._path} has no {name}: it is not a file that cgmq_fx exported"
            ) from None

    def json(self, name: str) -> Any:
        """The content of a JSON file."""
        try:
            return json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{name} in {self._path} is no JSON: {error}") from error

    def tensors(self) -> dict[str, Tensor]:
        """The parameters, buffers and constants by name."""
        found = {}
        for kind, config in (
            ("weights", "model_weights_config.json"),
            ("constants", "model_constants_config.json"),
        ):
            for name, entry in self.json(f"data/{kind}/{config}")["config"].items():
                if entry["use_pickle"] is not False:
                    raise ArtifactError(f"{name} is pickled, and will not be unpickled")
                content = self.read(f"data/{kind}/{entry['path_name']}")
                found[name] = _tensor(content, entry["tensor_meta"])
        return found


def _tensor(content: bytes, meta: Mapping[str, Any]) -> Tensor:
    sizes, strides = ([int(s["as_int"]) for s in meta[key]] for key in ("sizes", "strides"))
    offset, dtype = int(meta["storage_offset"]["as_int"]), _DTYPES[meta["dtype"]]
    if prod(sizes) == 0 or not content:
        return torch.empty(sizes, dtype=dtype)
    flat = torch.frombuffer(bytearray(content), dtype=dtype)
    return flat.as_strided(sizes, strides, offset).clone()


def _graph(program: Mapping[str, Any], files: _Files) -> tuple[GraphModule, dict[str, str]]:
    """The graph, and the name that every tensor of the state has in the file."""
    tensors, root = files.tensors(), nn.Module()
    rows: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for put, spec in zip(
        program["graph"]["inputs"], program["signature"]["input_specs"], strict=True
    ):
        ((kind, entry),) = spec.items()
        if kind == "constant_input":
            continue  # its value stands in the graph
        name = put["as_tensor"]["name"] if "as_tensor" in put else None
        if kind == "user_input" and name is not None:
            rows.append(_row("placeholder", name, name))
            continue
        stated = next((v for k, v in entry.items() if k.endswith("_name")), None)
        if name is None or stated not in tensors:
            raise ArtifactError(f"an input of the graph, a {kind}, is not known")
        target = f"state_{len(names)}"
        names[target] = str(stated)
        root.register_buffer(target, tensors[stated])
        rows.append(_row("get_attr", name, target))
    for node in program["graph"]["nodes"]:
        rows += _node_rows(node)
    given = [_argument(out) for out in program["graph"]["outputs"]]
    rows.append(_row("output", "output", "output", [given]))
    data: dict[str, Any] = {
        "nodes": rows,
        "modules": {},
        "inputs": None,
        "in_spec": None,
        "out_spec": None,
    }
    return graph_from_json(data, root), names


def _row(op: str, name: str, target: str, args: Any = (), kwargs: Any = None) -> dict[str, Any]:
    return {
        "op": op,
        "name": name,
        "target": target,
        "args": list(args),
        "kwargs": kwargs or {},
        "module": "",
    }


def _node_rows(node: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A call; where it returns a list, the elements are calls of their own.

    One that returns nothing asserts something, which costs nothing.
    """
    if not node["outputs"]:
        return []
    target = str(node["target"]).removeprefix("torch.ops.").replace("_operator.", "operator.")
    positional = [_argument(put["arg"]) for put in node["inputs"] if put.get("kind", 1) == 1]
    keywords = {
        put["name"]: _argument(put["arg"])
        for put in node["inputs"]
        if put.get("kind", 1) == 2 and put["name"] not in _WITHOUT_COST
    }
    ((kind, value),) = node["outputs"][0].items()
    if kind == "as_tensors" or len(node["outputs"]) > 1:
        rows = value if kind == "as_tensors" else [out["as_tensor"] for out in node["outputs"]]
        name = f"list_of_{rows[0]['name']}"
        parts = [
            _row("call_function", row["name"], "operator.getitem", [{"node": name}, index])
            for index, row in enumerate(rows)
        ]
        return [_row("call_function", name, target, positional, keywords), *parts]
    name = value["name"] if "name" in value else value["as_name"]
    return [_row("call_function", name, target, positional, keywords)]


def _argument(argument: Mapping[str, Any]) -> Any:
    """An argument in the form that `graph_json` reads."""
    ((kind, value),) = argument.items()
    if kind == "as_tensor":
        return {"node": value["name"]}
    if kind == "as_tensors":
        return [{"node": v["name"]} for v in value]
    if kind == "as_optional_tensors":
        return [_argument(v) for v in value]
    if kind in _KINDS:
        return {"float": value} if isinstance(value, str) and kind == "as_float" else value
    if kind in ("as_sym_int", "as_sym_bool", "as_sym_float"):
        return {"node": value["as_name"]} if "as_name" in value else next(iter(value.values()))
    if kind == "as_sym_ints":
        return [_argument({"as_sym_int": v}) for v in value]
    if kind == "as_scalar_type":
        return {"dtype": str(_DTYPES[value]).removeprefix("torch.")}
    if kind == "as_memory_format":
        return {"memory_format": _FORMATS[value]}
    if kind in ("as_none", "as_layout", "as_device"):
        return None
    raise ArtifactError(f"an argument of kind {kind!r} is not known")


def _inputs(program: Mapping[str, Any], batch: int) -> ExampleInputs:
    """Inputs of the shapes that the file states; the batch is the only size that is free."""
    graph, specs = program["graph"], program["signature"]["input_specs"]
    values = graph["tensor_values"]
    given, free = [], []
    for put, spec in zip(graph["inputs"], specs, strict=True):
        if "user_input" not in spec:
            continue
        meta = values[put["as_tensor"]["name"]] if "as_tensor" in put else None
        if meta is None:
            raise ArtifactError("an input of the graph is no tensor")
        sizes = [int(size.get("as_int", batch)) for size in meta["sizes"]]
        given.append(torch.zeros(()).to(_DTYPES[meta["dtype"]]).expand(sizes))
        free.append(any("as_int" not in size for size in meta["sizes"][:1]))
    return ExampleInputs(tuple(given), batched=tuple(free))


class _Reader:
    """Turns a graph of ATen ops into one that costs the same, finding codes on the way."""

    def __init__(self, module: GraphModule, names: Mapping[str, str], manifest: Manifest) -> None:
        self._module = module
        self._names = names
        self._manifest = manifest
        self._graph = CostGraph()
        self._made: dict[Node, Any] = {}
        self._grids: dict[tuple[Any, ...], Any] = {}

    def read(self) -> tuple[CostGraph, list[Node]]:
        """Walk through the nodes in order."""
        for node in self._module.graph.nodes:
            if node.op == "output":
                outputs = [n for n in pytree.tree_leaves(node.args) if isinstance(n, Node)]
                return self._graph, [self._value(n) for n in outputs]
            if node.op == "placeholder":
                self._made[node] = self._graph.input(*_described(node))
            elif node.op == "call_function":
                self._made[node] = self._dequantized(node) or self._call(node)
            if DOUBLED in node.meta:
                self._graph.doubled(self._made[node], node.meta[DOUBLED])
        raise ArtifactError("the graph has no output")

    def _call(self, node: Node) -> Any:
        value = node.meta["val"]
        args, kwargs = map_arg((node.args, node.kwargs), self._value)
        options: dict[str, Any] = {k: v for k, v in kwargs.items() if k != "dtype"}
        if not isinstance(value, Tensor):
            made = self._graph.call(node.target, args, (), **options)
            made.meta["val"] = value  # a size too: what is as large as the batch is live
            return made
        return self._graph.call(node.target, args, *_described(node), **options)

    def _value(self, node: Node) -> Any:
        if node not in self._made:
            self._made[node] = self._graph.state(*_described(node))
        return self._made[node]

    def _dequantized(self, node: Node) -> Node | None:
        """What stands for codes times steps, if `node` is that."""
        if node.target is not _ATEN.mul.Tensor or not all(isinstance(a, Node) for a in node.args):
            return None
        codes, step = _source(node.args[0]), self._constant(node.args[1])
        if codes is None or step is None:
            return None
        name = self._name(node.args[1])
        if codes.op == "get_attr":
            return self._stored(codes, step)
        rounded = codes.args[0]
        limits = self._limits(rounded)
        if limits is None or not isinstance(rounded, Node):
            return None
        divided: Any = rounded.all_input_nodes[0].args[0]
        source, other = divided.args
        own = self._constant(other)
        if own is None or not np.array_equal(own.ravel(), step.ravel()):
            raise ArtifactError(f"{node} rounds to another grid than its codes are read on")
        layout = self._manifest.layout(name)
        made = self._graph.activation(self._value(_rounded(source)), *limits, step, layout)
        if made.op == "call_module" and name:  # two tensors on one grid have one quantizer
            grid = (name, *(end.tobytes() for end in limits))
            made.target = self._grids.setdefault(grid, made.target)
        return made

    def _stored(self, codes: Node, step: Array) -> Node:
        values = self._constant(codes)
        assert values is not None
        if values.dtype == np.int32:
            return self._graph.state(values.shape, torch.int32)
        layout = self._manifest.layout(self._names[str(codes.target)])
        return self._graph.weight(values, step.shape if step.size > 1 else (), layout)

    def _limits(self, node: Any) -> tuple[Array, Array] | None:
        """The limits of codes, if `node` is a clamp of a rounded quotient."""
        if not isinstance(node, Node) or node.target not in (
            _ATEN.clamp.default,
            _ATEN.clamp.Tensor,
        ):
            return None
        chain: Any = node
        for target in (_ATEN.round.default, _ATEN.div.Tensor):
            chain = chain.args[0]
            if not isinstance(chain, Node) or chain.target is not target:
                return None
        ends = [
            self._constant(end) if isinstance(end, Node) else np.array(end)
            for end in node.args[1:3]
        ]
        if len(ends) != 2 or ends[0] is None or ends[1] is None:
            return None
        return ends[0].astype(np.int64), ends[1].astype(np.int64)

    def _name(self, node: Any) -> str:
        """The name of the step that is read, behind views."""
        while isinstance(node, Node) and node.op == "call_function":
            node = node.args[0]
        return self._names.get(str(node.target), "") if isinstance(node, Node) else ""

    def _constant(self, node: Any) -> Array | None:
        """A value that can be told without running anything: state, views, rows of numbers."""
        if not isinstance(node, Node):
            return None
        if node.op == "get_attr":
            found: Array = self._module.get_buffer(str(node.target)).numpy()
            return found
        if node.target is _ATEN.view.default:
            inner = self._constant(node.args[0])
            return None if inner is None else inner.reshape(node.args[1])  # type: ignore[arg-type]
        if node.target is _ATEN.new_full.default:
            return np.full(node.args[1], node.args[2])  # type: ignore[arg-type]
        if node.target is _ATEN.cat.default:
            parts = [self._constant(part) for part in node.args[0]]  # type: ignore[union-attr]
            known = [part for part in parts if part is not None]
            return np.concatenate(known) if len(known) == len(parts) else None
        return None


def _source(node: Any) -> Node | None:
    """The codes behind a cast to float: a tensor of the state, or a cast to a container."""
    if not isinstance(node, Node) or node.target is not _ATEN._to_copy.default:
        return None
    codes = node.args[0]
    value = codes.meta.get("val") if isinstance(codes, Node) else None
    if not isinstance(codes, Node) or not isinstance(value, Tensor) or value.dtype not in _CODES:
        return None
    return codes if codes.op == "get_attr" or codes.target is _ATEN._to_copy.default else None


def _rounded(node: Node) -> Node:
    """What is rounded: it is float32 as steps are, if need be by a cast."""
    inner = node.args[0] if node.target is _ATEN._to_copy.default else None
    if not isinstance(inner, Node) or _described(node)[1] is not torch.float32:
        return node
    return inner if _described(inner)[1].is_floating_point else node


def _described(node: Node) -> tuple[Shape, torch.dtype]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        value = torch.empty(())
    return tuple(int(size) for size in value.shape), value.dtype
