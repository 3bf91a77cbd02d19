"""Freezing: bit-widths become constants, and what stays float loses its quantizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from cgmq_fx.cost_models.bits import BitArray
from cgmq_fx.passes.bias import BIASES
from cgmq_fx.passes.grid import PASS_THROUGH
from cgmq_fx.passes.infra import Pass, PassResult
from cgmq_fx.passes.insert import QUANTIZERS
from cgmq_fx.passes.kernel import Statistic
from cgmq_fx.passes.quantizer import BiasQuantizer, Quantizer
from cgmq_fx.passes.state import drop_unused_state


def set_bits(module: GraphModule, assignment: Mapping[str, BitArray]) -> None:
    """Give the quantizers of a graph their bits: name -> one entry per gate."""
    for name, bits in assignment.items():
        quantizer = module.get_submodule(f"{QUANTIZERS}.{name}")
        if isinstance(quantizer, Quantizer):
            flat = torch.from_numpy(bits).to(quantizer.bits)
            quantizer.bits.copy_(flat.reshape(quantizer.bits.shape))


def read_bits(module: GraphModule) -> dict[str, BitArray]:
    """The bits that the quantizers of a graph really have: name -> one entry per gate."""
    container = module.get_submodule(QUANTIZERS)
    return {
        name: q.bits.detach().cpu().reshape(-1).long().numpy()
        for name, q in container.named_children()
        if isinstance(q, Quantizer)
    }


@dataclass(frozen=True)
class Freeze(Pass):
    """Fix the bit-widths.

    Before: a graph with quantizers and an assignment for each. After: the quantizers have those
    bits and report no statistics; those that pass everything through are gone, and with them the
    bias quantizers that would need their grid. Ranges and weights can still be trained.
    """

    assignment: Mapping[str, BitArray]

    def run(self, module: GraphModule) -> PassResult:
        """Set the bits and remove what passes everything through."""
        set_bits(module, self.assignment)
        dropped = {n for n, bits in self.assignment.items() if bits.min() >= PASS_THROUGH}
        dropped -= _needed_for_pruning(module, dropped)
        for node in list(module.graph.nodes):
            if node.op == "call_module" and _is_moot(module, node, dropped):
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        keep_containers(module)
        drop_unused_state(module)
        for quantizer in module.modules():
            if isinstance(quantizer, Quantizer):
                quantizer.observe(Statistic.NONE)
        return PassResult(module, modified=True)


def _needed_for_pruning(module: GraphModule, dropped: set[str]) -> set[str]:
    """Quantizers of inputs that are read by biases which follow a weight that may be pruned."""
    needed: set[str] = set()
    for node in module.graph.nodes:
        owner = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(owner, BiasQuantizer) and owner.axis is not None:
            names = [str(a.target).split(".")[1] for a in node.args[1:] if isinstance(a, Node)]
            if not dropped.issuperset(names[2:]):
                needed |= set(names[:2])
    return needed


def _is_moot(module: GraphModule, node: Node, dropped: set[str]) -> bool:
    owner = module.get_submodule(str(node.target))
    if isinstance(owner, Quantizer):
        return str(node.target).rpartition(".")[2] in dropped
    if isinstance(owner, BiasQuantizer):
        reads = [str(a.target) for a in node.args[1:] if isinstance(a, Node)]
        return any(r.split(".")[1] in dropped for r in reads)
    return False


def keep_containers(module: GraphModule) -> None:
    """See to it that a graph without any quantizer has the modules that would hold them."""
    for name in (QUANTIZERS, BIASES):
        if not hasattr(module, name):
            module.add_module(name, torch.nn.Module())
