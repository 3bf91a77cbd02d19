"""Small random networks that together use every op that the library quantizes."""

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 2

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
MEAN_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
SIDES = {1: 12, 2: 6, 3: 4}
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Identity, nn.SiLU, nn.Hardtanh, nn.LeakyReLU)


class Residual(nn.Module):
    """`x + inner(x)`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return x + y


class Concat(nn.Module):
    """`x` and `inner(x)` side by side on the channels."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.inner(x)], 1)


class SelfProduct(nn.Module):
    """Attention without projections: two products of activations."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul((x @ x.transpose(1, 2)).softmax(-1), x)


class Batched(nn.Module):
    """`bmm` and `baddbmm` of activations."""

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.bmm(x, x.transpose(1, 2))
        return torch.baddbmm(x, scores.sigmoid(), x)


class Flat(nn.Module):
    """`addmm` and `mm` with a parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.second = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.flatten(0, 1), self.first)
        y: Tensor = torch.mm(rows.relu(), self.second).unflatten(0, x.shape[:2])
        return y


class Einsum(nn.Module):
    """An einsum with a parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btc,dc->btd", x, self.weight)


class Attention(nn.Module):
    """Multi-head attention, fused."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


class Recurrent(nn.Module):
    """A recurrent layer; its outputs."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], width: int) -> None:
        super().__init__()
        self.layer = kind(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)[0]
        return y


class Tokens(nn.Module):
    """Token numbers through an embedding into a body, then the mean over tokens."""

    def __init__(self, table: nn.Module, body: nn.Module, width: int) -> None:
        super().__init__()
        self.table, self.body, self.head = table, body, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(self.table(x)).mean(1))
        return y


class Pair(nn.Module):
    """Two inputs: a bilinear layer, and a product of what two linear layers make of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.both = nn.Bilinear(width, width, 4)
        self.left, self.right = nn.Linear(width, 4), nn.Linear(width, 4, bias=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = F.relu(self.both(a, b)) + self.left(a) * self.right(b)
        return y


def random_net(rng: random.Random) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A random network in evaluation mode, and a batch of two inputs that it takes."""
    with torch.random.fork_rng():
        torch.manual_seed(rng.randrange(2**31))
        kind = rng.choices((_images, _tokens, _pair), (6, 4, 1))[0]
        model, inputs = kind(rng)
        return model.eval(), inputs


def _pair(rng: random.Random) -> tuple[nn.Module, tuple[Tensor, ...]]:
    width = rng.choice((3, 4, 6))
    return Pair(width), (torch.randn(BATCH, width), torch.randn(BATCH, width))


def _images(rng: random.Random) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Convolutions over 1, 2 or 3 axes."""
    dims = rng.choices((1, 2, 3), (3, 5, 2))[0]
    first, side = rng.choice((1, 3, 4)), SIDES[dims]
    inputs = torch.randn(BATCH, first, *[side] * dims)
    layers, channels = list[nn.Module](), first
    for _ in range(rng.randint(1, 4)):
        block, channels = _block(rng, dims, channels)
        layers += [block, rng.choice(ACTIVATIONS)()]
    layers.append(rng.choice((MAX_POOLS, MEAN_POOLS))[dims](2))
    body = nn.Sequential(*layers)
    with torch.no_grad():
        features = body.eval()(inputs).flatten(1).shape[1]
    head = nn.Linear(features, 3, bias=rng.random() < 0.7)
    return nn.Sequential(body, nn.Flatten(), head), (inputs,)


def _block(rng: random.Random, dims: int, channels: int) -> tuple[nn.Module, int]:
    out = rng.choice((2, 4, 6))

    def conv(outputs: int, groups: int = 1, stride: int = 1) -> nn.Module:
        kernel, bias = rng.choice((1, 3)), rng.random() < 0.6
        layer = CONVS[dims](
            channels, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=bias
        )
        norm = NORMS[dims](outputs)
        return nn.Sequential(layer, norm) if rng.random() < 0.4 else layer

    def transposed() -> nn.Module:
        groups = 2 if channels % 2 == 0 and rng.random() < 0.4 else 1
        return TRANSPOSED[dims](channels, out, 2, stride=1, groups=groups)

    grouped = 2 if channels % 2 == 0 else 1
    kinds: list[Callable[[], tuple[nn.Module, int]]] = [
        lambda: (conv(out), out),
        lambda: (conv(out, grouped), out),
        lambda: (conv(channels, channels), channels),
        lambda: (conv(2 * channels, channels), 2 * channels),
        lambda: (transposed(), out),
        lambda: (Residual(nn.Sequential(conv(channels), nn.ReLU())), channels),
        lambda: (Concat(conv(out)), channels + out),
    ]
    return rng.choice(kinds)()


def _tokens(rng: random.Random) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Layers over (batch, tokens, width)."""
    width, length = rng.choice((4, 6)), rng.choice((3, 5))
    layers = list[nn.Module]()
    for _ in range(rng.randint(1, 3)):
        inner = rng.choice(
            (
                lambda: nn.Linear(width, width, bias=rng.random() < 0.5),
                SelfProduct,
                Batched,
                lambda: Flat(width),
                lambda: Einsum(width),
                lambda: Attention(width),
                lambda: Recurrent(rng.choice((nn.LSTM, nn.GRU)), width),
                lambda: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()),
            )
        )()
        layers.append(Residual(inner) if rng.random() < 0.3 else inner)
    body = nn.Sequential(*layers)
    if rng.random() < 0.3:
        numbers = torch.randint(7, (BATCH, length))
        return Tokens(nn.Embedding(7, width), body, width), (numbers,)
    return Tokens(nn.Linear(5, width), body, width), (torch.randn(BATCH, length, 5),)
