"""The Triton kernel, run by Triton's interpreter, against the reference in PyTorch."""

import os

import pytest
import torch

from cgmq_fx.passes.kernel import Statistic, reference, reference_backward
from tests.test_native import CASES, drawn

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton compiles for a GPU here: not interpreted", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: its kernel is NOT tested here")
triton_kernel = pytest.importorskip("cgmq_fx.passes.triton_kernel")

NAMES = ("tensor", "channels last", "rows and gates", "depthwise", "elements of rows")
ALL = [(name, torch.float32, signed) for name in NAMES for signed in (True, False)]
ALL.append(("channels", torch.float16, True))  # the interpreter rounds bfloat16 towards zero
SOME = pytest.mark.parametrize(("name", "dtype", "signed"), ALL)


@SOME
def test_it_rounds_like_the_reference(name: str, dtype: torch.dtype, signed: bool) -> None:
    data = drawn(CASES[name], dtype, signed)
    found = triton_kernel.forward(data.x, data.limit, data.bits, signed)
    assert torch.equal(found, reference(data.x, data.limit, data.bits, signed))


@SOME
def test_its_gradients_are_those_of_the_reference(
    name: str, dtype: torch.dtype, signed: bool
) -> None:
    grad, x, limit, bits, adjacent = drawn(CASES[name], dtype, signed)
    found = triton_kernel.backward(grad, x, limit, bits, adjacent, signed, True)
    expected = reference_backward(grad, x, limit, bits, adjacent, signed, True, Statistic.CHANGE)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-4, atol=1e-4)


def test_without_a_statistic_nothing_is_reported() -> None:
    grad, x, limit, bits, _ = drawn(CASES["tensor"], torch.float32, True)
    found = triton_kernel.backward(grad, x, limit, bits, None, True, True)
    assert found[2].shape == (0,)


def test_doubles_are_left_to_the_reference() -> None:
    x = torch.ones(5000, dtype=torch.float64)
    assert triton_kernel.forward(x, torch.tensor(1.0), torch.tensor(4), True) is None
