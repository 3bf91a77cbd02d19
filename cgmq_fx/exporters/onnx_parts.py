"""Ops of a model that an ONNX file writes as several: which nodes are one of them.

A runtime's memory is planned for the ops of the model (`passes/liveness.py`), and what is between
the parts of a GLU or of a norm is no tensor of the model. So nodes of a file say which op they are
a part of. That is not believed: parts are one op only if all of them are known, none multiplies and
accumulates or rounds to codes, and a single value leaves them. They count as the op that they name
only where they can be it. Whatever they keep is counted in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.export import ExportedProgram

from cgmq_fx.exporters.onnx_ops import COMPUTE, OPS, UNKNOWN
from cgmq_fx.passes.oplists import FREE, GRID_PRESERVING, IN_PLACE, JOINS, PADS, READS, VIEWS

KEY = "cgmq_fx.op"
"""The property of a node that names the op."""

_TRACE = "pkg.torch.onnx.stack_trace"
_PARTS = frozenset(OPS) - frozenset(COMPUTE) - {"QuantizeLinear", "DequantizeLinear"}
"""What ops may have as parts."""

_WHOLE = {str(op): op for op in FREE - VIEWS - JOINS}
"""Ops that may have parts, by name."""


def name_ops(program: ExportedProgram) -> None:
    """Note every op where torch.onnx hands it on to all that it writes for it."""
    for node in program.graph.nodes:
        node.meta["stack_trace"] = (
            f"{node.target} {node.name}" if str(node.target) in _WHOLE else ""
        )


def keep_names(model: Any) -> None:
    """Let the nodes of a model of onnx_ir say what they are a part of, and drop all other notes."""
    names = [node.metadata_props.get(_TRACE, "") for node in model.graph]
    for node, name in zip(model.graph, names, strict=True):
        node.metadata_props.clear()
        if name.partition(" ")[0] in _WHOLE and names.count(name) > 1:
            node.metadata_props[KEY] = name


@dataclass(frozen=True)
class Whole:
    """Nodes that are one op.

    Attributes:
        target: The ATen op that counts as they do.
        nodes: The nodes, in the order of the file.
        inputs: The values that they read from elsewhere; those that vary come first.
        output: The value that leaves them.
    """

    target: Any
    nodes: tuple[Any, ...]
    inputs: tuple[str, ...]
    output: str

    @property
    def made(self) -> tuple[str, ...]:
        """The first values of all nodes."""
        return tuple(node.output[0] for node in self.nodes)


def wholes(
    nodes: Sequence[Any],
    outputs: Sequence[str],
    varying: frozenset[str],
    reads: Callable[[Any], Sequence[str]],
    sizes: Callable[[str], int],
) -> list[Whole]:
    """The ops that are written as several nodes.

    Args:
        nodes: The nodes of a file that data flows through.
        outputs: Names of the values that the file returns.
        varying: Names of the values that depend on its inputs.
        reads: The values that a node reads as data.
        sizes: The number of elements of a value.
    """
    groups: dict[str, list[Any]] = {}
    readers: dict[str, list[Any]] = {}
    for node in nodes:
        for name in reads(node):
            readers.setdefault(name, []).append(node)
        for prop in node.metadata_props:
            if prop.key == KEY and not varying.isdisjoint(node.output):
                groups.setdefault(prop.value, []).append(node)
    found = (
        _whole(name.partition(" ")[0], group, set(outputs), varying, reads, readers, sizes)
        for name, group in groups.items()
        if len(group) > 1
    )
    return [whole for whole in found if whole is not None]


def _whole(
    name: str,
    nodes: Sequence[Any],
    outputs: set[str],
    varying: frozenset[str],
    reads: Callable[[Any], Sequence[str]],
    readers: Mapping[str, Sequence[Any]],
    sizes: Callable[[str], int],
) -> Whole | None:
    target = _WHOLE.get(name)
    if target is None or any(n.op_type not in _PARTS for n in nodes):
        return None
    own, made = {id(node) for node in nodes}, [out for node in nodes for out in node.output]
    leaving = [
        out
        for out in made
        if out in outputs or any(id(user) not in own for user in readers.get(out, ()))
    ]
    if len(leaving) != 1:
        return None
    inputs = dict.fromkeys(n for node in nodes for n in reads(node) if n not in made)
    ordered = sorted(inputs, key=lambda n: n not in varying)
    live = [n for n in ordered if n in varying]
    if not live:
        return None
    looks_up = target in READS and any(
        n.op_type.startswith("Gather") and n.input[1] in varying for n in nodes
    )
    if looks_up or not _fits(target, nodes, live, leaving[0], sizes):
        target = UNKNOWN
    return Whole(target, tuple(nodes), tuple(ordered), leaving[0])


def _fits(
    target: Any, nodes: Sequence[Any], live: Sequence[str], output: str, sizes: Callable[[str], int]
) -> bool:
    """Whether parts can be an op that has its memory, or its grid, from its only input."""
    if target in PADS or len(live) != 1:
        return False
    if target in GRID_PRESERVING and not all(
        OPS.get(n.op_type, (None,))[0] in GRID_PRESERVING | JOINS for n in nodes
    ):
        return False
    return target not in IN_PLACE or sizes(live[0]) == sizes(output)
