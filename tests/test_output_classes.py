"""Models that return objects: a result returns the same ones, its files what those hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from cgmq_fx import load, prepare


class Pair(NamedTuple):
    """Two tensors with names."""

    first: Tensor
    second: Tensor


@dataclass
class Fields:
    """What a model of a library returns: fields that may be missing."""

    first: Tensor
    missing: Tensor | None = None


RETURNED: dict[str, tuple[Callable[[Tensor], Any], type, type]] = {
    "topk": (lambda y: y.topk(2, -1), torch.return_types.topk, tuple),
    "max": (lambda y: y.max(-1), torch.return_types.max, tuple),
    "within a dict": (lambda y: {"sorted": y.sort(-1), "y": y}, dict, dict),
    "named tuple": (lambda y: Pair(y, y * 2), Pair, tuple),
    "dataclass": (Fields, Fields, dict),
}


class Returns(nn.Module):
    """A layer, and an object made of what it gives."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.layer(x))


@pytest.mark.parametrize("name", RETURNED)
def test_files_return_what_the_objects_of_a_model_hold(name: str, tmp_path: Path) -> None:
    wrap, own, plain = RETURNED[name]
    result = prepare(Returns(wrap), "bops <= 50%", torch.randn(4, 4)).finalize()
    x = torch.randn(3, 4)
    expected = result.model(x)
    assert type(expected) is own
    exported = result.export(tmp_path / "net.pt2")
    result.save(tmp_path / "net.safetensors")
    program = torch.export.load(exported.path).module()
    for found in (program(x), load(tmp_path / "net.safetensors").model(x)):
        assert type(found) is plain
        held = torch.utils._pytree.tree_leaves(found)
        torch.testing.assert_close(held, torch.utils._pytree.tree_leaves(expected))
