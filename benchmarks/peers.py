"""Other ways of quantization-aware training at 8 bits, to be timed side by side.

Each replaces the convolutions and linear layers of a model, with quantizers on their weights and
inputs, or, as torchao does, the graph of the model; what else is computed stays float. This library
quantizes more: products of two activations and both sides of additions.
"""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

_CODES = 127


class _Layer(nn.Module):
    """A layer whose weight and input go through learnable fake quantization."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, quantize: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.quantize = quantize
        self.scales = nn.Parameter(torch.tensor([float(layer.weight.detach().std()) / 32, 0.02]))

    def forward(self, x: Tensor) -> Tensor:
        layer, (weight_scale, scale) = self.layer, self.scales.split(1)
        weight, x = self.quantize(layer.weight, weight_scale), self.quantize(x, scale)
        if isinstance(layer, nn.Linear):
            return nn.functional.linear(x, weight, layer.bias)
        y: Tensor = layer._conv_forward(x, weight, layer.bias)
        return y


def _aten(x: Tensor, scale: Tensor) -> Tensor:
    zero = torch.zeros(1)
    return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, -_CODES, _CODES, 1.0)


def _composite(x: Tensor, scale: Tensor) -> Tensor:
    codes = (x / scale).clamp(-_CODES, _CODES)
    return (codes + (codes.round() - codes).detach()) * scale


def brevitas_layer(layer: nn.Conv2d | nn.Linear, **options: Any) -> nn.Module:
    """A layer of Brevitas with the same weights; `options` say how it quantizes them."""
    import brevitas.nn as qnn

    options["bias"] = layer.bias is not None
    if isinstance(layer, nn.Linear):
        made = qnn.QuantLinear(layer.in_features, layer.out_features, **options)
    else:
        made = qnn.QuantConv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            groups=layer.groups,
            **options,
        )
    made.load_state_dict(layer.state_dict(), strict=False)
    result: nn.Module = made
    return result


def _brevitas(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    from brevitas.quant import Int8ActPerTensorFloat

    return brevitas_layer(layer, input_quant=Int8ActPerTensorFloat)


def _torchao(model: nn.Module, images: Tensor) -> nn.Module:
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    graph = torch.export.export(model, (images,), strict=True).module()
    made: nn.Module = move_exported_model_to_train(prepare_qat_pt2e(graph, quantizer))
    return made


_LAYERS: dict[str, Callable[[nn.Conv2d | nn.Linear], nn.Module]] = {
    "aten": lambda layer: _Layer(layer, _aten),
    "composite": lambda layer: _Layer(layer, _composite),
    "brevitas": _brevitas,
}
PEERS = (*_LAYERS, "torchao")
COMPILING = ("aten", "composite")
"""Peers that `torch.compile` takes; with PyTorch 2.13 it failed at Brevitas 0.13 (a convolution of
its tensors) and at torchao 0.18 (an observer per channel)."""


def installed(peer: str) -> bool:
    """Whether a peer can be measured here."""
    return peer not in ("brevitas", "torchao") or find_spec(peer) is not None


def converted(model: nn.Module, peer: str, images: Tensor) -> nn.Module:
    """A copy of `model` in training mode, quantized by a peer for batches like `images`."""
    model = copy.deepcopy(model).train()
    if peer == "torchao":
        return _torchao(model, images)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d | nn.Linear) and not isinstance(module, _Layer):
                setattr(module, name, _LAYERS[peer](child))
    return model
