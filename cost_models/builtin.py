"""The cost models that come with the library: BOPs, MACs and weight memory."""

from __future__ import annotations

from typing import final

from cgmq_fx.cost_models.bits import NodeBits
from cgmq_fx.cost_models.facts import NodeFacts
from cgmq_fx.cost_models.model import CostModel, register_cost_model


@final
@register_cost_model
class BOPs(CostModel):
    """Bit operations: MACs x weight bits x activation bits.

    A product of two activations counts the bits of both. With finer granularity it is the mean over
    the elements that meet (van Baalen et al., Bayesian Bits, NeurIPS 2020, section 2.4).
    """

    name = "bops"
    unit = "bop"

    def node_cost(self, node: NodeFacts, bits: NodeBits) -> float:
        """MACs times the mean product of the bits that meet."""
        return node.macs * bits.mean(lambda w, a: w * a) if node.macs else 0.0


@final
@register_cost_model
class MACs(CostModel):
    """Multiply-accumulates that are left: a product with a 0-bit operand needs none."""

    name = "macs"
    unit = "mac"

    def node_cost(self, node: NodeFacts, bits: NodeBits) -> float:
        """MACs times the share of products in which neither factor is pruned."""
        return node.macs * bits.mean(lambda w, a: float(w > 0 and a > 0)) if node.macs else 0.0


@final
@register_cost_model
class WeightMemory(CostModel):
    """Bytes of everything that the model stores, each tensor once, in bits as stored.

    Weights count at the bits of their quantizers, biases as 32-bit integers, everything that is not
    quantized (normalisation, constants) at the bits of its dtype, float64 at 32. A tensor that is
    kept in two forms, rounded and in float, counts in both.
    """

    name = "weights"
    unit = "byte"

    def node_cost(self, node: NodeFacts, bits: NodeBits) -> float:
        """Stored bits divided by 8."""
        return bits.stored_bits / 8
