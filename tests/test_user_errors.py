"""What a user can do wrong at the top level: each mistake is one clear error of our own."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import LBFGS
from torch.utils.data import DataLoader, Dataset

import cgmq_fx
from benchmarks.lenet5 import LeNet5


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    )


def batches(count: int = 3, channels: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.rand(4, channels, 8, 8, generator=generator), torch.arange(4) % 3)
        for _ in range(count)
    ]


def quantize(budget: Any = "bops <= 5%", data: Any = None, **options: Any) -> cgmq_fx.Result:
    data = batches() if data is None else data
    given: dict[str, Any] = {"loss": cross_entropy, "epochs": 1, "progress": False} | options
    return cgmq_fx.quantize(net(), budget, data, **given)


def lenet(**scheme: Any) -> Any:
    return cgmq_fx.prepare(
        LeNet5(), "bops <= 0.39%", torch.rand(2, 1, 28, 28), scheme=cgmq_fx.Scheme(**scheme)
    )


def turns_nan() -> Callable[[Tensor, Tensor], Tensor]:
    calls = iter(range(1000))
    return lambda output, target: (
        cross_entropy(output, target) * (float("nan") if next(calls) == 4 else 1.0)
    )


class Doubling(nn.Module):
    """A flag that says what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        y: Tensor = self.layer(x)
        return y * 2 if twice else y


def flags() -> Any:
    data = [{"x": torch.rand(4, 4), "twice": i == 1} for i in range(3)]
    return cgmq_fx.quantize(Doubling(), "bops <= 5%", data, epochs=1, progress=False)


def on_meta() -> Any:
    return cgmq_fx.quantize(net().to("meta"), "bops <= 5%", batches(), progress=False)


class Ending(Dataset[Any]):
    """A disk that goes away."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __getitem__(self, index: int) -> Any:
        if index >= self.first:
            raise OSError("disk gone")
        return batches()[0]

    def __len__(self) -> int:
        return 3


def refused(groups: Any) -> Any:
    raise ZeroDivisionError("no rate")


MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "infeasible": (lenet, cgmq_fx.InfeasibleBudgetError, r"still 0\.3907%, most of it in conv2"),
    "infeasible at 8-bit input": (
        lambda: lenet(input_bits=8),
        cgmq_fx.InfeasibleBudgetError,
        r"0\.39% is asked for.*still 0\.517\d%",
    ),
    "unknown cost": (lambda: quantize("watts <= 1"), cgmq_fx.UnknownCostError, "known are .*bops"),
    "cost in capitals": (
        lambda: quantize("BOPs <= 1%"),
        cgmq_fx.UnknownCostError,
        "no cost model named 'BOPs'; did you mean 'bops'",
    ),
    "per cent forgotten": (
        lambda: quantize("bops <= 0.4"),
        cgmq_fx.InfeasibleBudgetError,
        r'a share is written with a percent sign, as in "bops <= 0\.4%" or "bops <= 40%"\)',
    ),
    "loss is a name": (
        lambda: quantize(loss="cross_entropy"),
        cgmq_fx.OptionError,
        r"loss= takes a function, loss\(output, target\).*not 'cross_entropy'",
    ),
    "optimizer is a name": (
        lambda: quantize(optimizer="sgd"),
        cgmq_fx.OptionError,
        r"optimizer= takes a function, optimizer\(groups\).*not 'sgd'",
    ),
    "quantized already": (
        lambda: cgmq_fx.quantize(quantize().model, "bops <= 5%", batches(), progress=False),
        cgmq_fx.UnsupportedModelError,
        "has quantizers already.*give the float model",
    ),
    "malformed": (lambda: quantize("bops 5%"), cgmq_fx.BudgetError, "cannot read 'bops 5%'"),
    "zero": (lambda: quantize("bops <= 0"), cgmq_fx.BudgetError, "positive, finite"),
    "nan": (lambda: quantize({"bops": float("nan")}), cgmq_fx.BudgetError, "positive, finite"),
    "wrong channels": (
        lambda: quantize(data=batches(), val_data=batches(channels=3)),
        cgmq_fx.DataError,
        r"\(4, 3, 8, 8\).*captured with \(4, 1, 8, 8\)",
    ),
    "wrong model input": (
        lambda: quantize(data=batches(channels=3)),
        cgmq_fx.CaptureError,
        r"fails on the example inputs \(\(4, 3, 8, 8\)",
    ),
    "loss is nan": (
        lambda: quantize(data=batches(8), loss=turns_nan()),
        cgmq_fx.TrainingError,
        r"step 5 of 8 \(phase \w+\): the loss became nan",
    ),
    "loss is a vector": (
        lambda: quantize(loss=lambda output, target: output),
        cgmq_fx.DataError,
        "must return one number",
    ),
    "loss raises": (
        lambda: quantize(loss=lambda output, target: output.undefined),
        cgmq_fx.DataError,
        "loss.*failed: AttributeError",
    ),
    "no compute nodes": (
        lambda: cgmq_fx.quantize(nn.ReLU(), "bops <= 5%", example_inputs=torch.rand(2, 3)),
        cgmq_fx.UnsupportedModelError,
        "nothing to quantize",
    ),
    "empty data": (lambda: quantize(data=[]), cgmq_fx.DataError, "empty"),
    "one-shot data": (
        lambda: quantize(data=iter(batches())),
        cgmq_fx.DataError,
        "iterated only once",
    ),
    "unknown shapes": (
        lambda: cgmq_fx.quantize(net(), "bops <= 5%"),
        cgmq_fx.DataError,
        "pass example_inputs=",
    ),
    "no target": (
        lambda: quantize(data=[x for x, _ in batches()]),
        cgmq_fx.DataError,
        "has no target",
    ),
    "negative epochs": (lambda: quantize(epochs=-1), cgmq_fx.OptionError, "0 or more"),
    "unknown direction": (lambda: quantize(direction="up"), cgmq_fx.OptionError, "known are"),
    "no target chip": (lambda: quantize("latency <= 1 ms"), cgmq_fx.BudgetError, "target="),
    "beginning of a preset": (
        lambda: quantize(target="onnx"),
        cgmq_fx.TargetError,
        "there is no target 'onnx'; did you mean 'onnxruntime'",
    ),
    "misspelt preset": (
        lambda: quantize(target="litrt"),
        cgmq_fx.TargetError,
        "did you mean 'litert'",
    ),
    "unknown chip": (lambda: quantize(target="z80"), cgmq_fx.TargetError, "there is no target"),
    "bit-width": (lambda: cgmq_fx.Scheme(bit_widths=(2, 33)), cgmq_fx.OptionError, "33 is no"),
}


MISTAKES |= {
    "another flag": (flags, cgmq_fx.DataError, "captured with twice = False, and is given True"),
    "no values": (on_meta, cgmq_fx.CaptureError, "0.weight has no values"),
    "one tensor": (
        lambda: quantize(data=torch.rand(8, 1, 8, 8)),
        cgmq_fx.DataError,
        r"the data is a tensor of shape \(8, 1, 8, 8\), whose rows",
    ),
    "data that never begins": (
        lambda: quantize(data=DataLoader(Ending(0), batch_size=None)),
        cgmq_fx.DataError,
        "the data failed at batch 1: OSError: disk gone",
    ),
    "data that ends": (
        lambda: quantize(data=DataLoader(Ending(1), batch_size=None)),
        cgmq_fx.DataError,
        "the data failed at batch 2: OSError: disk gone",
    ),
    **{
        f"{name}: {message}": (partial(quantize, **{name: value}), cgmq_fx.OptionError, message)
        for name, value, message in [
            ("optimizer", lambda groups: None, "must return an optimizer, not None"),
            ("optimizer", refused, r"optimizer\(groups\) failed: ZeroDivisionError: no rate"),
            ("optimizer", lambda groups: LBFGS([groups[0]["params"][0]]), "LBFGS"),
            ("compile", "nope", "no backend of torch.compile: 'nope'"),
            ("callbacks", [1], r"a list of Callback objects, not \[1\]"),
            ("callbacks", print, "a list of Callback objects"),
            ("start", 3, "takes a Result, not a int"),
            ("seed", "a", "seed must be a whole number"),
            ("epochs", True, "epochs must be a whole number"),
        ]
    },
}


@pytest.mark.parametrize(("mistake", "kind", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_clear_errors(
    mistake: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=f"(?s){message}") as caught:
        mistake()
    assert isinstance(caught.value, cgmq_fx.CgmqError)


def test_the_same_call_without_mistakes_works() -> None:
    assert quantize(val_data=batches()).cost.satisfied


def test_same_seed_same_result_bit_for_bit() -> None:
    first, second = (quantize(data=batches(6), epochs=2).model.state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_users_model_and_global_state_are_left_alone() -> None:
    model = net().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seed = torch.random.get_rng_state()
    cgmq_fx.quantize(model, "bops <= 5%", batches(), loss=cross_entropy, epochs=1, progress=False)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(seed, torch.random.get_rng_state())


def test_calls_without_gradients_are_trained_all_the_same() -> None:
    with torch.no_grad():
        plain = quantize(epochs=4)
    with torch.inference_mode():
        inside = quantize()
    assert plain.cost.satisfied
    assert inside.cost.satisfied
    assert plain.history.steps[-1].loss != plain.history.steps[0].loss


class Running(nn.Module):
    """A buffer that forward writes into."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(x.mean())
        y: Tensor = self.layer(x)
        return y


def test_calibration_leaves_buffers_as_they_are() -> None:
    prepared = cgmq_fx.prepare(Running(), "bops <= 50%", torch.ones(3, 4))
    prepared.calibrate([torch.ones(3, 4)] * 3)
    assert dict(prepared.model.named_buffers())["seen"] == 0


def test_the_whole_models_cost_is_not_that_of_a_part() -> None:
    cost = quantize("bops[4] <= 20%, bops <= 30%", epochs=0).cost
    assert cost["bops"].value > cost["bops[4]"].value
    assert ("bops" in cost, "macs" in cost, len(list(cost))) == (True, False, 2)
    with pytest.raises(KeyError, match=r"macs; the budget bounds bops\[4\], bops"):
        cost["macs"]


def test_a_model_refuses_other_flags_than_it_was_captured_with(tmp_path: Path) -> None:
    inputs = {"x": torch.rand(4, 4), "twice": True}
    result = cgmq_fx.prepare(Doubling(), "bops <= 50%", inputs).finalize()
    x = torch.rand(3, 4)
    loaded = cgmq_fx.load(result.save(tmp_path / "net.safetensors"))
    for model in (result.model, loaded.model):
        assert torch.equal(model(x=x, twice=True), result.model(x=x, twice=True))
        with pytest.raises(cgmq_fx.DataError, match="captured with twice = True, and is given F"):
            model(x=x, twice=False)
    onnx = find_spec("onnxscript") and find_spec("onnxruntime")
    for suffix in ("pt2", "safetensors", *(["onnx"] if onnx else [])):
        assert result.export(tmp_path / f"out.{suffix}").agreement is not None
