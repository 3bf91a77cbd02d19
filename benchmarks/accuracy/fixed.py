"""Ways to choose bit-widths before training: uniform, an exact knapsack, at random."""

import random
from collections.abc import Iterator
from itertools import pairwise, product
from math import fsum

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch.nn.functional import cross_entropy

from benchmarks.accuracy.cases import Data
from cgmq_fx.cost_models import (
    Assignment,
    BOPs,
    Budget,
    GraphFacts,
    Ledger,
    NodeFacts,
    WeightMemory,
    highest_bits,
    uniform_bits,
)
from cgmq_fx.cost_models.bits import BitArray
from cgmq_fx.cost_models.facts import FLOAT_BITS
from cgmq_fx.passes.freeze import set_bits
from cgmq_fx.prepared import Prepared

_WIDEST = 8

Floats = npt.NDArray[np.float64]

Pairs = dict[str, dict[tuple[int, int], tuple[int, int, int]]]
"""By node, for the bits of its two operands: the columns of the pair and of either operand."""


def widest_uniform(facts: GraphFacts, budget: Budget) -> int:
    """The most bits that all quantizers can have under a budget."""
    for bits in range(_WIDEST, 1, -1):
        if Ledger(facts, budget, uniform_bits(facts, bits)).satisfied:
            return bits
    raise SystemExit(f"no uniform bit-width satisfies {budget}")


def random_assignment(facts: GraphFacts, budget: Budget, seed: int) -> Assignment:
    """Levels at random, lowered at random until the budget holds, then raised while it does."""
    rng = random.Random(seed)
    widths = {name: q.bit_widths for name, q in facts.quantizers.items()}
    levels = {name: rng.randrange(len(w)) for name, w in widths.items()}
    ledger = Ledger(facts, budget, {n: _gates(facts, n, levels[n]) for n in widths})
    while not ledger.satisfied:
        name = rng.choice([n for n, level in levels.items() if level])
        levels[name] -= 1
        ledger.move(name, _gates(facts, name, levels[name]))
    names = list(widths)
    rng.shuffle(names)
    for name in names:
        while levels[name] + 1 < len(widths[name]):
            bits = _gates(facts, name, levels[name] + 1)
            if not ledger.fits(ledger.trial(name, bits)):
                break
            levels[name] += 1
            ledger.move(name, bits)
    return dict(ledger.assignment)


def _gates(facts: GraphFacts, name: str, level: int) -> BitArray:
    quantizer = facts.quantizers[name]
    return np.full(quantizer.gates, quantizer.bit_widths[level])


def sensitivities(prepared: Prepared, data: Data) -> dict[str, list[float]]:
    """By how much the loss rises if one quantizer alone has each of its bit-widths."""
    facts, model = prepared.facts, prepared.model
    widest, training = highest_bits(facts), model.training
    model.eval()
    batches = list(data)
    set_bits(model, widest)
    start = _loss(prepared, batches)
    found = {}
    for name, quantizer in facts.quantizers.items():
        rises = []
        for level in range(len(quantizer.bit_widths)):
            prepared.controller.start({**widest, name: _gates(facts, name, level)})
            rises.append(max(0.0, _loss(prepared, batches) - start))
        found[name] = rises
    prepared.controller.start(widest)
    model.train(training)
    return found


@torch.no_grad()
def _loss(prepared: Prepared, data: Data) -> float:
    losses = [float(cross_entropy(prepared.model(images), labels)) for images, labels in data]
    return sum(losses) / len(losses)


def knapsack(facts: GraphFacts, budget: Budget, rises: dict[str, list[float]]) -> Assignment:
    """The assignment of least summed sensitivity under a budget, by integer programming.

    One variable per quantizer and bit-width, and per node one for every pair of bit-widths that
    meet in it, which must be 1 where both are.
    """
    names = list(facts.quantizers)
    widths = [facts.quantizers[n].bit_widths for n in names]
    start = np.cumsum([0, *(len(w) for w in widths)])
    place = {(n, b): start[i] + k for i, n in enumerate(names) for k, b in enumerate(widths[i])}
    pairs = _pairs(facts, place, int(start[-1]))
    size = int(start[-1]) + sum(len(p) for p in pairs.values())
    rows = [*_one_each(start, size), *_implied(pairs, size)]
    low = [*[1.0] * len(names), *[-np.inf] * (len(rows) - len(names))]
    for constraint, limit in zip(budget, _limits(facts, budget), strict=True):
        row = np.zeros(size)
        fixed = fsum(_bill(row, node, constraint.model, pairs, place) for node in facts.nodes)
        rows, low = [*rows, row / (limit - fixed)], [*low, -np.inf]
    high = [1.0] * (len(rows) - len(budget)) + [1.0 - 1e-9] * len(budget)
    loss = np.concatenate([*(rises[n] for n in names), np.zeros(size - int(start[-1]))])
    whole = np.concatenate([np.ones(int(start[-1])), np.zeros(size - int(start[-1]))])
    answer = milp(
        loss / max(loss.max(), 1e-30),
        constraints=LinearConstraint(np.array(rows), low, high),
        integrality=whole,
        bounds=Bounds(0, 1),
        options={"time_limit": 120},
    )
    if answer.x is None:
        raise SystemExit(f"the knapsack under {budget} was not solved: {answer.message}")
    chosen = [int(answer.x[start[i] : start[i + 1]].argmax()) for i in range(len(names))]
    return {n: _gates(facts, n, level) for n, level in zip(names, chosen, strict=True)}


def _one_each(start: npt.NDArray[np.int64], size: int) -> Iterator[Floats]:
    """Every quantizer has one bit-width."""
    for first, last in pairwise(start):
        row = np.zeros(size)
        row[first:last] = 1
        yield row


def _implied(pairs: Pairs, size: int) -> Iterator[Floats]:
    """Where both operands have their bits, the pair is there."""
    for found in pairs.values():
        for column, first, second in found.values():
            row = np.zeros(size)
            row[[first, second]] = 1
            row[column] = -1
            yield row


def _pairs(facts: GraphFacts, place: dict[tuple[str, int], int], count: int) -> Pairs:
    found: Pairs = {}
    for node in facts.nodes:
        names = [o.quantizer for o in node.operands]
        if len(names) != 2 or None in names:
            continue
        first, second = (str(name) for name in names)
        widths = (facts.quantizers[first].bit_widths, facts.quantizers[second].bit_widths)
        found[node.name] = {}
        for a, b in product(*widths):
            found[node.name][a, b] = (count, int(place[first, a]), int(place[second, b]))
            count += 1
    return found


def _limits(facts: GraphFacts, budget: Budget) -> tuple[float, ...]:
    return Ledger(facts, budget, highest_bits(facts)).limits


def _bill(
    row: Floats,
    node: NodeFacts,
    model: object,
    pairs: Pairs,
    place: dict[tuple[str, int], int],
) -> float:
    """Add what a node costs to a row of the program; what it costs whatever the bits."""
    if isinstance(model, BOPs):
        for (a, b), (column, _, _) in pairs.get(node.name, {}).items():
            row[column] += node.macs * a * b
        names = [o.quantizer for o in node.operands]
        for (name, bits), column in place.items():
            if None in names and name in names:
                row[column] += node.macs * bits * FLOAT_BITS
        return node.macs * FLOAT_BITS**2 if names == [None, None] else 0.0
    if isinstance(model, WeightMemory):
        for stored in node.stored:
            for (name, bits), column in place.items():
                if name == stored.quantizer:
                    row[column] += stored.elements * bits / 8
        return sum(s.elements * s.bits / 8 for s in node.stored if s.quantizer is None)
    raise SystemExit("the knapsack knows BOPs and the memory of weights only")
