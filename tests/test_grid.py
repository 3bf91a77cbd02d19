"""Grids: their codes, steps and bit-widths."""

import pytest
import torch

from cgmq_fx.passes.grid import adjacent_widths, allowed_bit_width, grid, round_to_grid

SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


@SIGNS
@pytest.mark.parametrize(("coarse", "fine"), [(2, 4), (4, 8), (8, 16)])
def test_grids_nest(coarse: int, fine: int, signed: bool) -> None:
    limit = torch.tensor(0.7, dtype=torch.float64)
    step, low, high = grid(limit, torch.tensor(coarse), signed)
    ratio = step / grid(limit, torch.tensor(fine), signed).step
    assert ratio.item() == pytest.approx(2**coarse + 1, rel=1e-12)
    values = step * torch.arange(int(low), int(high) + 1)
    again = round_to_grid(values, limit, torch.tensor(fine), signed)
    assert torch.allclose(again, values, rtol=1e-12, atol=0)


# bits, lowest and highest code, number of steps in the range (twice the limit if signed)
GRIDS = [
    (True, 2, -1, 1, 3),
    (True, 3, -3, 3, 7),
    (True, 4, -7, 7, 15),
    (True, 8, -127, 127, 255),
    (True, 16, -32767, 32767, 65535),
    (False, 2, 0, 3, 3),
    (False, 8, 0, 255, 255),
    (False, 16, 0, 65535, 65535),
    (True, 0, 0, 0, 1),
    (False, 0, 0, 0, 1),
]


@pytest.mark.parametrize(("signed", "bits", "low", "high", "steps"), GRIDS)
def test_codes_and_step(signed: bool, bits: int, low: int, high: int, steps: int) -> None:
    found = grid(torch.tensor(1.5, dtype=torch.float64), torch.tensor(bits), signed)
    assert (found.low.item(), found.high.item()) == (low, high)
    assert found.step.item() == 1.5 * (2 if signed else 1) / steps
    ends = round_to_grid(torch.tensor([-9.0, 9.0]), torch.tensor(1.5), torch.tensor(bits), signed)
    assert torch.allclose(ends, found.step.float() * torch.tensor([low, high]))


def test_allowed_bit_widths() -> None:
    allowed = [b for b in range(-1, 65) if allowed_bit_width(b)]
    assert allowed == [0, *range(2, 17), 32]


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ((0, 2, 8, 32), {0: 2, 2: 0, 8: 2, 32: 8}),
        ((2, 4), {2: 4, 4: 2}),
        ((8,), {8: 8}),
    ],
)
def test_bit_widths_are_compared_with_the_next_lower(
    widths: tuple[int, ...], expected: dict[int, int]
) -> None:
    """The lowest with the next higher; the only one with itself, as those that nothing has."""
    found = adjacent_widths(widths).tolist()
    assert found == [expected.get(bits, bits) for bits in range(33)]
