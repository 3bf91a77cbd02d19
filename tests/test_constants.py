"""Weights that are computed from parameters: computed once, and counted as what is deployed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import cgmq_fx
from cgmq_fx.exporters.certificate import verify
from cgmq_fx.graphs import float_graph
from cgmq_fx.passes.capture import ExampleInputs

BUDGET = "bops <= 3%, weights <= 30%"


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def pruned() -> nn.Module:
    net = plain()
    prune.l1_unstructured(net[0], "weight", 0.5)
    prune.random_structured(net[2], "weight", amount=0.3, dim=1)
    prune.random_unstructured(net[2], "bias", 0.3)
    return net


def of(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    net = plain()
    net[0] = norm(net[0])
    return net.eval()


class Factors(nn.Module):
    """The first layer's weight is a product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4, bias=False), nn.Linear(4, 8, bias=False)
        self.bias = nn.Parameter(torch.zeros(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.second.weight @ self.first.weight
        return cast(Tensor, self.head(torch.relu(nn.functional.linear(x, weight, self.bias))))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "pruned": pruned,
    "weight norm": lambda: of(parametrizations.weight_norm),
    "spectral norm": lambda: of(parametrizations.spectral_norm),
    "orthogonal": lambda: of(parametrizations.orthogonal),
    "factors": lambda: Factors().eval(),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_what_is_computed_from_parameters_is_a_parameter(make: Callable[[], nn.Module]) -> None:
    model, x = make(), torch.randn(5, 6)
    module = float_graph(model, ExampleInputs((x,))).module
    torch.testing.assert_close(module(x), model(x))
    assert sorted(p.numel() for p in module.parameters()) == [3, 8, 24, 48]
    assert all(p.requires_grad for p in module.parameters())
    costs = "bops, macs, weights"
    found, expected = (cgmq_fx.cost(net, x, costs) for net in (model, plain()))
    assert [row.totals for row in found.rows] == [row.totals for row in expected.rows]


@pytest.mark.parametrize("suffix", ["onnx", "pt2", "safetensors"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_bound_holds_on_the_file(
    make: Callable[[], nn.Module], suffix: str, tmp_path: Path
) -> None:
    if suffix == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    result = cgmq_fx.prepare(make(), BUDGET, torch.randn(5, 6)).finalize()
    path = result.export(tmp_path / f"net.{suffix}").path
    for budget in (None, BUDGET):
        found = verify(path, budget)
        assert found.satisfied
        assert [s.relative for s in found.states] == [s.relative for s in result.cost]


def test_views_and_what_is_no_weight_stay() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(6, 6, bias=False), nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.layer(x) @ self.layer.weight.T * self.scale.exp())

    module = float_graph(Tied(), ExampleInputs((torch.randn(5, 6),))).module
    assert sorted(n for n, _ in module.named_parameters()) == ["layer.weight", "scale"]


def test_what_changes_from_call_to_call_stays() -> None:
    class Scaled(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return nn.functional.linear(x, self.layer.weight * self.calls, self.layer.bias)

    module, x = float_graph(Scaled(), ExampleInputs((torch.randn(5, 6),))).module, torch.ones(5, 6)
    first, second = module(x), module(x)
    assert not torch.equal(first, second)


def test_frozen_parts_give_a_frozen_weight() -> None:
    model = Factors().eval()
    model.first.requires_grad_(False)
    model.second.requires_grad_(False)
    module = float_graph(model, ExampleInputs((torch.randn(5, 6),))).module
    assert {n for n, p in module.named_parameters() if p.requires_grad} == {
        *("bias", "head.weight", "head.bias")
    }


def averaged(rows: Tensor) -> Tensor:
    """Each row the mean of those before it."""
    weight = torch.tril(torch.ones(6, 6))
    return (weight / weight.sum(1, keepdim=True)) @ rows


def written(rows: Tensor) -> Tensor:
    weight = torch.zeros(6, 6)
    weight[0, :] = 1
    weight.fill_diagonal_(2)
    weight[3:5] += 1
    return weight @ rows


def spread(rows: Tensor) -> Tensor:
    return torch.bmm(torch.eye(6)[None].expand(rows.shape[0], -1, -1), rows)


def looked_up(rows: Tensor) -> Tensor:
    return nn.functional.embedding((rows > 0).sum(-1), torch.eye(7)[:, :6])


def shifted(rows: Tensor) -> Tensor:
    return nn.functional.linear(rows, torch.ones(6, 6).cumsum(0), torch.arange(6.0) / 10)


class Computes(nn.Module):
    """Two layers with something of constants between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.between, self.first, self.head = between, nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(torch.relu(self.between(self.first(x)))))


@pytest.mark.parametrize(
    ("between", "elements"),
    [(averaged, [36]), (written, [36]), (spread, [36]), (looked_up, [42]), (shifted, [6, 36])],
)
def test_constant_factors_are_stored(
    between: Callable[[Tensor], Tensor], elements: list[int], tmp_path: Path
) -> None:
    model, x = Computes(between).eval(), torch.randn(4, 6, 6)
    module = float_graph(model, ExampleInputs((x,))).module
    assert torch.equal(module(x), model(x))
    assert sorted(b.numel() for b in module.buffers()) == elements
    result = cgmq_fx.prepare(model, "weights <= 60%", x).finalize()
    suffixes = ["pt2", "safetensors"]
    suffixes += ["onnx"] if find_spec("onnxruntime") and find_spec("onnxscript") else []
    for suffix in suffixes:
        (state,) = result.export(tmp_path / f"net.{suffix}", verify=False).certificate.states
        assert state.reference == result.cost["weights"].reference
        assert state.value <= result.cost["weights"].value


def test_random_factors_and_those_of_the_input_are_not_stored() -> None:
    def drawn(rows: Tensor) -> Tensor:
        return torch.rand(6, 6) @ (torch.ones_like(rows[0]) @ rows)

    module = float_graph(Computes(drawn), ExampleInputs((torch.randn(4, 6, 6),))).module
    assert not list(module.buffers())
