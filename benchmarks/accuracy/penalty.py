"""The usual way: bit-widths as real numbers, and a penalty on their cost in the loss.

Between two bit-widths a tensor is the mixture of its two rounded forms (Yang and Jin, FracBits,
AAAI 2021), which gives the bit-width a gradient. After the search it is rounded to the nearest
allowed one. How much a unit of cost weighs has to be searched: nothing makes the result hold a
bound.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cgmq_fx.cost_models.facts import FLOAT_BITS
from cgmq_fx.passes.bias import BIASES
from cgmq_fx.passes.insert import QUANTIZERS
from cgmq_fx.passes.kernel import fake_quantize
from cgmq_fx.passes.quantizer import Quantizer
from cgmq_fx.prepared import Prepared
from cgmq_fx.training import parameter_groups

_LARGEST = 8
_RATE = 1e-2


class Soft(nn.Module):
    """A quantizer with one gate whose place between two bit-widths is a parameter.

    Args:
        quantizer: Lends its range, which is trained on top of the calibrated ones.
        log_ranges: Shape (bit-widths, *range shape): the calibrated range of each.
    """

    def __init__(self, quantizer: Quantizer, log_ranges: Tensor) -> None:
        super().__init__()
        usable = [i for i, b in enumerate(quantizer.spec.bit_widths) if 0 < b <= _LARGEST]
        widths = [quantizer.spec.bit_widths[i] for i in usable]
        self.signed, self.batched = quantizer.signed, quantizer.spec.batched
        self.log_range = nn.Parameter(torch.zeros_like(quantizer.log_range))
        self.place = nn.Parameter(torch.tensor(float(len(widths) - 1)))
        self.widths = widths
        self.register_buffer("bits", quantizer.bits)  # the graph reads it, for biases
        self.register_buffer("ranges", log_ranges[usable])
        self.register_buffer("gates", torch.tensor(widths, dtype=torch.int32))

    def mean_bits(self) -> Tensor:
        """The bit-width between two, differentiable."""
        low, share = self._around()
        return self.widths[low] + share * (self.widths[low + 1] - self.widths[low])

    def nearest(self) -> int:
        """The allowed bit-width that is nearest."""
        low, share = self._around()
        return self.widths[low + (float(share) >= 0.5)]

    def forward(self, x: Tensor) -> Tensor:
        """The mixture of the two rounded forms."""
        low, share = self._around()
        below, above = self._rounded(x, low), self._rounded(x, low + 1)
        return below + share * (above - below)

    def _around(self) -> tuple[int, Tensor]:
        """The level below, and which share of the way to the next one.

        At either end and beyond, gradients pass, so that there is a way back.
        """
        last = len(self.widths) - 1
        place = self.place + (self.place.clamp(0, last) - self.place).detach()
        low = min(int(place), last - 1)
        return low, place - low

    def _rounded(self, x: Tensor, level: int) -> Tensor:
        limit = (self.log_range + self.get_buffer("ranges")[level]).exp()
        bits = self.get_buffer("gates")[level]
        y: Tensor = fake_quantize(x, limit, bits, None, None, self.signed, self.batched, 0)
        return y


class Penalised:
    """A prepared model whose quantizers are soft for a while, and the penalty on its BOPs.

    Biases stay float meanwhile: the grid that they belong on does not exist.

    Args:
        prepared: The model; changed in place until `harden`.
        weight: Of the relative BOPs in the loss.
    """

    def __init__(self, prepared: Prepared, weight: float) -> None:
        self.prepared, self.weight = prepared, weight
        self._kept: list[tuple[nn.Module, str, nn.Module]] = []
        self._soft: dict[str, Soft] = {}
        container = prepared.model.get_submodule(QUANTIZERS)
        for name, quantizer in list(container.named_children()):
            if isinstance(quantizer, Quantizer) and len(quantizer.spec.bit_widths) > 1:
                self._soft[name] = Soft(quantizer, prepared.tables[name].log_ranges)
                self._replace(container, name, self._soft[name])
        biases = prepared.model.get_submodule(BIASES)
        for name, _ in list(biases.named_children()):
            self._replace(biases, name, _First())

    def _replace(self, container: nn.Module, name: str, module: nn.Module) -> None:
        self._kept.append((container, name, container.get_submodule(name)))
        setattr(container, name, module)

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups: the weights as always, then ranges and places."""
        own = [p for soft in self._soft.values() for p in soft.parameters()]
        known = {id(p) for p in own}
        groups = parameter_groups(self.prepared.model)
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in known]
        return [*(g for g in groups if g["params"]), {"params": own, "lr": _RATE}]

    def penalty(self) -> Tensor:
        """The weight times the relative BOPs."""
        facts, total = self.prepared.facts, torch.zeros(())
        for node in facts.nodes:
            bits = [self._bits(operand.quantizer) for operand in node.operands]
            if bits:
                total = total + node.macs / facts.macs * bits[0] * bits[1] / FLOAT_BITS**2
        return self.weight * total

    def _bits(self, name: str | None) -> Tensor:
        found = self._soft.get(name or "")
        return torch.tensor(float(FLOAT_BITS)) if found is None else found.mean_bits()

    @torch.no_grad()
    def harden(self) -> None:
        """Round to the nearest bit-widths, freeze them, and put the real quantizers back."""
        for container, name, module in self._kept:
            setattr(container, name, module)
        bits = {
            name: np.full(self.prepared.facts.quantizers[name].gates, soft.nearest())
            for name, soft in self._soft.items()
        }
        self.prepared.freeze(bits)
        for _, name, module in self._kept:
            if isinstance(module, Quantizer):
                module.log_range.add_(self._soft[name].log_range)


class _First(nn.Module):
    """Passes its first argument on."""

    def forward(self, bias: Tensor, *_: Tensor) -> Tensor:
        """The bias as it is."""
        return bias
