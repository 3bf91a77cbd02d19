"""Bits and ranges of quantizers of every granularity, written at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from cgmq_fx.calibrate import RangeTable
from cgmq_fx.cost_models import QuantizerFacts, Role
from cgmq_fx.gates import GateLayout
from cgmq_fx.passes.kernel import Statistic
from cgmq_fx.passes.quantizer import Quantizer, QuantizerSpec
from cgmq_fx.settings import Settings

WIDTHS = {"tensor": (2, 4, 8), "ranges": (4, 8), "channel": (2, 4, 8), "element": (0, 2, 8)}
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # of gates, of ranges
    "tensor": ((), ()),
    "ranges": ((), (2, 1)),
    "channel": ((2, 1), (2, 1)),
    "element": ((2, 2), (2, 1)),
}


@dataclass
class Written:
    quantizers: dict[str, Quantizer]
    settings: Settings

    def bits(self) -> list[list[int]]:
        return [q.bits.flatten().tolist() for q in self.quantizers.values()]

    def ranges(self) -> list[float]:
        return [x for q in self.quantizers.values() for x in q.log_range.flatten().tolist()]


@pytest.fixture
def written() -> Written:
    """Ranges at level k are 10 k for the first channel, and one more for the second."""
    quantizers, facts, tables = {}, {}, {}
    for name, (gates, ranges) in SHAPES.items():
        made = Quantizer(QuantizerSpec(Role.WEIGHT, True, WIDTHS[name], gates, ranges))
        made.observe(Statistic.CHANGE)
        made.log_range.detach().fill_(7.0)  # an earlier controller's
        rows = [10.0 * k + torch.arange(made.log_range.numel()) for k, _ in enumerate(WIDTHS[name])]
        table = torch.stack(rows).reshape(-1, *ranges)
        quantizers[name] = made
        facts[name] = QuantizerFacts(name, Role.WEIGHT, made.bits.numel(), WIDTHS[name], 4)
        tables[name] = RangeTable(table, torch.zeros(len(rows)), 1.0)
    layout = GateLayout.of(facts, tables)
    return Written(quantizers, Settings(list(quantizers.values()), list(tables.values()), layout))


#      tensor, ranges, channel, element
LEVELS = [1, 0, 2, 0, 2, 2, 0, 1]


def test_bits_and_ranges(written: Written) -> None:
    written.settings.write(torch.tensor(LEVELS))
    assert written.bits() == [[4], [4], [8, 2], [8, 8, 0, 2]]
    # One gate for two ranges; a gate each; the mean over the gates of a channel: 20, and 10/2 + 1.
    assert written.ranges() == [10, 0, 1, 20, 1, 20, 6]


def test_what_training_added_to_ranges_stays(written: Written) -> None:
    written.settings.write(torch.tensor(LEVELS))
    with torch.no_grad():
        for quantizer in written.quantizers.values():
            quantizer.log_range.add_(0.5)
    written.settings.write(torch.zeros(8, dtype=torch.long))
    assert written.ranges() == [0.5, 0.5, 1.5, 0.5, 1.5, 0.5, 1.5]


MOVES: dict[str, Callable[[Quantizer], object]] = {
    "nothing": lambda q: q,
    "double": lambda q: q.double(),
    "loaded": lambda q: q.load_state_dict(
        {name: tensor.clone() for name, tensor in q.state_dict().items()}, assign=True
    ),
}


@pytest.mark.parametrize("move", MOVES)
def test_quantizers_may_be_moved(written: Written, move: str) -> None:
    written.settings.write(torch.zeros(8, dtype=torch.long))
    for quantizer in written.quantizers.values():
        MOVES[move](quantizer)
    written.settings.write(torch.tensor(LEVELS))
    assert written.bits() == [[4], [4], [8, 2], [8, 8, 0, 2]]
    assert written.ranges() == [10, 0, 1, 20, 1, 20, 6]


def test_released_quantizers_have_tensors_of_their_own(written: Written) -> None:
    written.settings.write(torch.tensor(LEVELS))
    before = written.bits(), written.ranges()
    written.settings.release()
    storages = [
        t.untyped_storage().data_ptr()
        for q in written.quantizers.values()
        for t in (q.bits, q.log_range)
    ]
    assert len(set(storages)) == len(storages)
    assert (written.bits(), written.ranges()) == before
