"""Pruned channels: zero in training, cheaper downstream, gone from the finished graph."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cgmq_fx
from cgmq_fx.cost_models import Assignment, BOPs, NodeFacts, Operand, Role, Stored, idle_gates
from cgmq_fx.cost_models.bits import node_bits
from cgmq_fx.cost_models.facts import Pruning
from cgmq_fx.graphs import float_graph
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.channels import removable_channels
from cgmq_fx.passes.insert import QUANTIZERS
from cgmq_fx.passes.quantizer import kept_channels
from tests.nets import Attention, Concat, Residual, plain_cnn, quantized, separable

WIDTHS = (0, 2, 4, 8)
BUDGET = "bops <= 20%, weights <= 90%, macs <= 100%"


class Flattened(nn.Module):
    """Flattens with `view` and the sizes written out, and averages over space."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3, bias=False)
        self.c, self.d = nn.Linear(4 * 4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.avg_pool2d(self.b(self.a(x).relu()), 2)
        x = torch.tanh(self.c(x.view(x.size(0), 4 * 4)))
        result: Tensor = self.d(x)
        return result


def averaged() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)
    )


def tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 3))


def saturated() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 3))


def upsampled() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), nn.ConvTranspose2d(4, 5, 3), nn.Conv2d(5, 2, 1)
    )


class TokenMixer(nn.Module):
    """A convolution over as many tokens as there are channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Conv1d(5, 5, 1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c(self.b(nn.functional.gelu(self.a(x))).relu())
        return result


class PooledAcross(nn.Module):
    """An average over channels and time, as a 2-D pool of three axes makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(6, 4, 2), nn.Conv1d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(nn.functional.avg_pool2d(self.a(x).relu(), 3, 1, 1))
        return result


def over_time() -> nn.Module:
    return nn.Sequential(nn.Conv1d(5, 5, 2), nn.ReLU(), nn.Linear(5, 5))


def flat_batch() -> nn.Module:
    return nn.Sequential(nn.Conv1d(5, 5, 2), nn.ReLU(), nn.Flatten(0, 1), nn.Linear(5, 5))


IMAGES, ROWS, WORDS = (2, 3, 8, 8), (2, 6), (2, 5, 6)

# name: what makes the net, the shape of its input, the layers whose channels can be removed
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "batch norm, pool, flatten": (plain_cnn, IMAGES, {"0.weight"}),
    "view and average": (Flattened, IMAGES, {"a.weight", "b.weight", "c.weight"}),
    "adaptive average": (averaged, IMAGES, {"0.weight"}),
    "tokens": (tokens, WORDS, {"0.weight"}),
    "transposed convolutions": (upsampled, IMAGES, {"0.weight", "2.weight"}),
    "tokens, as many as channels": (TokenMixer, WORDS, set()),
    "time, as long as channels": (over_time, WORDS, set()),
    "batch and channels in one": (flat_batch, WORDS, set()),
    "pool over channels": (PooledAcross, (2, 6, 5), set()),
    "inside a residual block": (Residual, IMAGES, {"a.weight"}),
    "sigmoid(0) is not 0": (saturated, ROWS, set()),
    "depthwise reader": (separable, IMAGES, set()),
    "concatenation": (Concat, IMAGES, set()),
    "attention": (Attention, (2, 5, 8), set()),
}


def prepared(name: str, granularity: str, activations: str = "tensor") -> cgmq_fx.Prepared:
    make, shape, _ = NETS[name]
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    scheme = cgmq_fx.Scheme(WIDTHS, granularity, activations)  # type: ignore[arg-type]
    return cgmq_fx.prepare(model, BUDGET, torch.rand(shape), scheme=scheme)


def pruned(net: cgmq_fx.Prepared, seed: int, widest: int = 2) -> Assignment:
    """Bits at random, and about half of all channels of weights without any."""
    rng = np.random.default_rng(seed)
    found = {}
    reader = {n: net.facts.nodes[i[0]].op for n, i in net.facts.readers.items() if i}
    container = net.model.get_submodule(QUANTIZERS)
    for name, facts in net.facts.quantizers.items():
        bits = rng.choice([2, widest], facts.gates)
        if facts.role is Role.WEIGHT:
            shape = container.get_submodule(name).get_buffer("bits").shape
            bits = bits.reshape(shape)
            axis = int(len(shape) > 1 and (shape[0] == 1 or "transpose" in reader[name]))
            if shape[axis] > 3:
                np.moveaxis(bits, axis, 0)[rng.permutation(shape[axis])[: shape[axis] // 2]] = 0
        found[name] = bits.ravel()
    return found


@pytest.mark.parametrize("name", NETS)
def test_which_channels_can_be_removed(name: str) -> None:
    make, shape, expected = NETS[name]
    captured = float_graph(make().eval(), ExampleInputs((torch.rand(shape),)))
    module = quantized(captured, cgmq_fx.Scheme(WIDTHS, "channel"))
    found = removable_channels(module)
    weights = {str(c.maker.args[1].args[0].target) for c in found}  # type: ignore[union-attr]
    assert weights == expected


def test_without_pruning_there_is_nothing_to_remove() -> None:
    for scheme in (cgmq_fx.Scheme((2, 4), "channel"), cgmq_fx.Scheme(WIDTHS, "tensor")):
        captured = float_graph(plain_cnn().eval(), ExampleInputs((torch.rand(IMAGES),)))
        assert removable_channels(quantized(captured, scheme)) == ()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    ("weights", "activations"),
    [("channel", "tensor"), ("element", "tensor"), ("channel", "channel")],
)
def test_removal_changes_the_cost_and_nothing_else(
    name: str, weights: str, activations: str
) -> None:
    for seed in range(3):
        net = prepared(name, weights, activations)
        net.freeze(pruned(net, seed, widest=4))
        net.model.eval()
        x = torch.rand(NETS[name][1])
        before, counted = net.model(x), net.cost
        result = net.finalize()
        torch.testing.assert_close(result.model(x), before, rtol=1e-5, atol=1e-6)
        assert [s.value for s in result.cost.states] == pytest.approx([s.value for s in counted])
        fewer = result.cost.facts.macs < net.facts.macs
        assert fewer == bool(NETS[name][2])


def test_the_bias_of_a_pruned_channel_is_zero_while_it_is_pruned() -> None:
    model = Flattened()
    nn.init.constant_(model.a.bias, 5.0)  # type: ignore[arg-type]
    scheme = cgmq_fx.Scheme(WIDTHS, "channel")
    net = cgmq_fx.prepare(model, BUDGET, torch.rand(IMAGES), scheme=scheme)
    bits = dict(net.controller.assignment)
    bits["a_weight"] = np.array([0, 2, 0, 2, 2])
    net.freeze({**{n: np.full_like(b, 2) for n, b in bits.items()}, "a_weight": bits["a_weight"]})
    seen: list[Tensor] = []
    maker = removable_channels(net.model)[0].maker
    read = net.model.get_submodule(str(maker.args[2].target))  # type: ignore[union-attr]
    read.register_forward_hook(lambda *args: seen.append(args[2]))
    net.model(torch.rand(IMAGES))
    assert (seen[0] == 0).tolist() == [True, False, True, False, False]


def test_a_layer_without_any_channel_left_keeps_one() -> None:
    net = prepared("batch norm, pool, flatten", "channel")
    weight = next(n for n, q in net.facts.quantizers.items() if q.role is Role.WEIGHT)
    net.freeze(
        {n: b * 0 if n == weight else b * 0 + 2 for n, b in net.controller.assignment.items()}
    )
    counted = [state.value for state in net.cost]
    result = net.finalize()
    assert result.model(torch.rand(IMAGES)).shape == (2, 5)
    assert [state.value for state in result.cost.states] == counted
    assert result.cost.facts.nodes[0].output_shape[1] == 1


def test_float_activations_do_not_bring_channels_back() -> None:
    torch.manual_seed(0)
    scheme = cgmq_fx.Scheme((0, 2, 32), "channel")
    net = cgmq_fx.prepare(Flattened(), "bops <= 60%", torch.rand(IMAGES), scheme=scheme)
    bits = pruned(net, 0)
    weights = {n for n, q in net.facts.quantizers.items() if q.role is Role.WEIGHT}
    most = {n: max(q.bit_widths) for n, q in net.facts.quantizers.items()}
    assert 32 in most.values()
    net.freeze({n: b if n in weights else b * 0 + most[n] for n, b in bits.items()})
    net.model.eval()
    x = torch.rand(IMAGES)
    before, counted = net.model(x), net.cost[0].value
    result = net.finalize()
    torch.testing.assert_close(result.model(x), before, rtol=1e-5, atol=1e-6)
    assert result.cost.states[0].value == pytest.approx(counted)


def test_a_shortened_graph_survives_saving(tmp_path: Path) -> None:
    net = prepared("view and average", "channel")
    net.freeze(pruned(net, 1))
    result = net.finalize()
    path = result.save(tmp_path / "pruned.safetensors")
    loaded = cgmq_fx.load(path)
    x = torch.rand(IMAGES)
    assert torch.equal(loaded.model(x), result.model(x))
    assert loaded.cost.states[0].value == result.cost.states[0].value


@pytest.mark.parametrize(
    ("shape", "axis", "expected"),
    [((), 0, [True]), ((3, 1, 1), 0, [False, True, True]), ((1, 3), 1, [False, True, True])],
)
def test_kept_channels(shape: tuple[int, ...], axis: int, expected: list[bool]) -> None:
    bits = torch.tensor([0, 2, 4][3 - max(len(expected), 1) :] if shape else 2, dtype=torch.int32)
    assert kept_channels(bits.reshape(shape), axis).tolist() == expected


READER = NodeFacts(
    "reader",
    "aten.linear.default",
    macs=6,
    operands=(
        Operand(Role.WEIGHT, 6, "w", (2, 3, 1)),
        Operand(Role.ACTIVATION, 3, "a", (1, 3, 1), Pruning("m", (1, 3, 1))),
    ),
    stored=(Stored("w", 6, "w"),),
)


@pytest.mark.parametrize(
    ("maker", "bops", "bits", "idle"),
    [
        ([2, 0, 0], 64, 16, [0, 1, 1, 0, 1, 1]),  # (8 + 8) x 4; 8 + 8
        ([0, 2, 0], 24, 6, [1, 0, 1, 1, 0, 1]),  # (4 + 2) x 4; 4 + 2
        ([0, 0, 2], 24, 6, [1, 1, 0, 1, 1, 0]),  # (2 + 4) x 4; 2 + 4
        ([0, 0, 0], 16, 4, [1, 1, 1, 1, 1, 1]),  # one channel, of the fewest bits: (2 + 2) x 4
    ],
)
def test_what_reads_a_pruned_layer_by_hand(
    maker: list[int], bops: float, bits: int, idle: list[int]
) -> None:
    assignment = {
        "w": np.array([8, 4, 2, 8, 2, 4]),
        "a": np.array([4]),
        "m": np.array(maker),
    }
    found = node_bits(READER, assignment)
    assert BOPs().node_cost(READER, found) == pytest.approx(bops)
    assert found.stored_bits == bits
    assert [(n, flags.tolist()) for n, flags in idle_gates(READER, assignment)] == [("w", idle)]
