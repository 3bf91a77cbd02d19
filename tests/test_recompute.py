"""Rounded tensors are rounded again in the backward pass, not kept for it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import cgmq_fx
from cgmq_fx.passes import recompute
from cgmq_fx.passes.copying import copy_graph
from cgmq_fx.passes.insert import QUANTIZERS


class Attention(nn.Module):
    """Layers that read rounded tensors as they are, reshaped and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 8, 1)
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.gelu(self.conv(x))
        y = torch.tanh(self.first(x))
        z: Tensor = self.second(torch.softmax(y @ x.transpose(1, 2), -1) @ y)
        return z


SHAPE = (4, 6, 5)


def prepared() -> cgmq_fx.Prepared:
    torch.manual_seed(0)
    run = cgmq_fx.prepare(
        Attention(), "bops <= 2%", torch.rand(SHAPE), scheme=cgmq_fx.Scheme((2, 4))
    )
    run.model.train()
    return run


def kept_for_backward(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """How many rounded tensors are made, and in how many of them something is kept."""
    made: list[Tensor] = []
    kept: set[int] = set()

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        made.append(output.detach())

    def note(tensor: Tensor, pack: Callable[[Tensor], Any] = lambda t: t) -> Any:
        packed = pack(tensor)
        if isinstance(packed, Tensor):
            kept.add(packed.untyped_storage().data_ptr())
        return packed

    handles = [q.register_forward_hook(watch) for q in model.get_submodule(QUANTIZERS).children()]
    with pytest.MonkeyPatch.context() as patch, saved_tensors_hooks(note, lambda t: t):
        patch.setattr(recompute, "pack", partial(note, pack=recompute.pack))
        model(x)
    assert kept
    for handle in handles:
        handle.remove()
    return len(made), sum(t.untyped_storage().data_ptr() in kept for t in made)


def test_no_rounded_tensor_is_kept() -> None:
    assert kept_for_backward(prepared().model, torch.rand(SHAPE)) == (8, 0)


def test_copies_keep_what_they_round() -> None:
    assert kept_for_backward(copy_graph(prepared().model), torch.rand(SHAPE)) == (8, 8)


def gradients(change: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
    model = prepared().model
    x = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))
    change(model)(x).square().sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_those_of_kept_tensors() -> None:
    def kept(model: nn.Module) -> nn.Module:
        model._forward_pre_hooks.clear()
        model._forward_hooks.clear()
        return model

    found, expected = gradients(lambda model: model), gradients(kept)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


def test_a_forward_pass_that_fails_leaves_nothing_behind() -> None:
    model = prepared().model
    with pytest.raises(RuntimeError):
        model(torch.rand(4, 3, 5))
    rounded = torch.rand(3, 3, requires_grad=True) * 2
    recompute.remember(rounded, lambda: rounded)
    product = rounded @ rounded
    assert isinstance(product.grad_fn._saved_self, Tensor)  # type: ignore[union-attr]
