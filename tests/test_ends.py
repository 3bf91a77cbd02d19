"""Bit-widths that are fixed for inputs and outputs of a network, wherever they are quantized."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cgmq_fx
from cgmq_fx import OptionError, Scheme


class Scaled(nn.Module):
    """Scales and shifts its input before the first layer, after what it is given."""

    mean: Tensor

    def __init__(self, first: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = first
        self.register_buffer("mean", torch.rand(3, 1, 1))
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.layer((self.first(x) - self.mean) / 0.25)
        return z


def test_an_input_that_is_normalised_first_can_be_fixed() -> None:
    image = torch.rand(2, 3, 6, 6)
    for first in (lambda x: x, lambda x: x.contiguous().double().float()):
        found = cgmq_fx.prepare(Scaled(first), "bops <= 90%", image, scheme=Scheme(input_bits=8))
        assert found.facts.quantizers["div"].bit_widths == (8,)
    with pytest.raises(cgmq_fx.InfeasibleBudgetError, match=r"1\.5625"):
        cgmq_fx.prepare(Scaled(first), "bops <= 1%", image, scheme=Scheme(input_bits=8))


MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "circular": lambda x: F.pad(x, (1, 1, 1, 1), "circular"),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), "reflect"),
    "replicate": lambda x: F.pad(x, (1, 1, 1, 1), "replicate"),
    "zeros": lambda x: F.pad(x, (1, 1, 1, 1)),
    "patches": lambda x: F.unfold(x, 2, stride=2).reshape(x.shape[0], 3, 4, -1),
    "pool": lambda x: F.max_pool2d(x, 2),
    "halves": lambda x: torch.cat(x.chunk(2, 2), 3),
    "flipped": lambda x: torch.cat([x, x.flip(3)], 2),
    "picked": lambda x: x[:, :, torch.tensor([0, 2, 1, 4, 3, 5])],
}


@pytest.mark.parametrize("first", MOVED.values(), ids=MOVED)
def test_an_input_that_is_moved_first_can_be_fixed(first: Callable[[Tensor], Tensor]) -> None:
    net, image = Scaled(first), torch.rand(2, 3, 6, 6)
    found = cgmq_fx.prepare(net, "bops <= 90%", image, scheme=Scheme(input_bits=8))
    assert found.facts.quantizers["div"].bit_widths == (8,)


def test_what_is_looked_up_by_an_input_is_no_input() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Parameter(torch.rand(9, 4)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.head(self.table[x])
            return z

    scheme = Scheme(input_bits=8)
    with pytest.raises(OptionError, match="input_bits fixes nothing"):
        cgmq_fx.prepare(Words(), "bops <= 90%", torch.tensor([1, 2]), scheme=scheme)


def test_an_input_that_cannot_be_fixed_is_told() -> None:
    image = torch.rand(2, 3, 6, 6)
    with pytest.raises(OptionError, match="input_bits fixes nothing"):
        cgmq_fx.prepare(Scaled(torch.sigmoid), "bops <= 90%", image, scheme=Scheme(input_bits=8))


def test_an_output_that_a_layer_reads_too_can_be_fixed() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.relu(self.a(x))
            return y.reshape(-1, 2, 2), self.b(y)

    prepared = cgmq_fx.prepare(
        Features(), "bops <= 90%", torch.rand(2, 4), scheme=Scheme(output_bits=6)
    )
    widths = {name: q.bit_widths for name, q in prepared.facts.quantizers.items()}
    assert widths["relu"] == widths["linear_1"] == (6,)
    assert len(widths["a_weight"]) > 1
