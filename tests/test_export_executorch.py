"""ExecuTorch: what is delegated to XNNPACK, and the same outputs in its runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cgmq_fx import UnsupportedModelError
from tests.deploy_nets import assert_counted, assert_runs, deployed, inputs_of
from tests.test_tables import words_in_few_bits

pytest.importorskip(
    "executorch", reason="ExecuTorch is not installed: .pte files are neither written nor run"
)

CASES = [
    ("lenet5", "integer channel", 1),
    ("lenet5", "fpga", 1),
    ("mlp", "integer", 1),
    ("separable", "integer", 1),
    ("parts", "integer channel", None),
    ("transformer", "integer", None),  # the attention is float, the linear layers are not
    ("resnet20", "integer", None),  # XNNPACK has no strided slices, so its shortcuts split it
]


@pytest.mark.parametrize(("name", "scheme", "delegates"), CASES)
def test_xnnpack_computes_it(name: str, scheme: str, delegates: int | None, tmp_path: Path) -> None:
    result = deployed(name, scheme)
    exported = result.export(tmp_path / "net.pte")
    path = exported.path
    assert_counted(exported, result)
    from executorch.exir._serialize._program import deserialize_pte_binary  # quiet from now on

    plan = deserialize_pte_binary(path.read_bytes()).program.execution_plan[0]
    assert {d.id for d in plan.delegates} == {"XnnpackBackend"}
    if delegates is not None:
        assert len(plan.delegates) == delegates
        assert plan.operators == []  # nothing is left outside
    assert_runs(exported, result, inputs_of(name, 3))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="8 bits"):
        deployed("mlp", "w16").export(tmp_path / "net.pte")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ranges", ["channel", "tensor"])
def test_tables_are_bytes_that_count_at_their_bits(ranges: Any, tmp_path: Path) -> None:
    result = words_in_few_bits(ranges)
    exported = result.export(tmp_path / "net.pte")
    assert_counted(exported, result)
    assert exported.certificate.states[0].value == result.cost.states[0].value
