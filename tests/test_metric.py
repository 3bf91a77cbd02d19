"""A metric of one's own is asked before training, and what is asked leaves no trace."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import cgmq_fx
from tests.random_nets import TinyCNN

BATCH = (torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))


class Watch(cgmq_fx.Callback):
    """Notes the random state at the start, and the buffers, and counts steps."""

    def __init__(self) -> None:
        self.state: list[int] = []
        self.buffers: list[Tensor] = []
        self.steps = 0

    def on_start(self, prepared: cgmq_fx.Prepared, steps: int) -> None:
        self.state = torch.get_rng_state().tolist()
        self.buffers = [buffer.clone() for buffer in prepared.model.buffers()]

    def on_step(self, record: Any) -> None:
        self.steps += 1


class Drawing:
    """Counts its calls, and draws random numbers."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, output: Tensor, target: Tensor) -> float:
        self.calls += 1
        return float(torch.rand(()))


class Fixed(Drawing):
    """Cannot be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("no copy")


def trained(metric: Any, watch: Watch) -> None:
    torch.manual_seed(0)
    cgmq_fx.quantize(
        TinyCNN(),
        "bops <= 5%",
        [BATCH],
        loss=cross_entropy,
        val_data=[BATCH],
        epochs=1,
        metric=metric,
        callbacks=[watch],
        progress=False,
    )


def test_a_metric_that_gives_no_number_is_noticed_before_training() -> None:
    watch = Watch()
    with pytest.raises(cgmq_fx.DataError, match=r"must return one number, not str \(a str\)"):
        trained(lambda output, target: "good", watch)
    assert watch.steps == 0


@pytest.mark.parametrize("kind", [Drawing, Fixed])
def test_asking_leaves_no_trace(kind: type[Drawing]) -> None:
    metric, asked, plain = kind(), Watch(), Watch()
    trained(metric, asked)
    trained(None, plain)
    assert metric.calls == 2  # after the epoch, and for the result
    assert asked.state == plain.state
    assert all(map(torch.equal, asked.buffers, plain.buffers))
