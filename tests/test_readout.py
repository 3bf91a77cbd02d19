"""What backward passes report is read as a whole, wherever it was left."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cgmq_fx.cost_models import Role
from cgmq_fx.passes.kernel import Statistic
from cgmq_fx.passes.quantizer import Quantizer, QuantizerSpec
from cgmq_fx.readout import Readout

SHAPES: tuple[tuple[int, ...], ...] = ((), (2, 1), ())


Own = list[Quantizer]


def quantizers() -> Own:
    found = []
    for shape in SHAPES:
        quantizer = Quantizer(QuantizerSpec(Role.WEIGHT, True, (2, 4, 8), shape, shape))
        quantizer.observe(Statistic.CHANGE)
        found.append(quantizer)
    return found


def probe(quantizer: Quantizer) -> Tensor:
    assert quantizer.probe is not None
    return quantizer.probe


def backward(own: Own, create_graph: bool = False) -> None:
    """Report 1 for the first quantizer, 2 for the gates of the second, 3 for the third."""
    terms = [(k + 1) * probe(q).sum() for k, q in enumerate(own)]
    torch.stack(terms).sum().backward(create_graph=create_graph)


def twice(own: Own) -> None:
    backward(own)
    backward(own)


def out_of_place(own: Own) -> None:
    backward(own, create_graph=True)


def one_replaced(own: Own) -> None:
    probe(own[1]).grad = None
    backward(own)


def moved(own: Own) -> None:
    nn.ModuleList(own)._apply(torch.clone)  # as a move to another device does
    backward(own)


def one_left_out(own: Own) -> None:
    probe(own[2]).sum().backward()


CASES: dict[str, tuple[Callable[[Own], None], list[float]]] = {
    "once": (backward, [1, 2, 2, 3]),
    "twice": (twice, [2, 4, 4, 6]),
    "out of place": (out_of_place, [1, 2, 2, 3]),
    "one replaced": (one_replaced, [1, 2, 2, 3]),
    "moved": (moved, [1, 2, 2, 3]),
    "one reached": (one_left_out, [0, 0, 0, 1]),
    "nothing": (lambda own: None, [0, 0, 0, 0]),
}


@pytest.mark.filterwarnings("ignore:Using backward")  # with create_graph
@pytest.mark.parametrize(("report", "expected"), CASES.values(), ids=CASES)
def test_what_is_reported_is_read_once(
    report: Callable[[Own], None], expected: list[float]
) -> None:
    own = quantizers()
    readout = Readout(own, Statistic.CHANGE)
    backward(own)
    readout.take()
    report(own)
    assert readout.take().tolist() == [expected]
    assert readout.take().tolist() == [[0, 0, 0, 0]]
