"""What models write into slices and other views in place, as values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cgmq_fx import Scheme, load, prepare
from cgmq_fx.graphs import float_graph
from cgmq_fx.passes import aliases
from cgmq_fx.passes.capture import ExampleInputs, capture
from tests.nets import call, distance, ops, quantized, quantizers

Edit = Callable[[Tensor], Tensor]
ROUNDING = 0.02
"""What 8 bits, which are the most between layers, are off by, at most."""


class Edits(nn.Module):
    """A function that writes in place, between two layers."""

    def __init__(self, edit: Edit) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.edit = nn.Linear(4, 8), nn.Linear(8, 3), edit

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.edit(self.first(x)))
        return y


def half_overwritten(y: Tensor) -> Tensor:
    y = y.sigmoid()
    y[:, :4] = y[:, :4] * 2 - 3
    return y * 2


def column_filled(y: Tensor) -> Tensor:
    y = y.relu()
    y[:, 0] = -5
    return y * 2


def half_negated(y: Tensor) -> Tensor:
    y = y.abs()
    y[:, :4].mul_(-1)
    return F.dropout(y, training=False)


def shifted(y: Tensor) -> Tensor:
    z = torch.zeros_like(y)
    z[:, 1:] = y[:, :-1]
    return z + y


def loop(y: Tensor) -> Tensor:
    z = y.new_zeros(y.shape[0], 8)
    for i in range(8):
        z[:, i] = y[:, 7 - i].sigmoid() + z[:, max(i - 1, 0)]
    return z


def views_of_views(y: Tensor) -> Tensor:
    z = y.reshape(-1, 2, 4)
    z[:, 0] = y[:, :4] * 2
    w = z.transpose(1, 2).contiguous()
    w[..., 1] = 3.0
    return w.flatten(1) + y


def shapes(y: Tensor) -> Tensor:
    z = y.unsqueeze(1).permute(2, 0, 1).squeeze(2)
    z[2:4] *= 2
    w = y.unflatten(1, (2, 4)).movedim(1, 2).transpose(0, 1)
    w[0].zero_()
    y[..., None][:, 1] = 0.5
    return y.t().t() * 2


def pieces(y: Tensor) -> Tensor:
    first, second = y.chunk(2, 1)
    first.mul_(2)
    second[second > 0] = 1
    y.unbind(1)[2].zero_()
    parts: tuple[Tensor, ...] = y.split([3, 5], 1)
    parts[1][:, 0].mul_(3)
    y.narrow(1, 2, 2).sub_(1)
    parts[0].neg_()
    return y + parts[1].sum(1, keepdim=True)


def spread(y: Tensor) -> Tensor:
    before, wide = y[:, 1], y.expand(2, -1, -1)
    y[:, :2] = y.sum(1, keepdim=True)
    y[:, [4, 6]] = 1.0
    y[1:] = y[:1]
    y[0, 2] = 9.0
    return y + before[:, None] + wide.sum(0)


def other_dtypes(y: Tensor) -> Tensor:
    counts = torch.zeros(8, dtype=torch.int64)
    counts[1] = 3.7
    counts[2:4] = y.detach()[0, :2] * 10
    y[-1] = y[-1].double() * 2
    half = y.half()
    half[:, :2] *= y[:, :2]
    half.T[0] = 5
    total: Tensor = half.float() + counts + (counts // 2)
    return total


def diagonal(y: Tensor) -> Tensor:
    z = y.repeat(1, 8).view(-1, 8, 8)
    z.diagonal(0, 1, 2).add_(1.0)
    z[:, 1].fill_(2.0)
    return z.sum(1)


def copied_whole(y: Tensor) -> Tensor:
    z = torch.empty_like(y)
    z.copy_(y)
    z[:, 0] = 0
    w = z[:, 1]
    z.fill_(0.25)
    z[:, 2].copy_(y[:, 0])
    return y * z + w[:, None]


EDITS: list[Edit] = [
    half_overwritten,
    column_filled,
    half_negated,
    shifted,
    loop,
    views_of_views,
    shapes,
    pieces,
    spread,
    other_dtypes,
    diagonal,
    copied_whole,
]


@pytest.mark.parametrize("edit", EDITS)
def test_writes_into_views_become_values(edit: Edit) -> None:
    model = Edits(edit).eval()
    captured = float_graph(model, ExampleInputs((torch.randn(3, 4),)))
    assert not [name for name in ops(captured.module) if name.endswith("_")]
    for batch in (2, 3, 5):
        inputs = ExampleInputs((torch.randn(batch, 4),))
        assert distance(call(captured.module, inputs), call(model, inputs)) < 1e-6


TRAINABLE: list[Edit] = [shifted, loop, views_of_views, shapes, spread, diagonal, copied_whole]
"""Those whose writes autograd accepts."""


@pytest.mark.parametrize("edit", TRAINABLE)
def test_they_are_trained_as_in_the_model(edit: Edit) -> None:
    model, x = Edits(edit), torch.randn(3, 4)
    graph = float_graph(model, ExampleInputs((x,))).module
    for module in (model, graph):
        module(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(graph.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("edit", [*EDITS[:4], views_of_views])
def test_what_is_overwritten_has_a_grid_for_all_values(edit: Edit, tmp_path: Path) -> None:
    model, x = Edits(edit).eval(), torch.randn(64, 4)
    result = prepare(model, "bops <= 100%", x, scheme=Scheme((16,))).finalize()
    inputs = ExampleInputs((x,))
    assert distance(call(result.model, inputs), call(model, inputs)) < ROUNDING
    result.save(tmp_path / "net.safetensors")
    again = load(tmp_path / "net.safetensors").model
    assert distance(call(again, inputs), call(result.model, inputs)) == 0


def test_a_result_that_is_written_back_to_where_it_is_costs_nothing() -> None:
    def edit(y: Tensor) -> Tensor:
        y[:, 1:3] += 1.0
        return y

    graph = float_graph(Edits(edit), ExampleInputs((torch.randn(3, 4),))).module
    assert ops(graph) == ["linear", "slice", "add", "slice_scatter", "linear"]


class WritesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x[:, 0] = x[:, 0] * 0.458 + 0.1
        y: Tensor = self.layer(x.reshape(-1, 4).clone())
        return y


class WritesAConstant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.tensor([1.0, 2.0, 0.0, 0.0])
        seen.detach()[2] = x.mean()
        y: Tensor = self.layer(x) * seen
        return y


def detached(y: Tensor) -> Tensor:
    y = y.relu()
    y.detach()[:, 0] = -5
    return y.view(-1, 2, 4).transpose(1, 2).flatten(1)


def dropped(y: Tensor) -> Tensor:
    y = y.relu()
    z = F.dropout(y, training=False)
    z[:, 0] = -5
    return y.clone() * z


def viewed_before(y: Tensor) -> Tensor:
    y = y.relu()
    z = y.view(-1, 8)
    y.detach()[:, 0] = -5
    return z


LEFT: list[Callable[[], nn.Module]] = [
    WritesItsInput,
    WritesAConstant,
    *(partial(Edits, edit) for edit in (detached, dropped, viewed_before)),
]


@pytest.mark.parametrize("make", LEFT)
def test_what_stays_in_place_is_quantized_behind_the_write(make: Callable[[], nn.Module]) -> None:
    model, x = make().eval(), torch.randn(64, 4)
    result = prepare(model, "bops <= 100%", x.clone(), scheme=Scheme((16,))).finalize()
    assert [name for name in ops(result.model) if name.endswith("_")]
    for _ in range(2):
        found, expected = (call(m, ExampleInputs((x.clone(),))) for m in (result.model, model))
        assert distance(found, expected) < ROUNDING


def test_what_was_clipped_and_is_written_is_signed() -> None:
    result = prepare(Edits(detached).eval(), "bops <= 100%", torch.randn(8, 4)).finalize()
    assert all(q.signed for q in quantizers(result.model).values())


@pytest.mark.parametrize("make", [*(partial(Edits, edit) for edit in EDITS), *LEFT])
def test_the_last_write_is_that_of_all_that_share_memory(make: Callable[[], nn.Module]) -> None:
    graph = capture(make(), ExampleInputs((torch.randn(3, 4),))).module.graph
    for node in graph.nodes:
        written = [n for n in aliases.aliases(node) if aliases.writes(n) and not n < node]
        assert aliases.last_write(node) is max(written, default=None)


def test_memory_is_not_searched_where_nothing_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = float_graph(Edits(views_of_views), ExampleInputs((torch.randn(3, 4),)))
    monkeypatch.setattr(aliases, "memory_path", pytest.fail)
    assert quantizers(quantized(captured))
