from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cgmq_fx import WeightMemory
from cgmq_fx.cost_models import Budget
from cgmq_fx.exporters.agreement import compare
from cgmq_fx.exporters.onnx_compact import without_fusion
from cgmq_fx.exporters.onnx_file import run_onnx
from cgmq_fx.passes.lower import lower
from cgmq_fx.recount import count
from tests.deploy_nets import deployed, inputs_of

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

MOST = 1.15
"""File size, in sizes of the codes and biases alone."""


def weight_bytes(name: str, scheme: str) -> float:
    """What the cost model says that the weights take."""
    result = deployed(name, scheme)
    budget = Budget((WeightMemory() <= "100%",))
    return count(result.model, result.inputs, budget).states[0].value


@pytest.mark.parametrize("scheme", ["w2", "w2 tensor", "tensor"])
def test_a_packed_lenet_is_hardly_larger_than_its_codes(scheme: str, tmp_path: Path) -> None:
    result = deployed("lenet5", scheme)
    path = result.export(tmp_path / "net.onnx", "onnx-compact").path
    assert path.stat().st_size <= MOST * weight_bytes("lenet5", scheme)
    inputs = [inputs_of("lenet5", batch) for batch in (1, 5)]
    found = run_onnx(path, inputs, without_fusion)
    agreement = compare(lower(result.model, result.inputs), found, inputs)
    assert agreement.holds, agreement
    assert agreement.argmax == 1.0


def test_every_weight_has_the_smallest_type_that_holds_its_codes(tmp_path: Path) -> None:
    result = deployed("mlp", "tensor")
    files = [
        onnx.load(result.export(tmp_path / f"{name}.onnx", name).path)
        for name in ("onnx", "onnx-compact")
    ]
    plain, packed = (
        {t.name: onnx.numpy_helper.to_array(t) for t in m.graph.initializer} for m in files
    )
    weights = [name for name in plain if name.endswith("weight_codes")]
    assert len(weights) == 3
    for name in weights:
        codes = plain[name].astype(int) - (128 if plain[name].dtype == np.uint8 else 0)
        most = int(np.abs(codes).max())
        expected = "int2" if most <= 1 else "int4" if most <= 7 else plain[name].dtype.name
        assert packed[name].dtype.name == expected
        assert (packed[name].astype(int) == plain[name].astype(int)).all()
