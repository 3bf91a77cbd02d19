"""The jobs of a sweep: how many there are, where they run, and what each trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from cgmq_fx import sweeping
from cgmq_fx.cost_models import parse_budget
from tests.nets import small_classifier

BUDGETS = ["bops <= 1%", "bops <= 6%", "bops <= 2%"]


class OnGpu(nn.Module):
    """A model that says that it is on the first GPU, and notes where it is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.moves: list[torch.device] = []

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        weight = Mock(spec=torch.Tensor, device=torch.device("cuda", 0))
        return {"weight": weight}

    def to(self, device: Any) -> OnGpu:  # type: ignore[override]
        self.moves.append(device)
        return self


@pytest.mark.parametrize("count", [1, 2, 3])
def test_by_default_there_is_a_job_per_device(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert sweeping._jobs(None, OnGpu()) == count
    assert sweeping._jobs(5, OnGpu()) == 5
    exported = torch.export.export(small_classifier(), (torch.rand(2, 3),))
    assert sweeping._jobs(None, small_classifier()) == sweeping._jobs(None, exported) == 1


@pytest.mark.parametrize(
    ("made", "place"),
    [(OnGpu, ["cuda:0", "cuda:1", "cuda:0"]), (small_classifier, [])],
    ids=["gpu", "cpu"],
)
def test_jobs_take_the_devices_in_turn(
    made: Any, place: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(
        sweeping, "_run_stretch", lambda _, budgets, *__, **___: trained.append(budgets)
    )
    net = made()
    before = [parameter.device for parameter in net.parameters()]
    budgets = [parse_budget(budget) for budget in BUDGETS]
    for index in range(3):
        sweeping._work(Mock(model=net), budgets[index : index + 1], Mock(), index, 1)
    assert trained == [[budget] for budget in budgets]
    assert [str(device) for device in getattr(net, "moves", [])] == place
    assert [parameter.device for parameter in net.parameters()] == before


@pytest.mark.parametrize(
    ("count", "lengths"), [(1, [7]), (2, [3, 4]), (3, [2, 2, 3]), (7, [1] * 7)]
)
def test_stretches_are_neighbouring_and_even(count: int, lengths: list[int]) -> None:
    budgets = [parse_budget(f"bops <= {i} %") for i in range(1, 8)]
    stretches = list(sweeping._stretches(budgets, count))
    assert [len(s) for s in stretches] == lengths
    assert [b for s in stretches for b in s] == budgets
