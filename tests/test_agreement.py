"""Files that disagree with the graph: which are right all the same, and which are not."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from cgmq_fx import ExportError
from cgmq_fx.exporters import agreement, exporters
from cgmq_fx.exporters.agreement import Batches, Outputs, Reference, exact_outputs, trial_batches
from cgmq_fx.passes.lower import lower
from tests.deploy_nets import deployed, inputs_of

SAMPLES = 64
Change: TypeAlias = Callable[[Tensor], Tensor]


def others(outputs: Tensor, count: int) -> Tensor:
    """The same with the first samples replaced, as codes on a border replace all that follows."""
    changed = outputs.clone()
    changed[:count] = outputs[:count].flip(1) + outputs.std()
    return changed


def apart(share: float) -> Callable[[GraphModule, Batches], Outputs]:
    """An arithmetic that differs from float64 in a share of the samples."""

    def outputs(module: GraphModule, batches: Batches) -> Outputs:
        found = exact_outputs(module, batches)
        return [[others(o, int(share * len(o))) for o in row] for row in found]

    return outputs


def shifted(outputs: Tensor) -> Tensor:
    """One column is wrong."""
    changed = outputs.clone()
    changed[:, 0] += outputs.std()
    return changed


def wrong_in(count: int) -> Change:
    """The last samples are like nothing that an arithmetic gives."""
    return lambda o: torch.cat([o[: len(o) - count], o[len(o) - count :].flip(1) - 2 * o.std()])


CASES: dict[str, tuple[float, Change, bool]] = {
    "in half as many samples as float32": (0.6, wrong_in(19), True),
    "in more than half as many": (0.6, wrong_in(20), False),
    "in all but few samples": (1.0, wrong_in(60), False),
    "where arithmetics agree": (0.0, wrong_in(8), False),
    "a wrong column": (0.6, shifted, False),
    "a wrong scale": (0.6, lambda o: o * 1.2, False),
    "not a number": (0.6, lambda o: o * torch.nan, False),
    "another shape": (0.6, lambda o: o[:, :1], False),
}


@pytest.mark.parametrize(("share", "change", "right"), CASES.values(), ids=CASES)
def test_what_disagrees_is_right_only_in_whole_samples(
    share: float, change: Change, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "_ARITHMETICS", (exact_outputs, apart(share)))
    result = deployed("mlp")
    module = lower(result.model, result.inputs)
    batches = trial_batches(module, inputs_of("mlp", SAMPLES), SAMPLES)
    reference = Reference(module, batches)
    found = [[change(o) for o in row] for row in exact_outputs(module, batches)]
    assert not reference.compare(found).holds
    excuse = reference.excuse(found)
    assert (excuse is not None) == right
    if excuse is not None:
        assert excuse.startswith("19 of 64 samples differ from every correct arithmetic; ")
        assert "differ from one another in 38" in excuse


@pytest.mark.parametrize(
    ("change", "right"), [(lambda o: wrong_in(len(o) // 4)(o), True), (shifted, False)]
)
def test_exports_say_why_they_take_what_disagrees(
    change: Change, right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(exporters()["pt2"])
    run = kind.run

    def changed(own: object, path: Path, batches: Batches) -> list[list[Tensor]]:
        found: Sequence[Sequence[Tensor]] = run(own, path, batches)  # type: ignore[arg-type]
        return [[change(o) for o in row] for row in found]

    monkeypatch.setattr(kind, "run", changed)
    monkeypatch.setattr(agreement, "_ARITHMETICS", (exact_outputs, apart(0.6)))
    result = deployed("mlp")
    if right:
        exported = result.export(tmp_path / "net.pt2")
        assert "differ from every correct arithmetic" in str(exported)
    else:
        with pytest.raises(ExportError, match="does not compute what the model computes"):
            result.export(tmp_path / "net.pt2")
