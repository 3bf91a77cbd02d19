"""The library's own file: a round trip that is exact, and files that are not to be trusted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import cgmq_fx
from cgmq_fx.calibrate import best_range

KEY = "cgmq_fx"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[cgmq_fx.Result, Path]:
    data = [torch.rand(4, 1, 8, 8) for _ in range(3)]
    result = cgmq_fx.quantize(
        net(), "bops <= 3%, weights <= 50% of 8 bits", data, epochs=2, progress=False
    )
    return result, result.save(tmp_path_factory.mktemp("saved") / "net.safetensors")


def test_a_round_trip_is_exact(saved: tuple[cgmq_fx.Result, Path]) -> None:
    result, path = saved
    loaded = cgmq_fx.load(path)
    inputs = torch.rand(5, 1, 8, 8)
    assert torch.equal(loaded.model(inputs), result.model(inputs))
    assert str(loaded) == str(result)
    assert loaded.history == result.history
    assert loaded.budget.constraints[1].bound == result.budget.constraints[1].bound


Edit = Callable[[dict[str, Any]], None]


def node(header: dict[str, Any], op: str) -> dict[str, Any]:
    found: dict[str, Any] = next(n for n in header["graph"]["nodes"] if n["op"] == op)
    return found


EDITS: dict[str, tuple[Edit, str]] = {
    "newer format": (lambda h: h.update(format=99), "upgrade"),
    "file access": (
        lambda h: node(h, "call_function").update(target="aten.from_file.default"),
        "not allowed",
    ),
    "a function of python": (
        lambda h: node(h, "call_function").update(target="os.system"),
        "not allowed",
    ),
    "code in a name": (
        lambda h: node(h, "call_function").update(name="x\n    import os"),
        "no name",
    ),
    "code in a path": (
        lambda h: node(h, "get_attr").update(target="a;import os"),
        "no path|does not hold",
    ),
    "code in an argument": (
        lambda h: h["graph"].update(inputs=["x=__import__('os')"]),
        "no name",
    ),
    "no graph": (lambda h: h.pop("graph"), "damaged"),
    "unknown module": (
        lambda h: next(iter(h["graph"]["modules"].values())).update(type="Evil"),
        "not known|cannot hold",
    ),
}


def edited(path: Path, out: Path, edit: Edit) -> Path:
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    edit(header)
    save_file(tensors, out, {KEY: json.dumps(header)})
    return out


@pytest.mark.parametrize(("edit", "message"), EDITS.values(), ids=EDITS)
def test_an_edited_file_is_refused(
    saved: tuple[cgmq_fx.Result, Path], tmp_path: Path, edit: Edit, message: str
) -> None:
    path = edited(saved[1], tmp_path / "edited.safetensors", edit)
    with pytest.raises(cgmq_fx.ArtifactError, match=message):
        cgmq_fx.load(path)


def test_more_bits_than_the_budget_allows_are_found(
    saved: tuple[cgmq_fx.Result, Path], tmp_path: Path
) -> None:
    with safe_open(saved[1], framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if name.endswith(".bits"):
            tensor.fill_(8)
    save_file(tensors, tmp_path / "more.safetensors", metadata)
    with pytest.raises(cgmq_fx.BoundError, match="VIOLATED"):
        cgmq_fx.load(tmp_path / "more.safetensors")


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"{}" * 50])
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(cgmq_fx.ArtifactError, match="cannot be read"):
        cgmq_fx.load(tmp_path / "file")


@pytest.mark.parametrize(("bits", "most"), [(2, 1.2), (4, 1.5), (8, 2.5)])
def test_one_outlier_does_not_ruin_a_range(bits: int, most: float) -> None:
    values = torch.randn(1, 10_000, generator=torch.Generator().manual_seed(0))
    clean = best_range(values, bits, signed=True)
    values[0, 5] = 1e6
    assert float(best_range(values, bits, signed=True) / clean) < most


def test_a_range_is_near_the_best_in_squared_error() -> None:
    values = torch.randn(1, 4000, generator=torch.Generator().manual_seed(1))
    # The best ternary quantizer of a normal variable has values +-1.224 and the error 0.190 (Max,
    # 1960); its outer value is 2/3 of the range, so the range is 1.836.
    assert float(best_range(values, 2, signed=True)) == pytest.approx(1.836, rel=0.05)
