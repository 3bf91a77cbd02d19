"""Insertion: quantizers on every operand of a compute node, and on what integer adds read."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from torch import nn
from torch.fx import GraphModule, Node

from cgmq_fx.cost_models.errors import OptionError, PassError, UnsupportedModelError
from cgmq_fx.cost_models.facts import Role
from cgmq_fx.passes.aliases import last_write
from cgmq_fx.passes.infra import Pass, PassResult, place
from cgmq_fx.passes.meeting import channel_axis, gate_shape, is_followed, weight_axis
from cgmq_fx.passes.oplists import AFFINE, AVERAGES, BINARY, INTEGER, JOINS, MOVES, READS
from cgmq_fx.passes.optable import (
    ComputeOp,
    argument,
    compute_op,
    looked_up,
    looked_up_axis,
    set_argument,
)
from cgmq_fx.passes.outputs import integer_outputs
from cgmq_fx.passes.quantizer import Quantizer, QuantizerSpec
from cgmq_fx.passes.scheme import Scheme
from cgmq_fx.passes.selection import Selection
from cgmq_fx.passes.shapes import varying_axes
from cgmq_fx.passes.sharing import steps
from cgmq_fx.passes.signs import non_negative
from cgmq_fx.passes.state import (
    is_float,
    is_parameter,
    quantizer_of,
    reachable_from_inputs,
    shape_of,
    sources,
    view_root,
)

QUANTIZERS = "cgmq_quantizers"


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor to be quantized, and the compute node that asked for it first."""

    node: Node
    role: Role
    reader: Node
    op: ComputeOp | None


def operands(node: Node, op: ComputeOp) -> tuple[Node, Node]:
    """The two factors of a compute node: activation (or first), weight (or second)."""
    return argument(node, op.activation), argument(node, op.weight)


def _wanted(module: GraphModule, live: set[Node], selection: Selection) -> dict[Node, list[_Place]]:
    """Every tensor that a compute node multiplies, with its readers; grids that pass are one."""
    wanted: dict[Node, list[_Place]] = {}
    for node in module.graph.nodes:
        op = compute_op(node)
        if op is None or selection.skips(node):
            continue
        for factor in operands(node, op):
            if not is_float(factor):
                continue
            role = Role.ACTIVATION if factor in live else Role.WEIGHT
            root = view_root(factor)
            wanted.setdefault(root, []).append(_Place(root, role, node, op))
    on_grid = {n for n in wanted if any(s in wanted for s in list(sources(n))[1:])}
    return {n: places for n, places in wanted.items() if n not in on_grid}


def _shared(module: GraphModule, wanted: Mapping[Node, list[_Place]]) -> list[list[Node]]:
    """The tensors to be quantized, in groups that share a quantizer."""
    import networkx as nx  # slow

    same = nx.Graph()
    same.add_nodes_from(wanted)
    first: dict[Hashable, Node] = {}
    for root, weight, name in steps(module):
        if root in wanted and weight in wanted and root.op != "placeholder":
            same.add_edge(root, first.setdefault(name, root))
    order = {node: i for i, node in enumerate(wanted)}
    groups = [sorted(group, key=order.__getitem__) for group in nx.connected_components(same)]
    return sorted(groups, key=lambda group: order[group[0]])


def _links(module: GraphModule, live: set[Node]) -> Iterator[_Place]:
    """Operands of element-wise sums and products, and of pools, in integers, not yet on a grid.

    Such an op is executed in integers when its result is quantized: when each of its readers,
    through ops that integer runtimes have, is a quantizer or another such op.
    """
    integer: dict[Node, bool] = {}
    for node in reversed(module.graph.nodes):
        readers = [u for u in node.users if is_float(u) or u.op == "call_module"]
        integer[node] = bool(readers) and all(
            _calls_quantizer(module, u) or (u.target in INTEGER and integer[u]) for u in readers
        )
    for node in module.graph.nodes:
        if (
            node.op != "call_function"
            or node.target not in (BINARY | AVERAGES)
            or not integer.get(node)
        ):
            continue
        for factor in node.all_input_nodes:
            root = view_root(factor)
            if factor in live and is_float(factor) and quantizer_of(module, factor) is None:
                yield _Place(root, Role.ACTIVATION, node, None)


def _outputs(module: GraphModule) -> Iterator[_Place]:
    """The network's outputs that integer kernels could make, not yet on a grid."""
    output = module.graph.output_node()
    for node in integer_outputs(module):
        if quantizer_of(module, node) is None:
            yield _Place(node, Role.ACTIVATION, output, None)


def _tables(module: GraphModule, live: set[Node], selection: Selection) -> list[list[_Place]]:
    """Tables that are looked up, with their readers, not yet on a grid.

    Not those that the model writes into, nor buffers that are only picked from: those are no
    weights (sines and cosines of positions, for example).
    """
    found: dict[Node, list[_Place]] = {}
    for node in module.graph.nodes:
        table = looked_up(node)
        if table is None or table in live or not is_float(table) or selection.skips(node):
            continue
        root = view_root(table)
        if node.target in READS and not is_parameter(module, root):
            continue
        if last_write(table) is None and quantizer_of(module, table) is None:
            found.setdefault(root, []).append(_Place(root, Role.WEIGHT, node, None))
    return list(found.values())


def _row_axis(place: _Place) -> int | None:
    """The axis of a table that runs over its rows, if they are what is looked up and ranges pay."""
    shape, axis = shape_of(place.node) or (), looked_up_axis(place.reader)
    whole = looked_up(place.reader) is place.node and axis in (0, -len(shape))
    return 0 if whole and prod(shape[1:]) > 1 else None


def _spec(scheme: Scheme, places: list[_Place], batched: bool) -> QuantizerSpec:
    first, shape = places[0], shape_of(places[0].node) or ()
    if first.role is Role.WEIGHT:
        axes = {weight_axis(p.reader, p.op) if p.op else _row_axis(p) for p in places}
        axis = axes.pop() if len(axes) == 1 else None
        gates = gate_shape("tensor" if first.op is None else scheme.weights, shape, axis)
        ranges = gate_shape(scheme.weight_ranges, shape, axis)
        return QuantizerSpec(
            first.role, True, scheme.bit_widths, gates, ranges, power_of_two=scheme.power_of_two
        )
    signed = last_write(first.node) is not None or not non_negative(first.node)
    widths, granularity = scheme.bit_widths, scheme.activations
    if first.reader.op == "output" and scheme.rounded_output is not None:
        widths, granularity = (scheme.rounded_output,), "tensor"
    elif scheme.input_bits is not None and _is_input(first.node):
        widths = (scheme.input_bits,)
    elif first.op is None:
        widths, granularity = scheme.link_widths, "tensor"
    channels = granularity == "channel" and first.op is not None
    axis = channel_axis(first.reader, first.op, first.node) if channels and first.op else None
    if axis in varying_axes(first.node):
        axis = None
    gates = gate_shape(granularity, shape, axis)
    if gates and not is_followed(first.node, gates):
        gates = ()
    return QuantizerSpec(first.role, signed, widths, gates, (), batched, scheme.power_of_two)


def _is_input(node: Node) -> bool:
    """Whether a tensor is made of inputs that were moved, or scaled and shifted by constants."""
    waiting, seen = [node], {node}
    while waiting:
        current = waiting.pop()
        origins = [current] if current.op == "placeholder" else _origins(current)
        if not origins:
            return False
        waiting += [n for n in origins if n not in seen]
        seen.update(origins)
    return True


def _origins(node: Node) -> list[Node]:
    """The tensors whose values a node moves, scales or shifts; none if it does anything else."""
    if node.op != "call_function":
        return []
    if node.target in JOINS:
        return node.all_input_nodes
    if node.target in MOVES or node.target is operator.getitem:
        return [node.args[0]] if isinstance(node.args[0], Node) else []
    inputs = [n for n in node.all_input_nodes if n.op != "get_attr"]
    return inputs if node.target in AFFINE and len(inputs) == 1 else []


def _name(module: GraphModule, node: Node) -> str:
    base = str(node.target) if node.op == "get_attr" else node.name
    base = base.replace(".", "_")
    container, name, count = module.get_submodule(QUANTIZERS), base, 1
    while hasattr(container, name):
        name, count = f"{base}_{count}", count + 1
    return name


def _make(module: GraphModule, node: Node, spec: QuantizerSpec) -> str:
    """Add a quantizer for the tensor of `node` to the module; its path."""
    name = _name(module, node)
    container = module.get_submodule(QUANTIZERS)
    container.add_module(name, Quantizer(spec, node.meta["val"].device))
    return f"{QUANTIZERS}.{name}"


def _insert(module: GraphModule, node: Node, path: str, selection: Selection) -> None:
    """Call a quantizer behind `node`; all that read its values read the quantizer instead.

    Layers that are skipped go on reading `node` itself.
    """
    written = last_write(node)
    with module.graph.inserting_before(_first_reader(node, written)):
        call = module.graph.call_module(path, (node,))
    call.meta = {
        k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack", "stack_trace")
    }
    for user in list(node.users):
        late = written is None or written < user
        skipped = compute_op(user) is not None and selection.skips(user)
        if user is not call and late and not skipped and not _reads_size_only(user):
            user.replace_input_with(node, call)


def _first_reader(node: Node, written: Node | None) -> Node:
    """Where to insert: before the first reader, for state and inputs; else right behind `node`.

    A tensor that is written in place is complete only behind the last op that does so.
    """
    if written is not None:
        return written.next
    return min(node.users) if node.op in ("placeholder", "get_attr") else node.next


def _reads_size_only(user: Node) -> bool:
    return getattr(user.target, "_opname", "") in ("sym_size", "sym_numel", "sym_stride", "size")


@dataclass(frozen=True)
class InsertQuantizers(Pass):
    """Insert a quantizer on every factor of every compute node, one per tensor (see `sharing`).

    Before: a normalised graph with shapes. After: every floating-point factor of every compute node
    that the scheme does not skip is on the grid of exactly one quantizer, whatever views, max-pools
    and slices lie in between; results that are never negative are unsigned, all else is signed; the
    operands of adds whose result is quantized are on grids of their own, of at most 8 bits, so that
    an integer runtime can rescale and add them; if the scheme says so, the outputs of the network
    that integer kernels make (`integer_outputs`) are on grids as well.

    Attributes:
        scheme: Bit-widths and granularity.
        batched: Whether dimension 0 of activations is the batch.
    """

    scheme: Scheme
    batched: bool = True

    def run(self, module: GraphModule) -> PassResult:
        """Insert all quantizers."""
        if not any(compute_op(n) for n in module.graph.nodes):
            raise UnsupportedModelError(
                "there is nothing to quantize: the graph has no node that multiplies and "
                "accumulates"
            )
        module.add_module(QUANTIZERS, nn.Module())
        selection = Selection(self.scheme, module.graph)
        wanted = _wanted(module, reachable_from_inputs(module.graph), selection)
        for group in _shared(module, wanted):
            places = [p for node in group for p in wanted[node]]
            scheme = selection.scheme_of((p.reader for p in places), places[0].role)
            specs = [_spec(scheme, wanted[node], self.batched) for node in group]
            signed = {own.gate_shape for own in specs if own.signed}
            paths: dict[tuple[int, ...], str] = {}
            for node, own in zip(group, specs, strict=True):
                gates = own.gate_shape
                if gates not in paths:
                    spec = replace(own, signed=gates in signed)
                    paths[gates] = _make(module, node, spec)
                _insert(module, node, paths[gates], selection)
        if self.scheme.rounded_output is not None:
            self._insert_all(module, selection, ([place] for place in _outputs(module)))
            _fix_outputs(module, self.scheme.rounded_output)
        tables = _tables(module, reachable_from_inputs(module.graph), selection)
        self._insert_all(module, selection, tables)
        links = _links(module, reachable_from_inputs(module.graph))
        self._insert_all(module, selection, ([place] for place in links))
        _make_dense(module)
        if self.scheme.input_bits is not None and not _has_input_quantizer(module):
            raise OptionError(
                "input_bits fixes nothing: no layer that is quantized reads an input of the "
                "network, as it is, moved, or scaled and shifted by constants"
            )
        return PassResult(module, modified=True)

    def _insert_all(
        self, module: GraphModule, selection: Selection, groups: Iterable[list[_Place]]
    ) -> None:
        """Insert a quantizer on every tensor, but where an earlier one has put it on a grid."""
        for places in list(groups):
            node, reader = places[0].node, places[0].reader
            if reader.op != "output" and selection.skips(reader):
                continue
            if quantizer_of(module, node) is None and not _is_quantized(module, node):
                scheme = selection.scheme_of((p.reader for p in places), places[0].role)
                spec = _spec(scheme, places, self.batched)
                _insert(module, node, _make(module, node, spec), selection)

    def check(self, module: GraphModule) -> None:
        """Every factor of every compute node that is not skipped is on a grid."""
        selection = Selection(self.scheme, module.graph)
        for node in module.graph.nodes:
            op = None if selection.skips(node) else compute_op(node)
            for factor in operands(node, op) if op else ():
                if is_float(factor) and quantizer_of(module, factor) is None:
                    raise PassError(f"{factor} of {node} ({place(node)}) has no quantizer")


def _make_dense(module: GraphModule) -> None:
    """Let tables on a grid have dense gradients: rounding has one in every row."""
    for node in module.graph.nodes:
        table = looked_up(node)
        if table is None or quantizer_of(module, table) is None:
            continue
        for name in ("sparse", "sparse_grad"):
            if argument(node, name, False):
                set_argument(node, name, False)


def _fix_outputs(module: GraphModule, bits: int) -> None:
    """Let quantizers that the network's outputs are on take `bits` only."""
    for node in integer_outputs(module):
        found = quantizer_of(module, node)
        if found is not None:
            found[1].spec = replace(found[1].spec, bit_widths=(bits,))


def _has_input_quantizer(module: GraphModule) -> bool:
    nodes = (n for n in module.graph.nodes if _calls_quantizer(module, n))
    return any(_is_input(n.all_input_nodes[0]) for n in nodes)


def _is_quantized(module: GraphModule, node: Node) -> bool:
    """Whether a quantizer reads `node` already."""
    return any(_calls_quantizer(module, user) for user in node.users)


def _calls_quantizer(module: GraphModule, node: Node) -> bool:
    return node.op == "call_module" and isinstance(
        module.get_submodule(str(node.target)), Quantizer
    )
