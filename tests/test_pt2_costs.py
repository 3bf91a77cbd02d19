"""A `.pt2` file costs what its graph costs, whatever its program was decomposed into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cgmq_fx import Scheme, prepare
from tests.deploy_nets import assert_counted

BUDGET = "bops <= 101%, macs <= 101%, weights <= 101%, activations <= 101%"


class Given(nn.Module):
    """Layers and parameters, and what is done with them."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def _cells(m: Any, x: Tensor) -> Tensor:
    hidden, memory = x.new_zeros(x.shape[0], 6), torch.zeros(x.shape[0], 6)
    for step in range(x.shape[1]):
        hidden, memory = m.rnn(x[:, step], (hidden, memory))
    return m.out(hidden)  # type: ignore[no-any-return]


def _from_learned_state(m: Any, x: Tensor) -> Tensor:
    start = m.start.expand(1, x.shape[0], 6).contiguous()
    return m.out(m.rnn(x, start)[0][:, -1])  # type: ignore[no-any-return]


def _queries(m: Any, x: Tensor) -> Tensor:
    query = m.query.unsqueeze(0).repeat(x.shape[0], 1, 1)
    return m.out(m.attend(query, x, x)[0])  # type: ignore[no-any-return]


def _coordinates(m: Any, x: Tensor) -> Tensor:
    grid = torch.arange(8.0).reshape(1, 8, 1).repeat(x.shape[0], 1, 2)
    return m.out(F.relu(m.inner(grid)).sum(1) + x)  # type: ignore[no-any-return]


BATCHED: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "zeros": (
        Given(
            lambda m, x: m.out(m.rnn(x)[0][:, -1]),
            rnn=nn.GRU(4, 6, batch_first=True),
            out=nn.Linear(6, 3),
        ),
        (3, 4),
    ),
    "cells": (Given(_cells, rnn=nn.LSTMCell(4, 6), out=nn.Linear(6, 3)), (3, 4)),
    "learned": (
        Given(
            _from_learned_state,
            rnn=nn.GRU(4, 6, batch_first=True),
            out=nn.Linear(6, 3),
            start=nn.Parameter(torch.ones(1, 1, 6)),
        ),
        (3, 4),
    ),
    "queries": (
        Given(
            _queries,
            attend=nn.MultiheadAttention(8, 2, batch_first=True),
            out=nn.Linear(8, 3),
            query=nn.Parameter(torch.ones(5, 8)),
        ),
        (6, 8),
    ),
    "coordinates": (Given(_coordinates, inner=nn.Linear(2, 3), out=nn.Linear(3, 3)), (3,)),
}

CASTS: dict[str, Callable[[Any, Tensor], Any]] = {
    "to float": lambda m, x: m.inner(x) * (x.sum(1, True) > 0).float(),
    "to long": lambda m, x: m.inner(x) + m.table((x.sum(1) > 0).long()),
    "to a dtype": lambda m, x: m.inner(x) + (1 - (x > 0)[:, :1].to(x.dtype)) * -10.0,
    "one hot": lambda m, x: m.inner(F.one_hot((x.sum(1) > 0).long(), 4).float()),
}

INDEXED: dict[str, Callable[[Any, Tensor], Any]] = {
    "behind a slice": lambda m, x: m.inner(x)[:, m.index],
    "two of them": lambda m, x: (m.inner(x)[:, :, None] * x[:, None])[:, m.index, m.index],
    "before a slice": lambda m, x: m.inner(x)[m.index % 2],
}


def _pairs(m: Any, x: Tensor) -> Tensor:
    first, second = m.inner(x[:, 0]), m.inner(x[:, 1])
    alike = F.cosine_similarity(first, second).unsqueeze(1)
    return m.out(torch.cat([(first - second).abs(), alike], 1))  # type: ignore[no-any-return]


def _encoder() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(36, 16)),
    )


MEMORY: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "statistics of the batch": (
        Given(
            lambda m, x: m.out(F.relu(m.norm(m.inner(x)))),
            inner=nn.Linear(4, 16),
            norm=nn.BatchNorm1d(16, track_running_stats=False),
            out=nn.Linear(16, 3),
        ),
        (4,),
    ),
    "norm behind the activation": (
        Given(
            lambda m, x: m.out(m.norm(F.silu(m.inner(x)))),
            inner=nn.Linear(4, 16),
            norm=nn.BatchNorm1d(16),
            out=nn.Linear(16, 3),
        ),
        (4,),
    ),
    "one bias on two grids": (
        Given(lambda m, x: m.inner(x) - m.inner(-x), inner=nn.Linear(4, 16)),
        (4,),
    ),
    "a bias that is read as it is": (
        Given(lambda m, x: m.inner(x) * m.inner.bias, inner=nn.Linear(4, 16)),
        (4,),
    ),
    "one encoder for two": (Given(_pairs, inner=_encoder(), out=nn.Linear(17, 1)), (2, 1, 6, 6)),
}


def assert_file_costs_as_counted(
    net: nn.Module, shape: tuple[int, ...], folder: Path, batch: int = 8, budget: str = BUDGET
) -> None:
    """The file states what the result states, references of relative bounds included."""
    example = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
    result = prepare(net.eval(), budget, example, scheme=Scheme((4, 8))).finalize()
    exported = result.export(folder / "net.pt2")
    assert_counted(exported, result)
    references = [s.reference for s in exported.certificate.states]
    assert references == [s.reference for s in result.cost.states]
    assert not exported.certificate.unknown


@pytest.mark.parametrize("name", BATCHED)
def test_what_only_has_the_size_of_the_batch_is_counted_per_sample(
    name: str, tmp_path: Path
) -> None:
    assert_file_costs_as_counted(*BATCHED[name], tmp_path)


@pytest.mark.parametrize("name", CASTS)
def test_casts_assert_and_cost_nothing(name: str, tmp_path: Path) -> None:
    net = Given(CASTS[name], inner=nn.Linear(4, 6), table=nn.Embedding(2, 6))
    assert_file_costs_as_counted(net, (4,), tmp_path)


@pytest.mark.parametrize("name", INDEXED)
def test_indices_may_stand_anywhere(name: str, tmp_path: Path) -> None:
    net = Given(INDEXED[name], inner=nn.Linear(4, 6))
    net.register_buffer("index", torch.tensor([0, 2, 3]))
    assert_file_costs_as_counted(net, (4,), tmp_path)


@pytest.mark.parametrize("name", MEMORY)
def test_a_file_needs_no_more_memory_than_its_graph(name: str, tmp_path: Path) -> None:
    assert_file_costs_as_counted(*MEMORY[name], tmp_path)


class Repeated(nn.Module):
    """A layer, then another one three times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.again = nn.Linear(4, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.again(self.again(self.again(self.first(x))))
        return y


def test_float_operands_beside_one_grid_of_two_tensors(tmp_path: Path) -> None:
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    prepared = prepare(Repeated(), "activations <= 26%", x, scheme=Scheme(output_bits=8))
    prepared.calibrate([x])
    result = prepared.finalize()
    exported = result.export(tmp_path / "net.pt2")
    assert exported.certificate.states[0].value == result.cost.states[0].value
