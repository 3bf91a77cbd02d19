"""Options that can only be a mistake: one error of the library that says what is taken."""

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import cgmq_fx
from cgmq_fx.given import path_of, whole_number

X = torch.rand(4, 8)
BUDGET = "bops <= 5%"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))


prepare = partial(cgmq_fx.prepare, net(), BUDGET, X)
quantize = partial(cgmq_fx.quantize, net(), BUDGET, [X], epochs=0, progress=False)
sweep = partial(cgmq_fx.sweep, net(), [BUDGET], [X], epochs=0, progress=False)

TAKING_A_SCHEME: list[tuple[str, Callable[..., Any]]] = [
    ("prepare", prepare),
    ("cost", partial(cgmq_fx.cost, net(), X)),
    ("explain", partial(cgmq_fx.explain, net(), BUDGET, X)),
    ("quantize", quantize),
    ("sweep", sweep),
]

MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    **{
        f"scheme of {name}": (partial(call, scheme="channel"), "takes a Scheme, .* not 'channel'")
        for name, call in TAKING_A_SCHEME
    },
    **{
        f"search_steps of {steps!r}": (
            partial(prepare, search_steps=steps),
            f"search_steps must be a whole number, 1 or more, not {steps!r}",
        )
        for steps in ("10", 2.5, 0, True, None)
    },
    "batches": (lambda: prepare().calibrate([X], 0), "batches must be a whole number, 1 or more"),
    "jobs": (partial(sweep, jobs=0), "jobs must be a whole number, 1 or more, not 0"),
    "direction": (
        partial(prepare, direction=["marginal"]),
        r"there is no direction \['marginal'\]; known are marginal, gradient",
    ),
    "checkpoint": (partial(quantize, checkpoint=5), "checkpoint= takes a path, not 5"),
    "folder of a Checkpoint": (lambda: cgmq_fx.Checkpoint(None), "takes a path, not None"),  # type: ignore[arg-type]
    "folder of a sweep": (partial(sweep, folder=5), "folder= takes a path, not 5"),
    "freeze": (lambda: prepare().freeze(5), "by the names of quantizers, not as 5"),  # type: ignore[arg-type]
    "verify a result": (
        lambda: cgmq_fx.verify(prepare().finalize()),  # type: ignore[arg-type]
        "verify takes a path, not <Result of 2 layers",
    ),
    "export to nothing": (
        lambda: prepare().finalize().export(None),  # type: ignore[arg-type]
        "export takes a path, not None",
    ),
    "save to nothing": (lambda: prepare().finalize().save(None), "save takes a path, not None"),  # type: ignore[arg-type]
    "load": (lambda: cgmq_fx.load(5), "load takes a path, not 5"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_clear_errors(mistake: Callable[[], Any], message: str) -> None:
    with pytest.raises(cgmq_fx.OptionError, match=message):
        mistake()


@pytest.mark.parametrize("given", [3, np.int64(3), np.uint8(3)])
def test_whole_numbers_of_any_kind_are_taken(given: Any) -> None:
    found = whole_number("steps", given, 3)
    assert (found, type(found)) == (3, int)


@pytest.mark.parametrize("given", [2, 3.0, Fraction(3), "3", True])
def test_what_is_no_whole_number_is_refused(given: Any) -> None:
    with pytest.raises(cgmq_fx.OptionError, match="steps must be a whole number, 3 or more, not"):
        whole_number("steps", given, 3)


def test_paths_are_taken_as_text_and_as_objects(tmp_path: Path) -> None:
    assert path_of("x", str(tmp_path)) == path_of("x", tmp_path) == tmp_path
