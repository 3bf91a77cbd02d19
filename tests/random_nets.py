"""Small networks for tests, most of them drawn at random, and a count of costs that shares no code
with the library's."""

import random
from collections.abc import Callable
from functools import cache
from math import inf, nextafter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional as F

from benchmarks.random_nets import Concat, Residual
from cgmq_fx import Bound, Budget, Constraint, Prepared, Scheme
from cgmq_fx.cost_models import GraphFacts, Ledger, cost_model, highest_bits, lowest_bits
from cgmq_fx.directions import direction_of
from cgmq_fx.graphs import float_graph
from cgmq_fx.passes.capture import Captured, ExampleInputs
from cgmq_fx.passes.copying import copy_graph
from cgmq_fx.passes.quantizer import Quantizer

SIZE = 6
FREE = Budget((Constraint(cost_model("bops"), Bound(1.0, relative=True)),))
"""A budget that every network satisfies from the start."""


class TinyCNN(nn.Module):
    """Convolution, batch norm, dropout and linear, for images of shape (N, 1, 8, 8); 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.drop(self.norm(self.conv(images)).relu())
        logits: Tensor = self.head(x.flatten(1))
        return logits


class TwoInputs(nn.Module):
    """A sum of two linear layers, for inputs of shapes (N, 6) and (N, 4); 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 5)
        self.right = nn.Linear(4, 5)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        logits: Tensor = self.left(a).relu() + self.right(b)
        return logits


def random_net(rng: random.Random) -> tuple[nn.Module, Tensor]:
    """A random network and a batch of inputs that it takes: images or tokens."""
    torch.manual_seed(rng.randrange(2**31))
    if rng.random() < 0.3:
        return _random_tokens(rng)
    layers: list[nn.Module] = []
    channels = first = rng.choice((1, 3, 4))
    for _ in range(rng.randint(1, 3)):
        layer, channels = _random_block(rng, channels)
        layers += [layer, rng.choice((nn.ReLU, nn.Identity, nn.Hardtanh, nn.SiLU))()]
    pool, side = rng.choice(((nn.MaxPool2d(2), SIZE // 2), (nn.AdaptiveAvgPool2d(1), 1)))
    head = nn.Linear(channels * side**2, 3, bias=rng.random() < 0.7)
    net = nn.Sequential(*layers, pool, nn.Flatten(), head)
    return net.eval(), torch.randn(2, first, SIZE, SIZE)


def _random_block(rng: random.Random, channels: int) -> tuple[nn.Module, int]:
    def conv(out: int, groups: int = 1) -> nn.Module:
        kernel, bias = rng.choice((1, 3)), rng.random() < 0.5
        layer = nn.Conv2d(channels, out, kernel, padding=kernel // 2, groups=groups, bias=bias)
        return nn.Sequential(layer, nn.BatchNorm2d(out)) if rng.random() < 0.4 else layer

    more = rng.choice((2, 3, 5))
    kinds: list[Callable[[], tuple[nn.Module, int]]] = [
        lambda: (conv(more), more),
        lambda: (conv(channels, channels), channels),
        lambda: (conv(2 * channels, channels), 2 * channels),
        lambda: (Residual(conv(channels)), channels),
        lambda: (Concat(conv(more)), channels + more),
    ]
    return rng.choice(kinds)()


def _random_tokens(rng: random.Random) -> tuple[nn.Module, Tensor]:
    width, layers = 5, list[nn.Module]()
    for _ in range(rng.randint(1, 3)):
        inner = nn.Linear(width, width, bias=rng.random() < 0.5)
        layers += [rng.choice((Residual, nn.Sequential))(inner), rng.choice((nn.ReLU, nn.GELU))()]
    return nn.Sequential(*layers, nn.Linear(width, 4)).eval(), torch.randn(2, 3, width)


@cache
def captured(seed: int) -> Captured:
    """The graph of a random network; export is slow, so it is kept."""
    model, inputs = random_net(random.Random(seed))
    return float_graph(model, ExampleInputs((inputs,)))


def prepared(
    graph: Captured,
    budget: Budget = FREE,
    scheme: Scheme | None = None,
    *,
    direction: str = "marginal",
    steps: int = 6,
) -> Prepared:
    """A copy of a captured graph, prepared."""
    copy = Captured(copy_graph(graph.module), graph.inputs, graph.dynamic)
    return Prepared(copy, budget, scheme or Scheme(), direction_of(direction), steps)


def train(run: Prepared, steps: int, seed: int = 0) -> None:
    """Some steps of training towards noise."""
    optimizer = torch.optim.SGD(run.model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    (like,) = run.example_inputs.tensors
    for _ in range(steps):
        optimizer.zero_grad()
        output = run.model(torch.randn(like.shape, generator=generator))
        F.mse_loss(output, torch.randn(output.shape, generator=generator)).backward()
        optimizer.step()
        run.step()


@cache
def facts(seed: int, scheme: Scheme) -> GraphFacts:
    """The facts of a random network with quantizers."""
    return prepared(captured(seed), scheme=scheme).controller.ledger.graph


def ends(graph: GraphFacts, name: str) -> tuple[float, float, float]:
    """Least and greatest cost that can be reached, and the cost at 32 bits."""
    budget = Budget((Constraint(cost_model(name), Bound(1.0)),))
    low, high = (Ledger(graph, budget, end(graph)) for end in (lowest_bits, highest_bits))
    return low.totals[0], high.totals[0], low.references[0]


def constraint(name: str, limit: float, reference: float, relative: bool) -> Constraint:
    """A constraint whose bound is at least `limit` in the unit of its model."""
    if not relative:
        return Constraint(cost_model(name), Bound(limit))
    share = limit / reference
    while share * reference < limit:
        share = nextafter(share, inf)
    return Constraint(cost_model(name), Bound(share, relative=True))


class Recount(Interpreter):
    """Counts what a graph of convolutions and linear layers costs by running it.

    The bits of a value are those of the quantizer that it came out of, 32 if there is none; the
    MACs come from the shapes of real tensors. Every weight element is paired with the gate of the
    input channel that it is multiplied with.
    """

    KEEPS = ("max_pool2d", "flatten", "relu", "view", "reshape", "contiguous")

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.bits: dict[Node, Tensor] = {}
        self.costs = {"bops": 0.0, "macs": 0.0, "weights": 0.0}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        op = getattr(n.target, "_opname", "")
        if n.op == "call_module":
            owner = self.fetch_attr(str(n.target))
            if isinstance(owner, Quantizer):
                self.bits[n] = owner.bits.double()
        elif op in ("conv2d", "linear"):
            self._count(n, value)
        elif op in self.KEEPS and n.args[0] in self.bits:
            self.bits[n] = self.bits[n.all_input_nodes[0]]
        return value

    def _count(self, n: Node, value: Tensor) -> None:
        activation, weight = n.all_input_nodes[:2]
        shape = self.env[weight].shape
        float_bits = torch.tensor(32.0, dtype=torch.float64)
        w = self.bits.get(weight, float_bits).expand(shape)
        groups = int(str(n.args[6])) if len(n.args) > 6 else 1
        a = self.bits.get(activation, float_bits).reshape(-1)
        channels = shape[1] * groups
        a = a.expand(channels) if a.numel() == 1 else a.repeat_interleave(channels // a.numel())
        a = a.reshape(groups, 1, shape[1], 1)
        w = w.reshape(groups, shape[0] // groups, shape[1], -1)
        macs = value[0].numel() * shape[1:].numel()
        self.costs["bops"] += macs * float((w * a).mean())
        self.costs["macs"] += macs * float(((w > 0) & (a > 0)).double().mean())
        self.costs["weights"] += float(w.sum()) / 8
        if len(n.all_input_nodes) > 2:  # the bias, 4 bytes a channel
            self.costs["weights"] += 4 * shape[0]


def recount(module: GraphModule, *inputs: Tensor) -> dict[str, float]:
    """The cost of a graph by every cost model, counted by `Recount`."""
    counter = Recount(module)
    with torch.no_grad():
        counter.run(*inputs, enable_io_processing=False)
    return counter.costs
