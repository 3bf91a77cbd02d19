"""What cannot be captured: kept as it is, or captured under assumptions that are checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cgmq_fx
from cgmq_fx.cost_models.errors import DataError
from cgmq_fx.graphs import float_graph
from cgmq_fx.passes.inputs import ExampleInputs
from cgmq_fx.passes.opaque import OpaqueCall


class Outlier(nn.Module):
    """Branches on values."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.scale
        return y if float(y.detach().abs().max()) > 1e6 else y * 2


class Numbers(nn.Module):
    """Leaves PyTorch, and has a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scale(x)
        return y * float(x.detach().numpy().max().clip(1, 1))


class Boxes:
    """An object that no tracer knows."""

    def __init__(self, tensors: Tensor, size: int) -> None:
        self.tensors = tensors
        self.size = size


class Packs(nn.Module):
    def forward(self, x: Tensor) -> Boxes:
        return Boxes(x * (1.0 if float(x.detach().sum()) > -1e9 else 0.0), x.shape[-1])


class Unpacks(nn.Module):
    def forward(self, boxes: Boxes) -> Tensor:
        return boxes.tensors + (boxes.size if bool((boxes.tensors > 1e9).any()) else 1)


class Block(nn.Module):
    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.before = nn.Linear(8, 8)
        self.inner = nn.Sequential(*inner)
        self.after = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(self.inner(self.before(x)).relu())
        return y


def captured(model: nn.Module, batch: int = 4) -> torch.fx.GraphModule:
    return float_graph(model, ExampleInputs((torch.randn(batch, 8),))).module


def calls(module: torch.fx.GraphModule) -> list[str]:
    return [m.path for m in module.modules() if isinstance(m, OpaqueCall)]


KEPT = [
    (lambda: Block(Outlier()), ["inner.0"]),
    (lambda: Block(nn.Identity(), Block(Outlier(), nn.ReLU())), ["inner.1.inner.0"]),
    (lambda: Block(Numbers(), Outlier()), ["inner.0", "inner.1"]),
    (lambda: Block(Packs(), Unpacks()), ["inner.0", "inner.1"]),
]


@pytest.mark.parametrize(("make", "paths"), KEPT)
@pytest.mark.parametrize("batch", [1, 4, 7])
def test_the_smallest_modules_are_kept_as_they_are(
    make: Callable[[], nn.Module], paths: list[str], batch: int
) -> None:
    model = make().eval()
    module = captured(model)
    assert sorted(calls(module)) == paths
    x = torch.randn(batch, 8)
    torch.testing.assert_close(module(x), model(x))


def test_a_module_that_is_called_twice_is_kept_once() -> None:
    shared = Outlier()
    model = Block(shared, nn.ReLU(), shared)
    module = captured(model)
    assert calls(module) == ["inner.0", "inner.0"]
    assert len([n for n, _ in module.named_parameters() if "scale" in n]) == 1


def test_gradients_pass_and_training_switches_modes() -> None:
    model = Block(nn.Sequential(nn.Dropout(0.5), Outlier()))
    prepared = cgmq_fx.prepare(model, "bops <= 99%", torch.randn(4, 8))
    prepared.model.train()
    prepared.model(torch.randn(4, 8)).sum().backward()
    assert all(p.grad is not None for n, p in prepared.model.named_parameters() if "log" not in n)
    assert all(m.training for m in prepared.model.modules() if isinstance(m, Outlier))


def test_what_is_kept_is_counted_in_float_and_reported() -> None:
    prepared = cgmq_fx.prepare(Block(Numbers()), "bops <= 60%, weights <= 90%", torch.randn(4, 8))
    facts = prepared.facts
    assert facts.opaque == ("inner.0 (Numbers)",)
    assert facts.macs == 3 * 64  # two linear layers and the one that is kept
    stored = {
        s.name: s.elements * s.bits for n in facts.nodes for s in n.stored if "inner" in s.name
    }
    assert stored == {"inner.0.scale.weight": 64 * 32, "inner.0.scale.bias": 8 * 32}
    result = prepared.finalize()
    assert "not quantized (could not be captured, run as they are in float): inner.0" in str(result)
    assert result.report()["opaque"] == ["inner.0 (Numbers)"]


def test_what_was_tried_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "cgmq_fx"):
        captured(Block(Numbers()))
    own = [record for record in caplog.records if record.name.startswith("cgmq_fx")]
    tried = [record.getMessage() for record in own if record.levelname == "INFO"]
    assert any(text.startswith("tried torch.export for any batch size: ") for text in tried)
    assert any("kept in float as they are: inner.0" in record.getMessage() for record in own)


def test_bounds_below_what_is_kept_are_refused() -> None:
    with pytest.raises(cgmq_fx.InfeasibleBudgetError, match=r"inner\.0"):
        cgmq_fx.prepare(Block(Numbers()), "bops <= 30%", torch.randn(4, 8))


def test_a_file_cannot_hold_code(tmp_path: Any) -> None:
    result = cgmq_fx.prepare(Block(Outlier()), "bops <= 60%", torch.randn(4, 8)).finalize()
    with pytest.raises(cgmq_fx.ArtifactError, match=r"inner\.0 .*Outlier.* runs as it is"):
        result.save(tmp_path / "model.safetensors")


class Counts(nn.Module):
    """Returns a number that depends on values."""

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x, int((x > 0).sum().item() > 0)


class CountsInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.count = nn.Linear(8, 8), Counts()

    def forward(self, x: Tensor) -> Tensor:
        y, number = self.count(self.layer(x))
        return y if isinstance(y, Tensor) and number == 1 else y * 0


def test_other_numbers_than_in_the_example_are_refused() -> None:
    model = CountsInside()
    nn.init.zeros_(model.layer.bias)
    module = float_graph(model, ExampleInputs((torch.randn(4, 8),))).module
    assert calls(module) == ["count"]
    with pytest.raises(DataError, match=r"count .*returned other numbers"):
        module(torch.zeros(4, 8))


class Cuts(nn.Module):
    """Returns fewer columns for some values."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] if float(x.detach().max()) > 1e6 else x


def test_other_shapes_than_in_the_example_are_refused() -> None:
    module = captured(Block(Cuts()))
    assert calls(module) == ["inner.0"]
    with pytest.raises(DataError, match=r"inner\.0 .*another structure"):
        module(torch.full((4, 8), 1e9))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        longest = int(lengths.max().item())
        mask = torch.arange(longest)[None, :] < lengths[:, None]
        y: Tensor = self.layer(x) * mask
        return y


def test_control_flow_of_the_model_itself_is_assumed_and_checked() -> None:
    x, lengths = torch.randn(4, 8), torch.tensor([8, 3, 5, 8])
    model = Branches()
    found = float_graph(model, ExampleInputs((x, lengths)))
    torch.testing.assert_close(found.module(x, lengths), model(x, lengths))
    prepared = cgmq_fx.prepare(model, "bops <= 50%", (x, lengths))
    assert any("8" in text for text in prepared.facts.assumptions)
    assert "checked whenever it runs" in str(prepared.finalize())
    with pytest.raises(RuntimeError):
        found.module(x, torch.tensor([4, 3, 2, 1]))


class HoldsBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Branches()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y: Tensor = self.inner(x, lengths)
        return y * 2


def test_layers_are_quantized_under_an_assumption_rather_than_kept() -> None:
    inputs = torch.randn(4, 8), torch.tensor([8, 3, 5, 8])
    prepared = cgmq_fx.prepare(HoldsBranches(), "bops <= 10%", inputs)
    assert prepared.facts.opaque == ()
    assert prepared.facts.assumptions


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor


class Answers(nn.Module):
    def __init__(self, kind: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(8, 8), kind

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        return self.kind(y, y.relu())


def test_a_dataclass_comes_back_as_one() -> None:
    model = Answers(Answer)
    found, x = captured(model), torch.randn(3, 8)
    assert isinstance(found(x), Answer)
    torch.testing.assert_close(found(x).hidden, model(x).hidden)


class Cache:
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.layers = [Boxes(keys, 3), Boxes(values, 4)]


def test_an_unknown_object_comes_back_as_a_dict_of_its_tensors() -> None:
    model = Answers(Cache)
    found, x = captured(model), torch.randn(3, 8)
    output = found(x)
    torch.testing.assert_close(output["layers"][1]["tensors"], model(x).layers[1].tensors)


def test_a_graph_with_values_of_its_inputs_survives_a_file(tmp_path: Any) -> None:
    x, lengths = torch.randn(4, 8), torch.tensor([8, 3, 5, 8])
    result = cgmq_fx.prepare(Branches(), "bops <= 50%", (x, lengths)).finalize()
    loaded = cgmq_fx.load(result.save(tmp_path / "model.safetensors"))
    assert torch.equal(loaded.model(x, lengths), result.model(x, lengths))
    assert loaded.cost.facts.assumptions == result.cost.facts.assumptions


class Selects(nn.Module):
    """The number of selected rows depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y[y.sum(-1) > 0].sum(0)


def test_sizes_that_depend_on_values_survive_a_file(tmp_path: Any) -> None:
    x = torch.randn(16, 8)
    result = cgmq_fx.prepare(Selects(), "bops <= 50%", x).finalize()
    loaded = cgmq_fx.load(result.save(tmp_path / "model.safetensors"))
    assert torch.equal(loaded.model(x), result.model(x))


class Detects(nn.Module):
    """Returns losses in training mode, as detectors do."""

    def forward(self, x: Tensor, targets: Any = None) -> Any:
        if self.training:
            return {"loss": (x - targets["boxes"]).sum()}
        return x if float(x.detach().sum()) > -1e9 else -x


def test_what_returns_something_else_in_training_stays_in_evaluation_mode() -> None:
    prepared = cgmq_fx.prepare(Block(Detects()), "bops <= 99%", torch.randn(4, 8))
    prepared.model.train()
    assert prepared.model(torch.randn(5, 8)).shape == (5, 8)
