"""Files that are no artifacts, and artifacts that were changed at random."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cgmq_fx import ArtifactError, CgmqError, load
from tests.nets import NETS
from tests.test_artifact import Content, quantized, read, write


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(NETS["linear_norm"]).save(tmp_path_factory.mktemp("files") / "net")


@pytest.fixture(scope="module")
def content(path: Path) -> Content:
    return read(path)


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(len(data) * share)]


@pytest.mark.parametrize(
    "damage",
    [
        cut(0.0),
        cut(0.001),
        cut(0.5),
        cut(0.999),
        lambda data: data + b"more",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: b"\x80\x04K\x01.",
        lambda data: b"PK\x03\x04" + data,
    ],
)
def test_damaged_files_are_refused(
    path: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "file").write_bytes(damage(path.read_bytes()))
    with pytest.raises(ArtifactError, match="cannot be read as a safetensors file"):
        load(tmp_path / "file")


@pytest.mark.parametrize("name", ["missing", "missing/too", "."])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("9" * 5_000, "is no JSON"),
        ("[]", "is not an object"),
        ("null", "is not an object"),
        ("{}", "has format None"),
        ('{"format": 1}', "damaged"),
    ],
)
def test_headers_that_are_none_are_refused(
    content: Content, tmp_path: Path, header: str, message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        load(write(tmp_path / "file", header, content[1]))


def test_safetensors_of_others_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "file", {"format": "pt"})
    with pytest.raises(ArtifactError, match="not one that cgmq_fx wrote"):
        load(tmp_path / "file")


Place = tuple[Any, Any]


def places(value: Any) -> list[Place]:
    """Every (container, key) in a JSON value."""
    found: list[Place] = []
    stack = [value]
    while stack:
        holder = stack.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        found.extend((holder, key) for key in keys)
        stack.extend(holder[key] for key in keys if isinstance(holder[key], dict | list))
    return found


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["leaf", "x", "__class__", "aten.relu.default", "output", "tune", "0.weight"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["node", "tuple", "dict", "slice", "a"]), inner)
    ),
    max_leaves=4,
)


def survives(path: Path, header: Any, tensors: dict[str, torch.Tensor]) -> bool:
    """Load, and use whatever could be loaded; False if it was refused as it should be."""
    try:
        result = load(write(path, header, tensors))
    except CgmqError:
        return False
    assert result.cost.satisfied
    assert str(result)
    assert json.dumps(result.report())
    return True


SLOW = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SLOW
@given(data=st.data())
def test_random_changes_of_the_header_end_in_errors_of_the_library(
    content: Content, tmp_path: Path, data: st.DataObject
) -> None:
    header, tensors = copy.deepcopy(content[0]), content[1]
    for _ in range(data.draw(st.integers(1, 3))):
        holder, key = data.draw(st.sampled_from(places(header)))
        change = data.draw(st.sampled_from(["remove", "replace", "copy"]))
        if change == "remove":
            del holder[key]
        elif change == "replace":
            holder[key] = data.draw(VALUES)
        else:
            other, index = data.draw(st.sampled_from(places(header)))
            holder[key] = copy.deepcopy(other[index])
    assert survives(tmp_path / "file", header, tensors) in (True, False)


@settings(SLOW, max_examples=40)
@given(data=st.data())
def test_random_changes_of_tensors_end_in_errors_of_the_library(
    content: Content, tmp_path: Path, data: st.DataObject
) -> None:
    tensors = dict(content[1])
    name = data.draw(st.sampled_from(sorted(tensors)))
    shape = data.draw(st.lists(st.integers(0, 3), max_size=3) | st.just(list(tensors[name].shape)))
    dtypes = [torch.float32, torch.float16, torch.int32, torch.int64, torch.bool, torch.uint8]
    value = data.draw(st.sampled_from([0, 1, -1, 2, 8, 33, float("nan"), float("inf")]))
    kind = data.draw(st.sampled_from(dtypes))
    tensors[name] = torch.full(shape, 0.0).fill_(value).nan_to_num(posinf=9.0).to(kind)
    assert survives(tmp_path / "file", content[0], tensors) in (True, False)


def test_an_unchanged_copy_survives(content: Content, tmp_path: Path) -> None:
    assert survives(tmp_path / "file", *content)


def half_written(path: Path, data: bytes) -> int:
    with path.open("wb") as file:
        file.write(data[:100])
    raise OSError("disk full")


def test_an_error_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = quantized(NETS["tied"])
    before = result.save(tmp_path / "a").read_bytes()
    monkeypatch.setattr(Path, "write_bytes", half_written)
    with pytest.raises(ArtifactError, match=r"a cannot be written: .*disk full"):
        result.save(tmp_path / "a")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [before]


def test_saving_replaces_and_is_readable_by_others(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "plain").touch()
    path = quantized(NETS["tied"]).save(tmp_path / "a")
    assert load(path).cost.satisfied
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("name", "scale", "message"),
    [("a", float("nan"), "written as JSON"), ("none/a", 1.0, "cannot be written")],
)
def test_what_cannot_be_written_is_said(
    name: str, scale: float, message: str, tmp_path: Path
) -> None:
    result = quantized(NETS["tied"])
    result.inputs = replace(result.inputs, kwargs={"scale": scale})
    with pytest.raises(ArtifactError, match=message):
        result.save(tmp_path / name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_metrics_need_not_be_finite(value: float, tmp_path: Path) -> None:
    result = quantized(NETS["tied"])
    result = replace(result, metrics={"metric": value})
    found = load(result.save(tmp_path / "net.safetensors")).metrics["metric"]
    assert str(found) == str(value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_bits_of_earlier_files_may_be_wider(
    path: Path, content: Content, tmp_path: Path, dtype: torch.dtype
) -> None:
    header, tensors = copy.deepcopy(content)
    bits = [name for name in tensors if name.endswith(".bits")]
    assert bits
    write(tmp_path / "old", header, {**tensors, **{name: tensors[name].to(dtype) for name in bits}})
    old, new = load(tmp_path / "old"), load(path)
    assert {b.dtype for n, b in old.model.named_buffers() if n.endswith(".bits")} == {torch.int8}
    assert old.cost.assignment == new.cost.assignment
