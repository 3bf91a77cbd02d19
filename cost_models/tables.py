"""Latency and energy, looked up in the tables of a target."""

from __future__ import annotations

from abc import abstractmethod
from math import fsum
from typing import ClassVar, final

from cgmq_fx.cost_models.bits import NodeBits
from cgmq_fx.cost_models.errors import BudgetError
from cgmq_fx.cost_models.facts import NodeFacts, Role
from cgmq_fx.cost_models.model import CostModel, register_cost_model
from cgmq_fx.cost_models.target import Row, Target

_PICO = 1e-12


class TableModel(CostModel):
    """A cost that is looked up per multiply-accumulate, plus what moving bytes costs.

    Bytes moved by a node: what it stores (weights, biases) and its input activations, each once.
    Wider pairs never cost less: the table is made monotone by taking, for every pair, the cheapest
    pair that holds it.
    """

    figure: ClassVar[str]

    def __init__(self, target: Target) -> None:
        self.target = target
        self._prices: dict[tuple[str, bool, int, int], float] = {}

    @classmethod
    def make(cls, target: Target | None) -> CostModel:
        """An instance for a budget string.

        Raises:
            BudgetError: Without a target.
        """
        if target is None:
            raise BudgetError(
                f"{cls.name!r} is looked up for a chip; pass target= (a name or a file)"
            )
        return cls(target)

    @staticmethod
    @abstractmethod
    def per_mac(row: Row) -> float | None:
        """Which figure of a row counts."""

    def runs_as(self, node: NodeFacts, weight: int, activation: int) -> Row | None:
        """The pair of widths that a product of two is billed as; None where nothing is left."""
        found = self._price(node, weight, activation)
        return None if found is None else found[1]

    def _price(self, node: NodeFacts, weight: int, activation: int) -> tuple[float, Row] | None:
        return self.target.price(node, weight, activation, self.per_mac, self.figure)

    def _products(self, node: NodeFacts, bits: NodeBits) -> float:
        counts: dict[float, int] = {}
        for count, weight, activation in bits.pairs:
            key = (node.op, node.groups == 1, weight, activation)
            if key not in self._prices:
                found = self._price(node, weight, activation)
                self._prices[key] = 0.0 if found is None else found[0]
            counts[self._prices[key]] = counts.get(self._prices[key], 0) + count
        if len(counts) < 2:  # not a mean of equals: rounded, it could exceed that of wider pairs
            return node.macs * next(iter(counts), 0.0)
        return node.macs * fsum(p * n for p, n in counts.items()) / sum(counts.values())

    def _bytes(self, node: NodeFacts, bits: NodeBits) -> float:
        moved = bits.stored_bits / 8
        widths = (bits.weight, bits.activation) if node.operands else ()
        for operand, width in zip(node.operands, widths, strict=True):
            if operand.role is Role.ACTIVATION:
                moved += operand.elements * width / 8
        return moved


@final
@register_cost_model
class Latency(TableModel):
    """Seconds: cycles per MAC plus bytes moved over bytes per cycle, over the clock.

    Layers run one after the other and computing does not overlap with moving, so this is an upper
    estimate where a chip overlaps them.
    """

    name = "latency"
    figure = "cycles per MAC, which latency is made of,"
    unit = "second"

    @staticmethod
    def per_mac(row: Row) -> float | None:
        """Cycles."""
        return row.cycles

    def node_cost(self, node: NodeFacts, bits: NodeBits) -> float:
        """Seconds of one node, per sample."""
        target = self.target
        if target.clock is None:
            raise BudgetError(f"the target {target.name} has no clock, so latency is not known")
        cycles = self._products(node, bits) if node.macs else 0.0
        if target.bytes_per_cycle is not None:
            cycles += self._bytes(node, bits) / target.bytes_per_cycle
        return cycles / target.clock


@final
@register_cost_model
class Energy(TableModel):
    """Joules: energy per MAC plus energy per byte moved."""

    name = "energy"
    figure = "picojoules per MAC, which energy is made of,"
    unit = "joule"

    @staticmethod
    def per_mac(row: Row) -> float | None:
        """Picojoules."""
        return row.picojoules

    def node_cost(self, node: NodeFacts, bits: NodeBits) -> float:
        """Joules of one node, per sample."""
        picojoules = self._products(node, bits) if node.macs else 0.0
        if self.target.picojoules_per_byte is not None:
            picojoules += self._bytes(node, bits) * self.target.picojoules_per_byte
        return picojoules * _PICO
