"""The bits of nodes and tensors: by hand, and against a loop over all elements."""

from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest

from cgmq_fx.cost_models import (
    Assignment,
    BitArray,
    GraphBits,
    NodeBits,
    NodeFacts,
    Operand,
    Role,
    Stored,
    TensorFacts,
    graph_bits,
    idle_gates,
    node_bits,
)
from cgmq_fx.cost_models.bits import tensor_bits
from cgmq_fx.cost_models.facts import Pruning
from tests.cost_helpers import bits, graph, linear

OUT, IN = 4, 6
WEIGHTS = {"tensor": (), "rows": (OUT, 1, 1), "columns": (1, IN, 1), "elements": (OUT, IN, 1)}
ACTIVATIONS = {"tensor": (), "channels": (1, IN, 1)}
MAKERS = {"channels": (1, IN, 1), "elements": (1, IN, 3), "transposed": (2, IN, 1)}
PRUNED = {"none": [], "one": [1], "some": [0, 2, 5], "all": list(range(IN))}


def reader(weight: str, activation: str, maker: str) -> NodeFacts:
    """A linear layer that reads channels of which some are pruned."""
    pruning = Pruning("m", MAKERS[maker])
    meets = ACTIVATIONS[activation] or (1, IN, 1)
    operands = (
        Operand(Role.WEIGHT, OUT * IN, "w", WEIGHTS[weight]),
        Operand(Role.ACTIVATION, IN, "a", meets, pruning),
    )
    stored = (Stored("weight", OUT * IN, "w"), Stored("bias", OUT), Stored("norm", 2 * IN, None, 8))
    return NodeFacts("fc", "aten.linear.default", OUT * IN, operands, stored=stored)


def drawn(weight: str, activation: str, maker: str, pruned: str) -> dict[str, BitArray]:
    rng = np.random.default_rng(0)
    sizes = {"w": WEIGHTS[weight], "a": ACTIVATIONS[activation], "m": MAKERS[maker]}
    found = {n: rng.choice([2, 4, 8], int(np.prod(shape))) for n, shape in sizes.items()}
    made = found["m"].reshape(MAKERS[maker])
    made[:, PRUNED[pruned]] = 0
    if pruned == "some":
        made.ravel()[made.argmax()] = 0  # a channel stays as long as one of its weights does
    return found


def looped(assignment: Assignment, weight: str, activation: str, maker: str) -> Any:
    """The products by their bits, and the bits of the weight, element by element."""
    w = np.broadcast_to(assignment["w"].reshape(WEIGHTS[weight] or (1, 1, 1)), (OUT, IN, 1))
    a = np.broadcast_to(assignment["a"].reshape(ACTIVATIONS[activation] or (1, 1, 1)), (1, IN, 1))
    made = assignment["m"].reshape(MAKERS[maker])
    kept = [any(made[b, i, k] for b, k in np.ndindex(made[:, i].shape)) for i in range(IN)]
    w, a = w[:, :, 0], a[0, :, 0]
    if not any(kept):  # one channel is left, with the fewest bits of all
        kept[0] = True
        w, a = np.broadcast_to(w.min(1)[:, None], w.shape), np.full(IN, a.min())
    pairs: Counter[tuple[int, int]] = Counter()
    stored = 0
    for o, i in product(range(OUT), range(IN)):
        pairs[int(w[o, i]), int(a[i]) if kept[i] else 0] += 1
        stored += int(w[o, i]) if kept[i] else 0
    return pairs, stored


@pytest.mark.parametrize("pruned", PRUNED)
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_what_reads_pruned_channels_against_a_loop(
    weight: str, activation: str, maker: str, pruned: str
) -> None:
    assignment = drawn(weight, activation, maker, pruned)
    found = node_bits(reader(weight, activation, maker), assignment)
    pairs, stored = looped(assignment, weight, activation, maker)
    total = sum(count for count, _, _ in found.pairs)
    shares = {(w, a): count / total for count, w, a in found.pairs}
    assert len(shares) == len(found.pairs)
    assert shares == pytest.approx({pair: count / (OUT * IN) for pair, count in pairs.items()})
    assert found.stored_bits == stored + OUT * 32 + 2 * IN * 8


@pytest.mark.parametrize("pruned", PRUNED)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_gates_of_pruned_channels_are_idle(weight: str, activation: str, pruned: str) -> None:
    assignment = drawn(weight, activation, "channels", pruned)
    found = idle_gates(reader(weight, activation, "channels"), assignment)
    gone = assignment["m"] == 0
    expected = {}
    if weight in ("columns", "elements"):
        expected["w"] = np.broadcast_to(gone, (OUT if weight == "elements" else 1, IN)).ravel()
    if activation == "channels":
        expected["a"] = gone
    idle = {n: flags.tolist() for n, flags in found if flags.any()}
    assert idle == {n: flags.tolist() for n, flags in expected.items() if flags.any()}


def test_gates_that_meet_nothing_pruned_are_not_idle() -> None:
    node = linear("fc", "w", "x", meets=((3, 4, 1), (1, 4, 1)))
    assert list(idle_gates(node, {"w": bits(*[2] * 12), "x": bits(0, 0, 0, 0)})) == []


def test_the_one_gate_of_a_tensor_is_not_idle() -> None:
    """The layer that is read has a single channel, which is pruned."""
    pruned = Operand(Role.ACTIVATION, 1, "a", (1, 1, 1), Pruning("m", (1, 1, 1)))
    operands = (Operand(Role.WEIGHT, 2, "w"), pruned)
    node = NodeFacts("fc", "aten.linear.default", 2, operands)
    assert list(idle_gates(node, {"w": bits(4), "a": bits(8), "m": bits(0)})) == []


# A bias of 12 bytes over 3 channels; weights of 6 elements in 3 slices.
SHORTER = [
    (None, [2, 4, 8], 3 * 4),
    (None, [2, 0, 8], 2 * 4),
    (None, [0, 0, 8], 1 * 4),
    (None, [0, 0, 0], 1 * 4),  # no graph has a layer without any channel
    (None, [0], 1 * 4),
    (None, [4], 3 * 4),
]


@pytest.mark.parametrize(("quantizer", "maker", "size"), SHORTER)
def test_what_a_layer_stores_per_channel(
    quantizer: str | None, maker: list[int], size: int
) -> None:
    stored = Stored("bias", 3, quantizer, 32, Pruning("m", (1, 3, 1)))
    node = NodeFacts("fc", "aten.linear.default", stored=(stored,))
    assert node_bits(node, {"m": np.array(maker)}) == NodeBits((), size * 8)


def test_a_weight_that_another_node_multiplies_is_stored_whole() -> None:
    stored = (Stored("table", 6, "w"),)
    node = NodeFacts("table", "aten.embedding.default", stored=stored)
    assert node_bits(node, {"w": bits(2, 4, 8)}).stored_bits == 2 * (2 + 4 + 8)


# Elements, bits of the gates, total bits: rounded up where gates do not divide the elements.
TENSORS = [
    (5, [3], 15),
    (5, [2, 3], 13),  # 12.5
    (7, [2, 4, 8], 33),  # 32.67
    (6, [2, 4, 8], 28),
    (4, [0, 0], 0),
    (256, [2, 4] * 128, 768),
    (3, [2, 3] * 150, 8),  # 7.5
]


@pytest.mark.parametrize(("elements", "gates", "total"), TENSORS)
def test_bits_of_a_tensor(elements: int, gates: list[int], total: int) -> None:
    tensor = TensorFacts("t", elements, 0, 0, "q")
    assert tensor_bits(tensor, {"q": np.array(gates)}) == total
    assert tensor_bits(TensorFacts("t", elements, 0, 0), {}) == elements * 32
    assert tensor_bits(TensorFacts("t", elements, 0, 0, None, 64), {}) == elements * 64


# 12 elements on gates of 2, 4 and 8 bits
SHARES = [
    ((), 56),  # 4 x 2 + 4 x 4 + 4 x 8
    ((0, 1, 1), 72),  # 6 x 4 + 6 x 8
    ((3, 0, 2), 53),  # 7.2 x 2 + 4.8 x 8 = 52.8
    (None, 96),  # 12 x 8
]


@pytest.mark.parametrize(("shares", "total"), SHARES)
def test_bits_of_a_part_of_what_is_on_a_grid(shares: tuple[int, ...] | None, total: int) -> None:
    tensor = TensorFacts("t", 12, 0, 0, "q", shares=shares)
    assert tensor_bits(tensor, {"q": np.array([2, 4, 8])}) == total
    assert tensor_bits(tensor, {"q": np.array([4])}) == 48


def test_a_weight_of_many_gates() -> None:
    rng = np.random.default_rng(0)
    weight, inputs = rng.choice([0, 2, 32], 30 * 20), rng.choice([0, 3, 32], 20)
    node = linear("fc", "w", "x", shape=(30, 20), meets=((30, 20, 1), (1, 20, 1)))
    found = node_bits(node, {"w": weight, "x": inputs})
    pairs = Counter((int(weight[o * 20 + i]), int(inputs[i])) for o in range(30) for i in range(20))
    assert {(w, a): count for count, w, a in found.pairs} == pairs
    assert found.stored_bits == weight.sum() + 30 * 32


# Rows of 2, 2 and 8 bits, columns of 4, 0, 4 and 4: each row meets each column.
def test_rows_that_meet_all_columns_are_counted_in_products() -> None:
    node = linear("fc", "w", "x", meets=((3, 1, 1), (1, 4, 1)))
    found = node_bits(node, {"w": bits(2, 2, 8), "x": bits(4, 0, 4, 4)})
    assert sorted(found.pairs) == [(1, 8, 0), (2, 2, 0), (3, 8, 4), (6, 2, 4)]
    assert found.mean(lambda w, a: w * a) == (3 * 32 + 6 * 8) / 12
    assert (found.weight, found.activation) == (4, 3)


MEANS = [
    ((), 0.0),
    (((1, 2, 8),), 16.0),
    (((3, 2, 8), (1, 4, 4)), 16.0),
    (((1, 2, 8), (3, 0, 8)), 4.0),
    (((0, 2, 8), (0, 4, 4)), 0.0),
]


@pytest.mark.parametrize(("pairs", "expected"), MEANS)
def test_means_are_weighted(pairs: tuple[tuple[int, int, int], ...], expected: float) -> None:
    assert NodeBits(pairs, 0).mean(lambda w, a: w * a) == expected


def test_the_bits_of_a_graph_are_a_sequence_of_those_of_its_nodes() -> None:
    nodes = linear("a", "w", "x"), linear("b", "v", "x")
    found = graph_bits(graph(*nodes), {"w": bits(2), "v": bits(4), "x": bits(8)})
    first, second = (NodeBits(((1, n, 8),), 12 * n + 3 * 32) for n in (2, 4))
    assert (found[0], found[-1], found[1:], len(found)) == (first, second, [second], 2)
    assert list(found) == [first, second]
    assert isinstance(found, GraphBits)
    assert found.tensors.tolist() == []
