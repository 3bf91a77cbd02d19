"""Batch norm in training: folded away in what is deployed, by batch statistics until then."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cgmq_fx
from cgmq_fx.history import StepRecord
from cgmq_fx.passes.copying import copy_graph
from cgmq_fx.passes.freeze import set_bits
from cgmq_fx.passes.grid import PASS_THROUGH
from cgmq_fx.passes.norms import NORMS, normalised_weights, normalisers, own_norms
from cgmq_fx.passes.quantizer import BiasQuantizer, Quantizer
from cgmq_fx.training import default_optimizer, parameter_groups

BATCH = 32


def seen(model: nn.Module) -> nn.Module:
    """With statistics, scales and shifts as after training; some scales negative."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
    return model.train()


def small() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(128, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)),
    )


def images(*shape: int) -> Tensor:
    return torch.rand(BATCH, *(shape or (3, 8, 8)), generator=torch.Generator().manual_seed(3))


def prepared(
    model: nn.Module, x: Tensor, budget: str = "bops <= 5%", **options: object
) -> cgmq_fx.Prepared:
    return cgmq_fx.prepare(model, budget, x, **options)  # type: ignore[arg-type]


def widest(made: cgmq_fx.Prepared) -> None:
    """Nothing is rounded any more."""
    for module in made.model.modules():
        if isinstance(module, Quantizer):
            module.bits.fill_(PASS_THROUGH)


def trained(made: cgmq_fx.Prepared, x: Tensor, steps: int = 12) -> None:
    made.model.train()
    optimizer = default_optimizer(parameter_groups(made.model))
    for _ in range(steps):
        optimizer.zero_grad()
        (made.model(x) - 1.0).square().mean().backward()
        optimizer.step()
        made.step()


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), (4, 5, 5)),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)),
        (4, 5, 5),
    ),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (4, 9)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6)), (4, 3, 4, 5)),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), (4,)),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)),
        (4, 5, 5),
    ),
    "no scale": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)),
        (4, 5, 5),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_unrounded_it_is_the_model_in_both_modes(name: str) -> None:
    make, shape = LAYERS[name]
    model, x = seen(make()), images(*shape)
    made = prepared(model, x, "bops <= 90%")
    widest(made)
    assert len(list(normalisers(made.model))) == 1
    with torch.no_grad():
        assert apart(made.model.eval()(x), model.eval()(x)) < 1e-5
        assert apart(made.model.train()(x), model.train()(x)) < 1e-2  # their epsilons differ


def test_calibration_lets_training_start_from_what_evaluation_gives() -> None:
    model, x = seen(small()), images() * 3 + 1  # unlike anything that the statistics have seen
    made = prepared(model, x)
    made.calibrate([x] * 3)
    widest(made)
    with torch.no_grad():
        assert apart(made.model.eval()(x), model.eval()(x)) < 1e-4
        assert apart(made.model.train()(x), model.eval()(x)) < 1e-3
        assert apart(model.train()(x), model.eval()(x)) > 0.5


def test_statistics_follow_the_batches_in_training_mode_alone() -> None:
    made = prepared(seen(small()), images())
    _, owner = next(normalisers(made.model))
    before = owner.mean.clone()
    made.model.eval()(images() + 1)
    assert torch.equal(owner.mean, before)
    made.model.train()(images() + 1)
    assert not torch.equal(owner.mean, before)


@pytest.mark.parametrize("count", [1, 4])
def test_small_batches_are_normalised_by_what_was_seen_before(count: int) -> None:
    made = prepared(seen(small()), images()[:2])
    x = images()[:count]
    with torch.no_grad():
        assert torch.equal(made.model.train()(x), made.model.eval()(x))


@pytest.mark.parametrize("weights", ["tensor", "channel", "element"])
def test_what_is_returned_is_what_was_trained_without_any_norm(weights: str) -> None:
    x = images()
    scheme = cgmq_fx.Scheme(bit_widths=(2, 4, 8), weights=weights)  # type: ignore[arg-type]
    made = prepared(seen(small()), x, scheme=scheme, search_steps=8)
    made.calibrate([x])
    trained(made, x)
    result = made.finalize()
    assert all(state.satisfied for state in result.cost.states)
    assert not any("norm" in name for name, _ in result.model.named_modules())
    assert not any("norm" in str(node.target) for node in result.model.graph.nodes)
    biases = [m for m in result.model.modules() if isinstance(m, BiasQuantizer)]
    assert len(biases) == 4
    with torch.no_grad():
        assert apart(made.model.eval()(x), result.model(x)) < 1e-4
        assert made.model.training is False


def test_training_goes_on_after_a_result_was_made() -> None:
    x = images()
    made = prepared(seen(small()), x, search_steps=4)
    made.calibrate([x])
    trained(made, x)
    first, before = made.finalize(), copy.deepcopy(made.model.state_dict())
    assert all(torch.equal(t, before[n]) for n, t in made.model.state_dict().items())
    trained(made, x)
    assert apart(first.model(x), made.finalize().model(x)) > 0


def test_rounding_the_deployed_bias_is_part_of_training() -> None:
    x = images()
    made = prepared(seen(small()), x, scheme=cgmq_fx.Scheme(bit_widths=(2,)), search_steps=1)
    made.calibrate([x])
    made.freeze()
    node, owner = next(normalisers(made.model))
    found: list[tuple[Tensor, ...]] = []
    hook = owner.register_forward_hook(lambda _, args, out: found.append((*args, out)))
    with torch.no_grad():
        made.model.eval()(x)
    hook.remove()
    (inputs, shift, *grids, output), factor = found[0], owner.factor.detach()
    shape = (1, -1, 1, 1)
    bias = output - inputs * factor.reshape(shape)
    step = 2 * grids[2].detach().flatten().exp() / 3 * factor.abs()  # of signed weights at 2 bits
    step = step * grids[0].detach().exp() / 3  # of unsigned inputs at 2 bits
    codes = bias.mean((0, 2, 3)) / step
    assert float((codes - codes.round()).abs().max()) < 1e-3
    assert float((owner.folded(shift).detach() / step - codes).abs().max()) <= 0.5 + 1e-3
    assert node.name in str(node)


def test_pruned_channels_stay_zero() -> None:
    x = images()
    scheme = cgmq_fx.Scheme(bit_widths=(0, 2, 4, 8), weights="channel")
    made = prepared(seen(small()), x, scheme=scheme, search_steps=4)
    made.calibrate([x])
    bits = {name: own.copy() for name, own in made.controller.assignment.items()}
    bits["0_weight"] = bits["0_weight"] * 0 + 4
    bits["0_weight"][:3] = 0
    bits |= {name: own * 0 + 2 for name, own in bits.items() if name != "0_weight"}
    set_bits(made.model, bits)
    _, owner = next(normalisers(made.model))
    outputs: list[Tensor] = []
    hook = owner.register_forward_hook(lambda *args: outputs.append(args[-1]))
    for mode in (True, False):
        made.model.train(mode)(x)
    hook.remove()
    for output in outputs:
        assert float(output[:, :3].detach().abs().max()) < 1e-6
        assert float(output[:, 3:].detach().abs().min()) > 0


def _frozen_norm() -> nn.Module:
    model = small()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.requires_grad_(False)
    return model


LEFT: dict[str, tuple[Callable[[], nn.Module], dict[str, object]]] = {
    "frozen": (_frozen_norm, {}),
    "one range": (small, {"scheme": cgmq_fx.Scheme(weight_ranges="tensor")}),
    "shifts": (small, {"scheme": cgmq_fx.Scheme(power_of_two=True)}),
    "float": (small, {"scheme": cgmq_fx.Scheme(only="9")}),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_take_up_factors_again_is_left(name: str) -> None:
    make, options = LEFT[name]
    made = prepared(seen(make()), images(), "bops <= 100%", **options)
    assert not list(normalisers(made.model))
    assert not normalised_weights(made.model)


def test_state_is_kept_and_taken_up_again() -> None:
    x = images()
    first, second = (prepared(seen(small()), x, search_steps=4) for _ in range(2))
    first.calibrate([x])
    trained(first, x)
    assert any(name.startswith(f"{NORMS}.") for name in first.state_dict()["model"])
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.model.eval()(x), second.model.eval()(x))
    trained(first, x, 3)
    trained(second, x, 3)
    assert torch.equal(first.model.eval()(x), second.model.eval()(x))


class StopAt(cgmq_fx.Callback):
    """Raises after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, record: StepRecord) -> None:
        if record.step == self.step:
            raise KeyboardInterrupt


def test_an_interrupted_run_ends_with_the_same_result(tmp_path: Path) -> None:
    data = [(images() + 0.1 * i, torch.ones(BATCH, 4)) for i in range(4)]

    def run(**options: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        loss = nn.functional.mse_loss
        result = cgmq_fx.quantize(
            seen(small()), "bops <= 5%", data, loss=loss, epochs=3, progress=False, **options
        )
        return result.model.state_dict()

    whole = run()
    kept = cgmq_fx.Checkpoint(tmp_path, steps=1)
    for step in (3, 6):
        with pytest.raises(cgmq_fx.StoppedError):
            run(checkpoint=kept, callbacks=[StopAt(step)])
    again = run(checkpoint=kept)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_result_is_taken_up_as_it_is() -> None:
    x = images()
    options = {"loss": nn.functional.mse_loss, "epochs": 3, "progress": False}
    data = [(x, torch.ones(BATCH, 4))] * 4
    result = cgmq_fx.quantize(seen(small()), "bops <= 5%", data, **options)  # type: ignore[arg-type]
    made = prepared(seen(small()), x, "bops <= 5%")
    made.start_from(result)
    made.calibrate([x] * 3)
    widest(made)
    frozen = copy_graph(result.model)
    for module in frozen.modules():
        if isinstance(module, Quantizer):
            module.bits.fill_(PASS_THROUGH)
    with torch.no_grad():
        assert apart(made.model.eval()(x), frozen(x)) < 1e-4
        assert apart(made.model.train()(x), frozen(x)) < 1e-3


@pytest.mark.parametrize(("count", "factor"), [(BATCH, 3), (4, 1)])
def test_weights_before_a_norm_move_faster_where_batches_are_large(count: int, factor: int) -> None:
    made, x = prepared(seen(small()), images()), images()[:count]
    made.calibrate([x, x])
    weights = [n for n, _ in made.model.named_parameters() if n in ("0.weight", "3.weight")]
    own = {n: id(p) for n, p in made.model.named_parameters()}
    rates = {id(p): g["lr"] for g in parameter_groups(made.model) for p in g["params"]}
    model = made.finalize().model
    plain = {n: id(p) for n, p in model.named_parameters()}
    slow = {id(p): g["lr"] for g in parameter_groups(model) for p in g["params"]}
    assert len(weights) == 2
    for name in weights:
        assert rates[own[name]] == pytest.approx(factor * slow[plain[name]])
    assert rates[own["9.weight"]] == slow[plain["9.weight"]]


@pytest.mark.parametrize("behind", [True, False])
def test_a_shared_norm_that_cannot_be_folded_is_named(behind: bool) -> None:
    layer, norm = nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4 if behind else 3)
    model = nn.Sequential(*([layer, norm] if behind else [norm, nn.ReLU(), layer]))
    made = cgmq_fx.prepare(seen(model), "bops <= 90%", torch.rand(BATCH, 3, 8, 8))
    assert [owner.shared for _, owner in normalisers(made.model)] == [True] * behind
    assert own_norms(made.model) == ([] if behind else ["batch_norm"])
