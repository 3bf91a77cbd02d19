"""What a function is told by: options make it another one, another process does not."""

from __future__ import annotations

import importlib
import math
import os
import pickle
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache, partial, wraps
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from cgmq_fx.fingerprint import fingerprint

SHARE = 0.5


def told(function: Any) -> dict[str, str | None]:
    return fingerprint(loss=function)


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


class Config:
    """Options, by name and as members, one of them a class."""

    class Mode(Enum):
        A = 1
        B = 2

    names = ("mean", "sum")

    def __init__(self, weight: float = 1.0) -> None:
        self.weight, self.mode = weight, self.Mode.A


class Loader:
    """What has no options that tell what a loss does: where it is, and when it was made."""

    def __init__(self) -> None:
        self.made = time.time()

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def scripted(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().mean()


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
    assert told(make(0.0)) == told(make(0.0))
    assert told(make(0.0)) != told(make(1.0))


USES = """
import torch.nn.functional as F
from functools import lru_cache
from torch import jit, nn
from types import SimpleNamespace
{made}
def loss(output, target):
    return {used}
"""
METHODS = "class Own({}):\n    def {}(self, *given): return self.of(*given)\n    def of(*_): {}"


@pytest.mark.parametrize(
    ("source", "used", "options"),
    [
        ("of = F.{}", "of(output, target)", ("l1_loss", "mse_loss")),
        ("from torch.nn.functional import {} as of", "of(output)", ("relu", "relu6")),
        ("options = dict(label_smoothing={})", "F.cross_entropy(output, **options)", (0, 1)),
        ("weights = [1.0, {}]", "output * weights[1]", (0, 1)),
        ("options = SimpleNamespace(weight={})", "output * options.weight", (0, 1)),
        ("class Own:\n    weight = {}", "output * Own.weight", (0, 1)),
        ("class Own:\n    @staticmethod\n    def of(o): return o * {}", "Own.of(output)", (0, 1)),
        ("class Own:\n    @classmethod\n    def of(c, o): return o * {}", "Own.of(output)", (0, 1)),
        ("class Own:\n    @property\n    def of(self): return {}", "Own().of", (0, 1)),
        ("class Base:\n    weight = {}\nclass Own(Base): ...", "Own().weight", (0, 1)),
        ("class Own:\n    def __init__(self): self.of = {}\nown = Own()", "own.of", (0, 1)),
        ("@lru_cache\ndef of(output): return output * {}", "of(output)", (0, 1)),
        ("def inner(o): return o * {}\ndef of(o): return inner(o)", "of(output)", (0, 1)),
        ("def of(): return of.weight\nof.weight = {}", "output * of()", (0, 1)),
        ("", "nn.CrossEntropyLoss(label_smoothing={})(output, target)", (0, 1)),
    ],
)
def test_what_code_reads_makes_another_function(
    source: str, used: str, options: tuple[Any, Any]
) -> None:
    def compiled(option: Any) -> Any:
        scope: dict[str, Any] = {"__name__": "losses_of_a_notebook"}
        exec(USES.format(made=source.format(option), used=used.format(option)), scope)
        return scope["loss"]

    first, again, other = map(compiled, (options[0], *options))
    assert told(first) == told(again) != told(other)
    assert told(lru_cache(first)) == told(lru_cache(again)) != told(lru_cache(other))


@pytest.mark.parametrize("base", ["object", "nn.Module"])
def test_the_methods_that_a_method_calls_make_another_function(base: str) -> None:
    def compiled(helper: str) -> Any:
        scope: dict[str, Any] = {"__name__": "losses_of_a_notebook", "nn": nn}
        name = "__call__" if base == "object" else "forward"
        exec(METHODS.format(base, name, helper), scope)
        return scope["Own"]()

    first, again, other = map(compiled, ("return 1", "return 1", "return 2"))
    assert told(first) == told(again) != told(other)
    assert told(first.of) == told(again.of) != told(other.of)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_scripts_are_known_by_their_graph() -> None:
    class Script(nn.Module):
        def forward(self, output: Tensor) -> Tensor:
            return output.abs()

    class Other(nn.Module):
        def forward(self, output: Tensor) -> Tensor:
            return output.square()

    Other.__qualname__ = Script.__qualname__
    first, again, other = map(torch.jit.script, (Script(), Script(), Other()))
    assert told(first) == told(again) != told(other)

    def other_scripted(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean()

    assert told(torch.jit.script(scripted)) == told(torch.jit.script(scripted))
    assert told(torch.jit.script(scripted)) != told(torch.jit.script(other_scripted))


@pytest.mark.parametrize(
    "reads",
    [
        "import own_losses\ndef loss(output): return own_losses.of(output)",
        "from own_losses import of\ndef loss(output): return of(output)",
        "def loss(output):\n    from own_losses import of\n    return of(output)",
        "def loss(output):\n    import own_losses\n    return own_losses.of(output)",
        "def loss(o):\n    from own_losses import of\n    import own_losses\n    return of(o)",
    ],
)
def test_code_of_the_users_modules_makes_another_function(
    reads: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def compiled(weight: float, other: float) -> Any:
        (tmp_path / "own_losses.py").write_text(
            f"weight = {weight}\nother = {other}\ndef of(output): return output * weight\n"
        )
        sys.modules.pop("own_losses", None)
        importlib.invalidate_caches()
        scope: dict[str, Any] = {"__name__": "a_script"}
        exec(reads, scope)
        return told(scope["loss"])

    assert compiled(1.0, 1.0) == compiled(1.0, 2.0) != compiled(2.0, 2.0)
    del sys.modules["own_losses"]


def test_loaders_are_known_by_their_class() -> None:
    first, other = Loader(), Loader()
    other.made += 1
    assert told(made(first)) == told(made(other))
    assert told(made(Config(1.0))) != told(made(Config(2.0)))


def test_globals_make_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    before = told(lambda *both: loss(*both) / 2)
    monkeypatch.setattr(sys.modules[__name__], "SHARE", 0.25)
    assert told(lambda *both: loss(*both) / 2) != before


def test_what_it_is_can_be_read() -> None:
    assert told(None) == {"loss": None}
    assert told(cross_entropy) == {"loss": "torch.nn.functional.cross_entropy"}
    expected = "functools.partial(torch.nn.functional.cross_entropy, label_smoothing=0.9)"
    assert told(partial(cross_entropy, label_smoothing=0.9)) == {"loss": expected}
    assert str(told(Net)["loss"]).endswith("test_fingerprint.Net")
    assert told(loss)[f"SHARE of {__name__}.loss"] == "0.5"
    assert all(len(str(part)) < 200 for part in told(made(list(range(10_000)))).values())


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
        assert told(function) == told(function)


def test_an_object_that_was_pickled_is_the_same() -> None:
    for function in (partial(max, {"a": (1, 2)}), Slotted(2.0), nn.CrossEntropyLoss()):
        assert told(pickle.loads(pickle.dumps(function))) == told(function)


SOURCE = """
from functools import partial
import torch
from tests.test_fingerprint import Config, Loader, Net, Weighted, loss, made, scripted, told
torch.manual_seed(0)
net = torch.compile(Net(), backend="eager")
for function in (
    lambda a: (lambda b: b)(a in {"mean", "sum", "none"}),
    Weighted(2.0), Weighted(2.0).half, Net(), net, made({"sum", "mean", "none"}),
    partial(loss, frozenset({"a", "b", "c"}), lock=Weighted),
    made(object()), made(loss.__get__(net)), made({name: 1 for name in {"a", "b", "c", "d"}}),
    made(Config()), made({Config.Mode.A, Config.Mode.B}), made(Loader()),
    torch.jit.script(scripted),
):
    print(told(function))
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
