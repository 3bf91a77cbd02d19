"""The native kernel against the reference in PyTorch, and what happens where it cannot be had."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cgmq_fx.passes import native
from cgmq_fx.passes.grid import BITS_DTYPE, PASS_THROUGH, adjacent_widths, grid
from cgmq_fx.passes.kernel import Statistic, fake_quantize, reference, reference_backward
from cgmq_fx.passes.placement import Places, places

LAST = torch.channels_last


@pytest.fixture(autouse=True)
def built() -> None:
    if native._library() is None:
        pytest.skip("no native kernel on this machine")


@pytest.mark.parametrize(
    ("shape", "strides", "parameter", "expected"),
    [
        ((4, 6), (6, 1), (), Places(24, 1)),
        ((4, 6), (6, 1), (1, 1), Places(24, 1)),
        ((4, 6), (6, 1), (4, 1), Places(6, 4)),
        ((4, 6), (6, 1), (6,), Places(1, 6)),
        ((4, 6), (6, 1), (4, 6), Places(1, 24)),
        ((2, 3, 4, 5), (60, 20, 5, 1), (1, 3, 1, 1), Places(20, 3)),
        ((2, 3, 4, 5), (60, 1, 15, 3), (1, 3, 1, 1), Places(1, 3)),
        ((2, 3, 4, 5), (60, 1, 15, 3), (2, 3, 1, 1), None),  # not in this order in memory
        ((2, 3, 4, 5), (60, 20, 5, 1), (2, 1, 4, 1), None),
        ((2, 3, 4, 5), (60, 20, 5, 1), (3, 4, 5), Places(1, 60)),
        ((4, 1, 6), (6, 99, 1), (4, 1, 1), Places(6, 4)),
        ((4, 6), (1, 4), (4, 1), Places(1, 4)),
        ((4, 6), (12, 2), (), None),  # not dense
        ((4, 6), (0, 1), (), None),
        ((6,), (1,), (4, 6), None),
    ],
)
def test_where_parameters_lie(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    parameter: tuple[int, ...],
    expected: Places | None,
) -> None:
    assert places(shape, strides, parameter) == expected


class Case(NamedTuple):
    """Shapes of a tensor, its ranges and its gates."""

    x: tuple[int, ...]
    ranges: tuple[int, ...] = ()
    gates: tuple[int, ...] = ()
    format: torch.memory_format = torch.contiguous_format


CASES = {
    "tensor": Case((7, 901)),
    "tensor, large": Case((3, 50_000)),
    "channels": Case((5, 3, 40, 33), (1, 3, 1, 1), (1, 3, 1, 1)),
    "channels, large": Case((5, 16, 70, 33), (1, 16, 1, 1), (1, 16, 1, 1)),
    "channels, short": Case((70, 3, 5, 7), (3, 1, 1), (3, 1, 1)),
    "channels last": Case((9, 5, 20, 13), (), (1, 5, 1, 1), LAST),
    "channels last, large": Case((8, 67, 30, 13), (1, 67, 1, 1), (1, 67, 1, 1), LAST),
    "rows": Case((61, 99), (61, 1), ()),
    "rows and gates": Case((61, 99), (61, 1), (61, 1)),
    "columns": Case((301, 30), (), (30,)),
    "rows with gates of columns": Case((140, 33), (140, 1), (33,)),
    "depthwise": Case((600, 1, 3, 3), (600, 1, 1, 1), (600, 1, 1, 1)),
    "elements": Case((61, 99), (), (61, 99)),
    "elements of rows": Case((61, 99), (61, 1), (61, 99)),
    "elements of short rows": Case((2001, 5), (2001, 1), (2001, 5)),
    "elements, large": Case((90, 1001), (90, 1), (90, 1001)),
    "elements of a batch": Case((50, 7, 13), (), (7, 13)),
}
WIDTHS = (0, 2, 3, 4, 8, 16, 32)
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


class Data(NamedTuple):
    """What the kernel reads."""

    grad: Tensor
    x: Tensor
    limit: Tensor
    bits: Tensor
    adjacent: Tensor  # by bit-width


def drawn(case: Case, dtype: torch.dtype, signed: bool) -> Data:
    """Random values, half of them at or next to the middle between two codes."""
    random = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    limit = (torch.rand(case.ranges, generator=random) + 0.3).to(wide)
    choices = torch.tensor(WIDTHS, dtype=BITS_DTYPE)
    bits = choices[torch.randint(len(choices), case.gates, generator=random)]
    adjacent = choices.int()[torch.randint(len(WIDTHS), (PASS_THROUGH + 1,), generator=random)]
    x = torch.randn(case.x, generator=random).to(wide) * 0.8
    step = grid(limit, bits, signed).step
    halves = ((x / step).floor() + 0.5) * step
    x = torch.where(torch.rand(case.x, generator=random) < 0.5, x, halves)
    x = x.to(dtype).to(memory_format=case.format)
    grad = torch.randn(case.x, generator=random).to(dtype).to(memory_format=case.format)
    return Data(grad, x, limit, bits, adjacent)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


ALL_CASES = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


@ALL_CASES
@SIGNS
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_rounds_like_the_reference(
    case: Case, dtype: torch.dtype, signed: bool, threads: int
) -> None:
    data = drawn(case, dtype, signed)
    found = native.forward(data.x, data.limit, data.bits, signed)
    assert found is not None
    assert found.stride() == data.x.stride()
    assert torch.equal(found, reference(data.x, data.limit, data.bits, signed))


@ALL_CASES
@SIGNS
@pytest.mark.parametrize("dtype", DTYPES)
def test_its_gradients_are_those_of_the_reference(
    case: Case, dtype: torch.dtype, signed: bool, threads: int
) -> None:
    grad, x, limit, bits, adjacent = drawn(case, dtype, signed)
    found = native.backward(grad, x, limit, bits, adjacent, signed, True)
    assert found is not None
    expected = reference_backward(grad, x, limit, bits, adjacent, signed, True, Statistic.CHANGE)
    assert torch.equal(found[0], expected[0])
    assert found[0].stride() == x.stride()
    if dtype == torch.float64:
        torch.testing.assert_close(found[1:], expected[1:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-6)
    bare = native.backward(grad, x, limit, bits, None, signed, True)
    assert bare is not None
    assert torch.equal(bare[1], found[1])
    assert bare[2].shape == (0, *bits.shape)


@SIGNS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", range(2, 17))
def test_it_rounds_like_the_reference_next_to_the_ends(
    bits: int, dtype: torch.dtype, signed: bool
) -> None:
    random = torch.Generator().manual_seed(bits)
    limit = (torch.rand(2000, 1, generator=random) * 4 + 1e-3).to(dtype)
    widths = torch.tensor(bits, dtype=torch.int32)
    step, _, high = grid(limit, widths, signed)
    away = torch.arange(-20, 21) * torch.finfo(dtype).eps
    for end in (limit, (high + 0.5) * step, (high - 0.5) * step):
        x = end * (1 + away.to(dtype))
        x = torch.cat([x, -x], 1)
        found = native.forward(x, limit, widths, signed)
        assert found is not None
        assert torch.equal(found, reference(x, limit, widths, signed))


def test_what_is_not_finite_stays_so() -> None:
    x = torch.full((5000,), 0.3)
    x[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])
    for bits in (0, 4, 32):
        args = (x, torch.tensor(1.0), torch.tensor(bits), True)
        found = native.forward(*args)
        assert found is not None
        assert torch.equal(found.isnan(), reference(*args).isnan())
        assert torch.equal(found.nan_to_num(), reference(*args).nan_to_num())


def test_gradients_of_any_layout_are_taken() -> None:
    data = drawn(CASES["channels last"], torch.float32, True)
    for grad in (data.grad.contiguous(), torch.ones(()).expand(data.x.shape)):
        found = native.backward(grad, data.x, data.limit, data.bits, None, True, False)
        expected = reference_backward(
            grad, data.x, data.limit, data.bits, None, True, False, Statistic.NONE
        )
        assert found is not None
        assert torch.equal(found[0], expected[0])


VIEWS = {
    "sliced": torch.randn(200, 200)[:, ::2],
    "permuted part": torch.randn(8, 30, 3, 4, 16)[:, :, 1].permute(0, 2, 1, 3),
    "expanded": torch.randn(200, 1).expand(200, 50),
}


@pytest.mark.parametrize("x", VIEWS.values(), ids=VIEWS)
def test_tensors_that_are_not_dense_are_taken(x: Tensor) -> None:
    args = (x, torch.tensor(1.0), torch.tensor(4))
    found = native.forward(*args, True)
    assert found is not None
    assert torch.equal(found, reference(*args, True))
    beside = adjacent_widths((2, 4))
    grads = native.backward(x, *args, beside, True, False)
    expected = reference_backward(x, *args, beside, True, False, Statistic.CHANGE)
    assert grads is not None
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-5)


def through_the_op(x: Tensor, statistic: Statistic) -> list[Tensor]:
    leaf, limit = x.clone().requires_grad_(), torch.tensor(0.7, requires_grad=True)
    probe = torch.zeros(statistic.rows, requires_grad=True)
    bits, adjacent = torch.tensor(4), adjacent_widths((2, 4))
    y = fake_quantize(leaf, limit, bits, adjacent, probe, True, True, int(statistic))
    y.backward(torch.linspace(-1, 1, x.numel()).view_as(x))
    grads = [t.grad for t in (leaf, limit, probe)]
    return [y.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("statistic", Statistic)
def test_the_op_gives_the_same_with_and_without_it(
    statistic: Statistic, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(64, 100, generator=torch.Generator().manual_seed(1))
    found = through_the_op(x, statistic)
    monkeypatch.setattr(native, "SMALLEST", 10**9)
    for here, there in zip(found, through_the_op(x, statistic), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-6)


NOT_TAKEN = {
    "small": torch.randn(100),
    "half precision": torch.randn(5000).half(),
}


@pytest.mark.parametrize("x", NOT_TAKEN.values(), ids=NOT_TAKEN)
def test_what_it_leaves_to_the_reference(x: Tensor) -> None:
    assert native.forward(x, torch.tensor(1.0), torch.tensor(4), True) is None


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._loaded.cache_clear()
    native._folder.cache_clear()
    yield tmp_path
    native._loaded.cache_clear()
    native._folder.cache_clear()


def test_without_a_compiler_it_says_so_once(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            y = fake_quantize(
                torch.ones(5000), torch.tensor(1.0), torch.tensor(2), None, None, True, False, 0
            )
    assert y[0] == pytest.approx(2 / 3)
    assert [r.getMessage() for r in caplog.records] == [
        "fake quantization falls back to plain PyTorch operators, which are slower: "
        "there is no C++ compiler; the environment variable CXX can name one"
    ]


def test_a_compiler_that_fails_is_quoted(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = fresh / "broken"
    broken.write_text("#!/bin/sh\necho no can do >&2\nexit 1\n")
    broken.chmod(0o700)
    monkeypatch.setenv("CXX", str(broken))
    assert native._library() is None
    assert "broken failed: no can do" in caplog.text


def test_it_can_be_switched_off(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    assert native._library() is None
    assert not list(fresh.iterdir())


def test_it_is_built_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native._library() is not None
    (built,) = (fresh / "cgmq_fx").iterdir()
    native._loaded.cache_clear()
    monkeypatch.setattr(subprocess, "run", None)
    assert native._library() is not None
    assert [*(fresh / "cgmq_fx").iterdir()] == [built]


def test_without_openmp_it_runs_on_one_thread(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = fresh / "no-openmp"
    real = native._compiler()
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec {real} "$@"\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    data = drawn(CASES["elements, large"], torch.float32, True)
    found = native.forward(data.x, data.limit, data.bits, True)
    assert found is not None
    assert torch.equal(found, reference(data.x, data.limit, data.bits, True))


FEWER = """
import torch
from cgmq_fx.passes import native
from cgmq_fx.passes.grid import adjacent_widths
from cgmq_fx.passes.kernel import reference

torch.set_num_threads(4)
x, limit, bits = torch.linspace(-1, 1, 200_000), torch.tensor(0.9), torch.tensor(4)
found = native.forward(x, limit, bits, True)
assert torch.equal(found, reference(x, limit, bits, True))
*_, changes = native.backward(x, x, limit, bits, adjacent_widths((2, 4)), True, False)
torch.set_num_threads(1)
alone = native.backward(x, x, limit, bits, adjacent_widths((2, 4)), True, False)[2]
torch.testing.assert_close(changes, alone, rtol=1e-5, atol=0)
"""


@pytest.mark.parametrize("setting", ["OMP_THREAD_LIMIT=1", "OMP_THREAD_LIMIT=3", "OMP_DYNAMIC=1"])
def test_fewer_threads_than_asked_for_do_all_of_it(setting: str) -> None:
    name, value = setting.split("=")
    subprocess.run([sys.executable, "-c", FEWER], env={**os.environ, name: value}, check=True)
