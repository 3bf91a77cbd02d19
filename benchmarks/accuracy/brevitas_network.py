"""A network whose layers are Brevitas', to be trained beside this library's: optional."""

import copy
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.peers import brevitas_layer

Layer = nn.Conv2d | nn.Linear


def brevitas_network(model: nn.Module, bits: int, images: Tensor) -> nn.Module:
    """A copy of `model` whose convolutions and linear layers are quantized by Brevitas.

    Weights have a range per output channel; inputs are unsigned where none of `images` makes a
    layer see a negative value. Biases and what lies between the layers stay float.

    Raises:
        SystemExit: If Brevitas is not installed.
    """
    try:
        from brevitas import quant
    except ImportError as error:
        raise SystemExit("brevitas is not installed: pip install brevitas") from error
    model = copy.deepcopy(model)
    unsigned = _sees_no_negatives(model, images)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, Layer):
            continue
        act = quant.Uint8ActPerTensorFloat if unsigned[name] else quant.Int8ActPerTensorFloat
        made = brevitas_layer(
            layer,
            weight_quant=quant.Int8WeightPerChannelFloat,
            weight_bit_width=bits,
            input_quant=act,
            input_bit_width=bits,
        )
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, made)
    return model


@torch.no_grad()
def _sees_no_negatives(model: nn.Module, images: Tensor) -> dict[str, bool]:
    """By name, whether a layer's inputs are never negative."""
    found: dict[str, bool] = {}

    def watch(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[name] = bool((args[0] >= 0).all())

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, Layer)]
    hooks = [m.register_forward_pre_hook(partial(watch, n)) for n, m in layers]
    model.eval()(images)
    for hook in hooks:
        hook.remove()
    return found
