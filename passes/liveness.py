"""Liveness: which tensors a runtime keeps, from when to when, and on whose grid.

Steps are the ops that write a tensor of their own, in the order of the graph. Views are not tensors
of their own; neither are element-wise ops on a tensor that nobody else reads (runtimes fuse them or
work in place), nor quantizers, unless a layer that is not quantized reads the tensor as it was.
Asking for a size is not reading.

A tensor has the bits of its quantizer; one that only reaches quantizers through ops that keep a
grid (max-pool before the quantizer, say) has theirs, because a runtime quantizes before such ops.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from torch import SymInt, nn
from torch.fx import GraphModule, Node

from cgmq_fx.cost_models.facts import FLOAT_BITS, TensorFacts
from cgmq_fx.passes.aliases import last_write
from cgmq_fx.passes.oplists import IN_PLACE, JOINS
from cgmq_fx.passes.optable import is_view, preserves_grid
from cgmq_fx.passes.quantizer import Quantizer
from cgmq_fx.passes.state import bits_of, quantizer_name, quantizer_of, shape_of, value_of

_LAST = 1 << 60


def liveness(
    module: GraphModule, live: set[Node], elements: Callable[[Node], int]
) -> tuple[TensorFacts, ...]:
    """The tensors that depend on the model's input, with their lifetimes.

    Args:
        module: A graph with shapes.
        live: The nodes that depend on the input.
        elements: The elements of a node that one sample has.

    Returns:
        The tensors in the order in which they are written.
    """
    storage = _storages(module, live)
    members: dict[Node, list[Node]] = {}
    for node, root in storage.items():
        members.setdefault(root, []).append(node)
    steps = {root: step for step, root in enumerate(members)}
    widths = _quantizers(module, members)
    return tuple(
        TensorFacts(
            name=root.name,
            elements=elements(root),
            first=0 if root.op == "placeholder" else steps[root],
            last=min(_last_use(nodes, storage, steps), len(steps) - 1),
            quantizer=widths.get(root),
            bits=_bits(root),
            copy=_is_quantizer(module, root),
        )
        for root, nodes in members.items()
    )


def _storages(module: GraphModule, live: set[Node]) -> dict[Node, Node]:
    """For every node that holds activations, the node whose memory it uses."""
    storage: dict[Node, Node] = {}
    for node in module.graph.nodes:
        if node not in live or shape_of(node) is None or node.op == "output":
            continue
        source = node.args[0] if node.args else None
        shared = (
            isinstance(source, Node)
            and source in storage
            and _shares(module, node, source, storage)
        )
        storage[node] = storage[source] if shared and isinstance(source, Node) else node
    return storage


def _shares(module: GraphModule, node: Node, source: Node, storage: dict[Node, Node]) -> bool:
    if is_view(node):
        return shape_of(node) is None or _size(node) == _size(source)
    if node.op == "call_module":
        return _is_quantizer(module, node) and not (
            _rounds(module, node) and _read_in_float(module, node, source)
        )
    return node.target in IN_PLACE and _size(node) == _size(source) and _unread(source, storage)


def _read_in_float(module: GraphModule, quantized: Node, source: Node) -> bool:
    """Whether a node reads what is rounded as it was before: a skipped layer."""
    written = last_write(source)
    readers = [u for u in _data_users(source) if u is not quantized and u is not written]
    late = [u for u in readers if written is None or written < u]
    return any(not _rounds(module, user) for user in late)


def _unread(node: Node, storage: dict[Node, Node]) -> bool:
    """Whether the memory that holds `node` has no other reader than the one of `node`."""
    while len(_data_users(node)) == 1:
        if storage[node] is node:
            return True
        node = node.args[0]  # type: ignore[assignment]  # what is shared is the first argument
    return False


def _data_users(node: Node) -> list[Node]:
    """The nodes that read the values of `node`, not only its size."""
    return [u for u in node.users if not _reads_size(u, node)]


def _reads_size(user: Node, node: Node) -> bool:
    """Whether a reader is a size, or a view in the shape of `node` of another tensor."""
    return isinstance(value_of(user), int | SymInt) or (is_view(user) and user.args[0] is not node)


def _size(node: Node) -> int:
    return prod(shape_of(node) or ())


def _bits(root: Node) -> int:
    value = value_of(root)
    return FLOAT_BITS if value is None else bits_of(value)


def _last_use(nodes: list[Node], storage: dict[Node, Node], steps: dict[Node, int]) -> int:
    """The last step that reads any view of a tensor; outputs are kept to the end."""
    last = steps[storage[nodes[0]]]
    for node in nodes:
        for user in _data_users(node):
            if user.op == "output":
                return _LAST
            for reached in _readers(user, storage):
                last = max(last, steps[storage[reached]])
    return last


def _readers(user: Node, storage: dict[Node, Node]) -> list[Node]:
    """`user`, or what it feeds if it is no tensor itself (a tuple of chunks, say)."""
    if user in storage:
        return [user]
    return [node for node in user.users if node in storage]


def _quantizers(module: GraphModule, members: dict[Node, list[Node]]) -> dict[Node, str]:
    """The quantizer of every tensor: its own, else the one that all its readers lead to."""
    import networkx as nx  # slow

    found: dict[Node, str] = {}
    root_of = {node: root for root, nodes in members.items() for node in nodes}
    flow = nx.DiGraph()
    flow.add_nodes_from(members)
    for root, nodes in members.items():
        own = [quantizer_name(n) for n in nodes if _is_quantizer(module, n)]
        inherited = quantizer_of(module, root)
        if own:
            found[root] = own[-1]
        elif inherited is not None:
            found[root] = inherited[0]
        reached = {root_of[u] for n in nodes for u in _data_users(n) if u in root_of} - {root}
        flow.add_edges_from((root, other) for other in reached)
    for root in reversed(list(nx.topological_sort(flow))):
        if root in found:
            continue
        readers = [u for n in members[root] for u in _data_users(n) if root_of.get(u) is not root]
        names = {_passed_on(u, root_of, found) for u in readers}
        if len(names) == 1 and (name := names.pop()) is not None:
            found[root] = name
    return found


def _passed_on(user: Node, root_of: dict[Node, Node], found: dict[Node, str]) -> str | None:
    """The quantizer behind a reader that keeps grids, else None."""
    keeps = preserves_grid(user) or (user.op == "call_function" and user.target in JOINS)
    return found.get(root_of[user]) if keeps and user in root_of else None


def _is_quantizer(module: GraphModule, node: Node) -> bool:
    return node.op == "call_module" and isinstance(_owner(module, node), Quantizer)


def _rounds(module: GraphModule, node: Node) -> bool:
    owner = _owner(module, node) if node.op == "call_module" else None
    return isinstance(owner, Quantizer) and not owner.passes_all


def _owner(module: GraphModule, node: Node) -> nn.Module:
    return module.get_submodule(str(node.target))
