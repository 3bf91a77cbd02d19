"""What a function is told by: options make it another one, another process does not."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from cgmq_fx.fingerprint import name_of

SHARE = 0.5


def loss(output: Tensor, target: Tensor) -> Tensor:
    return SHARE * cross_entropy(output, target)


def made(held: Any, **options: Any) -> Callable[..., Any]:
    def inner(output: Tensor, target: Tensor) -> Any:
        return held, options, loss(output, target)

    return inner


class Weighted:
    """A loss with an option, a lock, itself, and a set that has no order."""

    def __init__(self, weight: float) -> None:
        self.weight, self.lock, self.own = weight, threading.Lock(), self
        self.names = {"mean", "sum", "none", "batch"}

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return self.weight * loss(output, target)

    def half(self, output: Tensor, target: Tensor) -> Tensor:
        return self(output, target) / 2


@dataclass(frozen=True, slots=True)
class Slotted:
    weight: float

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return self.weight * loss(output, target)


class Net(nn.Module):
    """A loss with a parameter, a buffer and a private option, and a hook that is no option."""

    def __init__(self, weight: float = 1.0, scale: float = 1.0, option: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight]))
        self.register_buffer("scale", torch.tensor([scale]), persistent=False)
        self._option = option
        self.inner = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.inner.weight)
        self.inner.register_forward_hook(lambda *_: None)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self._option * loss(output, target)


def other_forward(self: Net, output: Tensor, target: Tensor) -> Tensor:
    return output


@pytest.mark.parametrize(
    "make",
    [
        lambda o: partial(cross_entropy, label_smoothing=o),
        lambda o: partial(loss, o),
        lambda o: partial(partial(loss, o), target=1),
        lambda o: partial(kl_div if o else cross_entropy),
        Weighted,
        lambda o: Weighted(o).half,
        lambda o: MethodType(loss, Weighted(o)),
        Slotted,
        lambda o: Net(weight=o),
        lambda o: Net(scale=o),
        lambda o: Net(option=o),
        lambda o: nn.Sequential(Net(), Net(option=o)),
        lambda o: nn.CrossEntropyLoss(label_smoothing=o),
        lambda o: nn.CrossEntropyLoss(weight=torch.tensor([1.0, o])),
        made,
        lambda o: made(made(o)),
        lambda o: made(Weighted(o)),
        lambda o: made({"weight": [o]}),
        lambda o: made(Namespace(weight=o)),
        lambda o: made(np.array([1.0, o])),
        lambda o: made(np.array([1.0, o], dtype=object)),
        lambda o: made(0, weight=(o, {o})),
        lambda o: lambda output, target, weight=o: weight * output,
        lambda o: wraps(cross_entropy)(made(o)),
        lambda o: [math.dist, math.fmod][int(o)],
        lambda o: [torch.dot, torch.vdot][int(o)],
        lambda o: [torch.ops.aten.mse_loss.default, torch.ops.aten.l1_loss.default][int(o)],
        lambda o: [lambda a, b: a - b, lambda a, b: a + b][int(o)],
        lambda o: type("Net", (Net,), {} if o else {"forward": other_forward})(),
    ],
)
def test_options_and_code_make_another_function(make: Callable[[float], Any]) -> None:
    assert name_of(make(0.0)) == name_of(make(0.0))
    assert name_of(make(0.0)) != name_of(make(1.0))


def test_globals_make_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    before = name_of(lambda *both: loss(*both) / 2)
    monkeypatch.setattr(sys.modules[__name__], "SHARE", 0.25)
    assert name_of(lambda *both: loss(*both) / 2) != before


def test_what_it_is_can_be_read() -> None:
    assert name_of(None) is None
    assert name_of(cross_entropy) == "torch.nn.functional.cross_entropy"
    expected = "functools.partial(torch.nn.functional.cross_entropy, label_smoothing=0.9)"
    assert name_of(partial(cross_entropy, label_smoothing=0.9)) == expected
    assert str(name_of(Net)).endswith("test_fingerprint.Net")
    assert len(str(name_of(made(list(range(10_000)))))) < 200


def generated() -> Iterator[int]:
    yield 1


class Odd:
    """Says no to everything."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise KeyError(protocol)

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return output


def deep() -> list[Any]:
    found: list[Any] = []
    for _ in range(5000):
        found = [found]
    return found


@pytest.mark.parametrize(
    "value",
    [
        Odd(),
        deep(),
        generated(),
        torch.Generator(),
        torch.eye(3).to_sparse(),
        torch.empty(3, device="meta"),
        nn.LazyLinear(3),
        torch.compile(loss, backend="eager"),
        torch.vmap(loss),
        np.add,
    ],
    ids=lambda value: type(value).__name__,
)
def test_odd_things_have_a_name(value: Any) -> None:
    for function in (value, made(value), partial(loss, value)):
        assert name_of(function) == name_of(function)


def test_an_object_that_was_pickled_is_the_same() -> None:
    for function in (partial(max, {"a": (1, 2)}), Slotted(2.0), nn.CrossEntropyLoss()):
        assert name_of(pickle.loads(pickle.dumps(function))) == name_of(function)


SOURCE = """
from functools import partial
import torch
from cgmq_fx.fingerprint import name_of
from tests.test_fingerprint import Net, Weighted, loss, made
torch.manual_seed(0)
net = torch.compile(Net(), backend="eager")
for function in (
    lambda a: (lambda b: b)(a in {"mean", "sum", "none"}),
    Weighted(2.0), Weighted(2.0).half, Net(), net, made({"sum", "mean", "none"}),
    partial(loss, frozenset({"a", "b", "c"}), lock=Weighted),
    made(object()), made(loss.__get__(net)),
):
    print(name_of(function))
"""


def test_another_process_tells_the_same() -> None:
    told = {
        subprocess.run(
            [sys.executable, "-c", SOURCE],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1
