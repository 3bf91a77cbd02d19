"""Files that ask for more than a model does: refused at once, without the memory they ask for."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cgmq_fx import ArtifactError, BudgetError, TargetError, load, load_target
from cgmq_fx.cost_models import parse_budget
from cgmq_fx.cost_models.bits import _pairs
from cgmq_fx.cost_models.target import parse_target
from tests.nets import NETS
from tests.test_artifact import Content, Header, X, put, quantized, read, refused, write

SECONDS = 4.0
MEGABYTES = 200


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Content:
    return read(quantized(NETS["keywords"]).save(tmp_path_factory.mktemp("hostile") / "net"))


@pytest.fixture(autouse=True)
def within_limits() -> Iterator[None]:
    start, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MEGABYTES * 1024


def chain(header: Header, length: int, target: str, *first: Any) -> None:
    """Nodes that each apply `target` to the one before, twice."""
    put(header, target, *first, name="n0")
    for i in range(1, length):
        before = {"node": f"n{i - 1}"}
        put(header, target, before, before, name=f"n{i}")


def wide(header: Header, *size: int) -> Header:
    """A tensor of any size from no data."""
    return put(header, "aten.zeros.default", list(size), name="wide")


WIDE = {"node": "wide"}

ASKED: dict[str, tuple[Callable[[Header], Any], str]] = {
    "long power": (lambda h: put(h, "operator.pow", 10, 10**9), "power that is too high"),
    "long product": (lambda h: chain(h, 80, "operator.mul", 3, 3), "more than an artifact"),
    "shift of a list": (lambda h: put(h, "operator.mul", [1], 10**12), "is no number"),
    "padded text": (lambda h: put(h, "operator.mod", "%999999999d", 1), "is no number"),
    "joined text": (lambda h: chain(h, 60, "operator.add", "ab", "cd"), "is no number"),
    "a text as index": (lambda h: put(h, "operator.getitem", X, "ab"), "is no number"),
    "sum of lists": (lambda h: put(h, "torch.sym_sum", [[1], "a"]), "is no number"),
    "huge": (lambda h: wide(h, 2**31, 2**31), "damaged"),
    "large": (lambda h: wide(h, 2**21, 2**21), "more than an artifact can hold"),
    "rank": (lambda h: wide(h, *[1] * 40), "more than an artifact can hold"),
    "rows": (lambda h: put(wide(h, 10**9), "aten.unbind.int", WIDE), "too much work"),
    "split": (lambda h: put(wide(h, 10**9), "aten.split.Tensor", WIDE, 1), "too much work"),
    "chunks": (
        lambda h: put(wide(h, 10**9), "aten.chunk.default", WIDE, 10**9),
        "too much work",
    ),
    "parts": (lambda h: put(h, "aten.tensor_split.sections", X, 10**9), "too much work"),
    "decimals": (
        lambda h: put(h, "aten.round.decimals", X, kwargs={"decimals": 10**12}),
        "too much work",
    ),
    "input": (
        lambda h: h["inputs"].update(args=[{"shape": [2**50, 4], "dtype": "float32"}]),
        "more than an artifact can hold|damaged",
    ),
    # torch looks these numbers up in a table without a check, and crashes
    "dtype": (lambda h: put(h, "aten.softmax.int", X, 0, 2**31), "as its dtype"),
    "dtype of a node": (lambda h: put(h, "aten.softmax.int", X, 0, X), "as its dtype"),
    "dtype by name": (
        lambda h: put(h, "aten.to.dtype", X, kwargs={"dtype": -(2**40)}),
        "as its dtype",
    ),
    "layout": (
        lambda h: put(h, "aten.zeros.default", [1], kwargs={"layout": 2**40}),
        "as its layout",
    ),
    "a lazy module": (lambda h: put(h, "aten.to.dtype", X, {"dtype": "onnx"}), "is no dtype"),
    "long path": (lambda h: put(h, ".".join("a" * 99), op="get_attr"), "is no path"),
    "long name": (lambda h: put(h, "aten.relu.default", X, name="a" * 10**5), "is no name"),
    "no fake kernel": (
        lambda h: put(h, "aten._weight_norm.default", X, X, 2**40),
        "damaged|not allowed",
    ),
    "metric": (lambda h: h["metrics"].update({"\x1b[2J": 1.0}), "is no text"),
    "scope": (lambda h: h["budget"][0].update(scope="\x1b[2J"), "is no text"),
}


@pytest.mark.parametrize(("edit", "message"), ASKED.values(), ids=ASKED)
def test_what_asks_for_too_much_is_refused(
    content: Content, tmp_path: Path, edit: Callable[[Header], Any], message: str
) -> None:
    error = refused(content, tmp_path, lambda header, _: edit(header))
    with pytest.raises(ArtifactError, match=message):
        raise error


def test_very_many_nodes_are_refused(content: Content, tmp_path: Path) -> None:
    row = {"op": "call_function", "target": "aten.relu.default", "args": [X], "kwargs": {}}

    def edit(header: Header, _: object) -> None:
        nodes = [row | {"name": f"n{i}", "module": ""} for i in range(70_000)]
        header["graph"]["nodes"][-1:-1] = nodes

    with pytest.raises(ArtifactError, match="at most 65536 nodes"):
        raise refused(content, tmp_path, edit)


def test_large_activations_are_shapes_only(content: Content, tmp_path: Path) -> None:
    """A declared size within the limits is accepted, and nothing of that size is made."""
    header, tensors = content
    header = json.loads(json.dumps(header))
    wide(header, 2**15, 2**15)
    put(header, "aten.add.Tensor", WIDE, 1, name="more")
    assert load(write(tmp_path / "wide", header, tensors)).cost.satisfied


@pytest.mark.parametrize("name", ["pipe", "\0", "x" * 5000])
def test_what_is_no_plain_file_is_refused(tmp_path: Path, name: str) -> None:
    if name == "pipe":
        os.mkfifo(tmp_path / name)
    for refuse, error in ((load, ArtifactError), (load_target, TargetError)):
        with pytest.raises(error):
            refuse(tmp_path / name)


def toy(**fields: Any) -> bytes:
    tables = {"*": [{"weight": 8, "activation": 8, "cycles": 1.0}]}
    content = {"name": "toy", "description": "A toy.", "source": "Made up.", "tables": tables}
    return json.dumps(content | fields).encode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (toy(tables={"*" * 100_000: []}), "is no name"),
        (toy(tables={str(i): [] for i in range(1000)}), "map 1 to 256 op patterns"),
        (toy(memories={"\x1b[2J": 1}), "is no name"),
        (toy(name="\x1b[2J"), "cannot be printed"),
        (toy(source="x" * 100_000), "must be a text"),
        (b"[" * 100_000, "is no target file"),
        (b"9" * 100_000, "is no target file"),
        (b'{"name": ' * 5_000, "is no target file"),
        (b"\xff\xfe", "is no target file"),
    ],
)
def test_hostile_targets_are_refused(text: bytes, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        parse_target(text, "toy.json")


@pytest.mark.parametrize(
    "text",
    [
        "bops" + " " * 9_900 + "x",
        "bops <= 1" + " " * 9_900 + "!",
        "bops <= " + "9" * 9_900,
        "bops <= 1e" + "9" * 9_900,
        "bops <= 1" + "k" * 9_900,
        "weights <= 1 " + "milli" * 8,
        "bops[" + "*a" * 4_000 + "] <= 1, bops <= x",
        "bops[" * 1_900,
        " and " * 1_900,
        "b" * 20_000,
    ],
)
def test_hostile_budgets_are_refused(text: str) -> None:
    with pytest.raises(BudgetError):
        parse_budget(text)


def test_gates_that_meet_as_pairs_are_counted_without_laying_them_out() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.choice([2, 4, 8], (30, 1)), rng.choice([0, 16], (1, 7))
    plain = np.bincount((first * 64 + second).ravel())
    expected = [(int(plain[c]), int(c) // 64, int(c) % 64) for c in np.flatnonzero(plain)]
    assert _pairs(first, second) == tuple(expected)
    many = _pairs(first.repeat(10**5, 0), second.repeat(10**5, 1))
    assert sum(count for count, _, _ in many) == 21 * 10**11
    assert _pairs(np.full(3, 2), np.full((5, 3), 4)) == ((15, 2, 4),)
