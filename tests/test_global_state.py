"""Nothing of the process is changed, and threads do not disturb each other."""

from __future__ import annotations

import random
import signal
import threading
import warnings
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cgmq_fx import CgmqError, Result, load, prepare, quantize


def net(size: int = 8) -> nn.Module:
    torch.manual_seed(size)
    return nn.Sequential(nn.Linear(6, size), nn.ReLU(), nn.Dropout(0.3), nn.Linear(size, 3))


def data() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 6, generator=generator), torch.randint(3, (4,), generator=generator))
        for _ in range(4)
    ]


def run(model: nn.Module, **options: Any) -> Result:
    arguments: dict[str, Any] = {"loss": cross_entropy, "epochs": 2, "progress": False} | options
    return quantize(model, "bops <= 2%", data(), **arguments)


def state() -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # type: ignore[index]
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        list(warnings.filters),
        signal.getsignal(signal.SIGINT),
    ]


ACTIONS: dict[str, Any] = {
    "quantize": run,
    "prepare": lambda model: prepare(model, "bops <= 2%", torch.ones(2, 6)).finalize(),
    "an error": lambda model: run(model, loss=lambda y, t: y.sum() * float("nan")),
    "an error of a user": lambda model: run(model, loss=lambda y, t: 1 / 0),
    "infeasible": lambda model: quantize(model, "bops <= 1", data()),
}


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
def test_no_global_state_is_left_behind(action: Any) -> None:
    model = net()
    before = state()
    with suppress(CgmqError):
        action(model)
    assert state() == before


def test_loading_leaves_nothing_behind(tmp_path: Any) -> None:
    path = run(net()).save(tmp_path / "net")
    before = state()
    load(path)
    assert state() == before


def test_threads_do_not_disturb_each_other() -> None:
    models = [net(size) for size in (5, 7, 9)]
    alone = [run(model) for model in models]
    found: dict[int, Result] = {}

    def work(index: int) -> None:
        found[index] = run(models[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(models))]
    before = state()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state() == before
    for index, result in enumerate(alone):
        other = found[index].model.state_dict()
        assert all(torch.equal(t, other[n]) for n, t in result.model.state_dict().items())
