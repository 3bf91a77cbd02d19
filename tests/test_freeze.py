from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter

from cgmq_fx import BOPs, Scheme, prepare
from cgmq_fx.cost_models import BitArray
from cgmq_fx.passes.bias import BIASES
from cgmq_fx.passes.freeze import Freeze, read_bits, set_bits
from cgmq_fx.passes.infra import run_passes
from cgmq_fx.passes.quantizer import BiasQuantizer, Quantizer
from tests.nets import NETS, call, distance, quantizers

GRANULARITIES = {
    "tensor": Scheme(),
    "channel": Scheme(weights="channel", activations="channel"),
    "element": Scheme(weights="element", weight_ranges="tensor"),
}


def assignment_for(module: GraphModule, seed: int, most: int = 32) -> dict[str, BitArray]:
    """Random bits up to `most` for every gate, from what each quantizer may take."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, quantizer in quantizers(module).items():
        widths = [b for b in quantizer.spec.bit_widths if b <= most]
        found[name] = rng.choice(widths, quantizer.bits.numel()).astype(np.int64)
    return found


class Recorder(Interpreter):
    """Keeps what every module of the graph takes and returns."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_module(target, args, kwargs)
        if args:
            self.seen[str(target)] = (args[0].detach(), result.detach())
        return result


def recorded(module: GraphModule, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    recorder = Recorder(module.eval())
    recorder.run(*NETS[name].inputs(4).tensors)
    return recorder.seen


@pytest.mark.parametrize("name", ["cnn", "residual", "concat", "attention", "tied"])
def test_quantizers_at_32_bits_vanish(name: str) -> None:
    net, inputs = NETS[name], NETS[name].inputs(3)
    module = net.quantized(Scheme(bit_widths=(32,)))
    everything = {n: np.full(q.bits.numel(), 32) for n, q in quantizers(module).items()}
    frozen = run_passes(module, [Freeze(everything)]).eval()
    assert not any(isinstance(m, Quantizer | BiasQuantizer) for m in frozen.modules())
    expected = call(net.float_graph().module.eval(), inputs)
    assert distance(call(frozen, inputs), expected) < 1e-6


@pytest.mark.parametrize("scheme", GRANULARITIES.values(), ids=GRANULARITIES)
@pytest.mark.parametrize("seed", range(3))
def test_the_frozen_graph_has_the_bits_and_outputs_of_the_trained_one(
    seed: int, scheme: Scheme
) -> None:
    inputs, module = NETS["residual"].inputs(3), NETS["residual"].quantized(scheme).eval()
    assignment = assignment_for(module, seed)
    set_bits(module, assignment)
    before = call(module, inputs)
    frozen = run_passes(module, [Freeze(assignment)])
    kept = {name: bits for name, bits in assignment.items() if bits.min() < 32}
    assert {n: b.tolist() for n, b in read_bits(frozen).items()} == {
        n: b.tolist() for n, b in kept.items()
    }
    assert distance(call(frozen, inputs), before) < 1e-6


def finalized(name: str, scheme: Scheme, share: float = 0.05) -> GraphModule:
    """A model quantized under a bound, calibrated on its example inputs."""
    net = NETS[name]
    budget = BOPs() <= f"{100 * share:g}%"
    return prepare(net.build(), budget, net.inputs(2), scheme=scheme).finalize().model


@pytest.mark.parametrize("scheme", GRANULARITIES.values(), ids=GRANULARITIES)
@pytest.mark.parametrize("name", ["cnn", "residual", "transposed", "mlp"])
def test_tensors_take_no_more_values_than_their_bits_allow(name: str, scheme: Scheme) -> None:
    """Signed: 2^b - 1 codes around 0, unsigned: 2^b codes; all of them whole steps."""
    module = finalized(name, scheme)
    seen = recorded(module, name)
    for own, quantizer in quantizers(module).items():
        values = seen[f"cgmq_quantizers.{own}"][1].double()
        limit = quantizer.log_range.detach().double().exp()
        bits = quantizer.bits.double()
        step = limit * (2 if quantizer.signed else 1) / (2**bits - 1)
        codes = (values / step).round()
        low, high = (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)
        if not quantizer.signed:
            low, high = torch.zeros_like(bits), 2**bits - 1
        passed = bits >= 32
        assert bool((((values / step) - codes).abs() < 1e-2).logical_or(passed).all())
        assert bool(((codes >= low) & (codes <= high) | passed).all())


def test_a_weight_at_two_bits_has_three_values() -> None:
    module = finalized("cnn", Scheme(bit_widths=(2,), weight_ranges="tensor"))
    seen = recorded(module, "cnn")
    counts = {name: int(out.unique().numel()) for name, (_, out) in seen.items()}
    assert counts["cgmq_quantizers.0_weight"] == 3
    assert counts["cgmq_quantizers.5_weight"] == 3
    assert counts["cgmq_quantizers.max_pool2d"] == 4  # unsigned


@pytest.mark.parametrize("name", ["cnn", "residual", "transposed"])
def test_biases_lie_on_the_grid_of_their_accumulator(name: str) -> None:
    module = finalized(name, Scheme(bit_widths=(2, 4, 8)))
    seen = recorded(module, name)
    biases = [n for n in module.graph.nodes if str(n.target).startswith(f"{BIASES}.")]
    assert biases
    for node in biases:
        owners = [module.get_submodule(str(node.args[i].target)[:-10]) for i in (1, 3)]
        step = torch.ones((), dtype=torch.double)
        for q in owners:
            assert isinstance(q, Quantizer)
            limit = q.log_range.detach().double().exp().reshape(-1)
            step = step * limit * (2 if q.signed else 1) / (2 ** int(q.bits) - 1)
        before, after = seen[str(node.target)]
        codes = after.double() / step
        assert float((codes - codes.round()).abs().max()) < 1e-2
        assert bool(((after - before).abs() <= 0.5001 * step).all())


def test_a_frozen_graph_reports_nothing_and_can_be_trained() -> None:
    module = finalized("cnn", Scheme()).train()
    module(*NETS["cnn"].inputs(4).args).square().mean().backward()
    own = quantizers(module)
    assert own
    assert all(q.probe is None and q.adjacent is None for q in own.values())
    assert all(q.log_range.grad is not None for q in own.values())
    assert module.get_parameter("0.weight").grad is not None


def test_finalizing_leaves_the_graph_that_is_trained() -> None:
    prepared = prepare(NETS["cnn"].build(), BOPs() <= "5%", NETS["cnn"].inputs(2))
    count = len(quantizers(prepared.model))
    frozen = prepared.finalize().model
    for parameter in frozen.parameters():
        nn.init.zeros_(parameter)
    assert len(quantizers(prepared.model)) == count
    assert all(bool(p.any()) for n, p in prepared.model.named_parameters() if n.endswith("weight"))
