"""Annotation: the facts of every node that multiplies or stores something."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import SymInt, Tensor, nn
from torch.fx import GraphModule, Node

from cgmq_fx.cost_models.facts import (
    GraphFacts,
    NodeFacts,
    Operand,
    Pruning,
    QuantizerFacts,
    Role,
    Stored,
)
from cgmq_fx.passes.bias import BIASES
from cgmq_fx.passes.channels import removable_channels
from cgmq_fx.passes.infra import module_path, place
from cgmq_fx.passes.insert import QUANTIZERS, operands
from cgmq_fx.passes.liveness import liveness
from cgmq_fx.passes.meeting import meeting
from cgmq_fx.passes.opaque import OpaqueCall, opaque_call
from cgmq_fx.passes.optable import ComputeOp, compute_op, is_known
from cgmq_fx.passes.pairing import Met
from cgmq_fx.passes.quantizer import BiasQuantizer, Quantizer
from cgmq_fx.passes.samples import Samples
from cgmq_fx.passes.state import (
    bits_of,
    groups_of,
    quantizer_name,
    quantizer_of,
    shape_of,
    tensor_at,
    value_of,
)
from cgmq_fx.passes.tracing import assumptions

_OWN = (QUANTIZERS, BIASES)


def _operands(
    module: GraphModule,
    node: Node,
    op: ComputeOp,
    samples: Samples,
    pruning: Pruning | None,
) -> tuple[Operand, ...]:
    """Weight first, then activation; of two activations, in the order of the op."""
    first, second = operands(node, op)
    found = quantizer_of(module, first), quantizer_of(module, second)
    met = meeting(module, node, op, pruning.gates[1] if pruning else None)
    rows = [
        replace(_operand(first, found[0], met[0], samples), pruning=pruning),
        _operand(second, found[1], met[1], samples),
    ]
    return tuple(sorted(rows, key=lambda row: row.role is not Role.WEIGHT))


def _prunings(module: GraphModule) -> tuple[dict[Node, Pruning], dict[Node, Pruning]]:
    """Channels that can be removed, by the nodes that make them and by those that read them."""
    makers, readers = {}, {}
    for channels in removable_channels(module):
        makers[channels.maker] = Pruning(channels.weight, channels.gates)
        readers.update(dict.fromkeys(channels.readers, makers[channels.maker]))
    return makers, readers


def _shortened(stored: list[Stored], own: Pruning | None) -> list[Stored]:
    """What a layer stores, told that what has no quantizer (its bias) gets shorter with it."""
    return [s if s.quantizer else replace(s, pruning=own) for s in stored]


def _operand(
    node: Node,
    found: tuple[str, Quantizer] | None,
    met: Met,
    samples: Samples,
) -> Operand:
    elements = samples.elements(node)
    role = Role.ACTIVATION if node in samples.live else Role.WEIGHT
    return Operand(role, elements, found[0] if found else None, met.shape, order=met.order)


def _stored(module: GraphModule) -> dict[Node, list[Stored]]:
    """What the graph keeps, by the first node that uses it."""
    result: dict[Node, list[Stored]] = {}
    seen: set[int] = set()
    for node in module.graph.nodes:
        tensor = tensor_at(module, node.target) if node.op == "get_attr" else None
        if tensor is None or str(node.target).startswith(_OWN):
            continue
        for path, copy in _forms(module, node, known=id(tensor) in seen):
            reader, quantizer, bits = _first_use(module, path, bits_of(tensor))
            row = Stored(str(node.target), tensor.numel(), quantizer, bits, copy=copy)
            result.setdefault(reader, []).append(row)
        seen.add(id(tensor))
    for node in module.graph.nodes:
        call = opaque_call(module, node)
        for name, tensor in call.state() if call is not None else ():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                bits = bits_of(tensor)
                result.setdefault(node, []).append(Stored(name, tensor.numel(), None, bits))
    return result


def _forms(module: GraphModule, node: Node, known: bool) -> list[tuple[Node, bool]]:
    """The forms in which a tensor is stored: the first reader of each, and whether it is a copy.

    A weight is stored on its grid, and in float as well if a layer that is not quantized reads it,
    too; a bias once for every grid that it is rounded to, and in float if anything reads it so and
    no node before did (`known`). What nothing reads is stored as it is.
    """
    readers = [u for u in node.users if not isinstance(value_of(u), int | SymInt)]
    biases = sorted(u for u in readers if isinstance(_called(module, u), BiasQuantizer))
    if known:
        return [(reader, False) for reader in biases]
    weights = [u for u in readers if _rounds(module, u)]
    plain = sorted(u for u in readers if u not in biases and u not in weights)[:1]
    forms = [*plain, *weights, *biases] or [node]
    return sorted((reader, bool(plain) and reader in weights) for reader in forms)


def _rounds(module: GraphModule, node: Node) -> bool:
    owner = _called(module, node)
    return isinstance(owner, Quantizer) and not owner.passes_all


def _called(module: GraphModule, node: Node) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _first_use(module: GraphModule, user: Node, bits: int) -> tuple[Node, str | None, int]:
    """The op behind a reader, the quantizer on the way, and the bits if there is none."""
    quantizer: str | None = None
    while True:
        owner = _called(module, user)
        if isinstance(owner, Quantizer):
            quantizer = quantizer_name(user)
        elif isinstance(owner, BiasQuantizer):
            bits = 32
        if owner is None or not user.users:
            return user, quantizer, bits
        user = min(user.users)


def _facts(
    module: GraphModule,
    node: Node,
    stored: list[Stored],
    samples: Samples,
    pruning: Pruning | None,
) -> NodeFacts:
    op, shape = compute_op(node), shape_of(node) or ()
    macs = 0
    factors: tuple[Operand, ...] = ()
    if op is not None:
        macs = samples.count(op.macs, *operands(node, op), node)
        factors = _operands(module, node, op, samples, pruning)
    return NodeFacts(
        name=node.name,
        op=str(node.target),
        macs=macs,
        operands=factors,
        output_elements=samples.elements(node) if shape else 0,
        output_shape=shape,
        groups=groups_of(node) if op else 1,
        stored=tuple(stored),
        module=module_path(node),
    )


def _opaque_facts(node: Node, call: OpaqueCall, stored: list[Stored], batch: int) -> NodeFacts:
    """A module that runs as it is: float operands, and the MACs that torch's counter found."""
    macs = call.macs // batch
    factors = (Operand(Role.WEIGHT, 0, None), Operand(Role.ACTIVATION, 0, None))
    return NodeFacts(
        name=node.name,
        op="opaque",
        macs=macs,
        operands=factors if macs else (),
        stored=tuple(stored),
        module=call.path,
    )


def _is_constant_integers(node: Node, live: set[Node]) -> bool:
    """Whether an op gives the same integers whatever the inputs are: places, not arithmetic."""
    made = value_of(node)
    if node in live or not isinstance(made, Tensor):
        return False
    return not (made.is_floating_point() or made.is_complex())


def _quantizer_facts(module: GraphModule, samples: Samples) -> Iterator[QuantizerFacts]:
    for node in module.graph.nodes:
        owner = _called(module, node)
        if not isinstance(owner, Quantizer):
            continue
        spec, elements = owner.spec, samples.elements(node)
        yield QuantizerFacts(
            quantizer_name(node), spec.role, owner.bits.numel(), spec.bit_widths, elements
        )


def annotate(module: GraphModule, batch: int) -> GraphFacts:
    """The facts of a graph: of every node that costs something, its quantizers and its tensors.

    Args:
        module: A graph with shapes; quantizers may be in it or not.
        batch: The batch size of the example. What a sample has is told by shapes at twice that,
            where the graph has them, else by sizes alone.

    Returns:
        The facts, in execution order. Ops that no table knows are listed in `unknown`, unless they
        give integers and depend on no input; modules that run as they are in `opaque`, and the MACs
        of those are what torch's counter finds, in float.
    """
    samples = Samples.of(module.graph, batch)
    stored, (makers, readers) = _stored(module), _prunings(module)
    stored.update({n: _shortened(stored[n], p) for n, p in makers.items() if n in stored})
    nodes, unknown, opaque = [], [], []
    for node in module.graph.nodes:
        own = stored.get(node, [])
        kept = opaque_call(module, node)
        if kept is not None:
            nodes.append(_opaque_facts(node, kept, own, batch))
            opaque.append(f"{kept.path} ({type(kept.inner).__name__})")
        elif compute_op(node) is not None or node in stored:
            nodes.append(_facts(module, node, own, samples, readers.get(node)))
        if not (is_known(node) or _is_constant_integers(node, samples.live)):
            unknown.append(f"{node.name} ({node.target}{', ' if place(node) else ''}{place(node)})")
    quantizers = {q.name: q for q in _quantizer_facts(module, samples)}
    tensors = liveness(module, samples.live, samples.elements)
    return GraphFacts(
        tuple(nodes),
        quantizers,
        tuple(unknown),
        batch,
        tensors,
        tuple(dict.fromkeys(opaque)),
        assumptions(module),
    )
