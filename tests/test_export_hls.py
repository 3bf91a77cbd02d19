"""hls4ml: the C++ of an FPGA project, compiled by g++, computes the model bit by bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cgmq_fx import ExportError
from cgmq_fx.exporters import hls
from cgmq_fx.exporters.agreement import compare, trial_batches
from cgmq_fx.exporters.hls import hls_project
from cgmq_fx.passes.lower import lower
from tests.deploy_nets import deployed, inputs_of

needs_hls4ml = pytest.mark.usefixtures("installed")


@pytest.fixture
def installed() -> None:
    pytest.importorskip("hls4ml", reason="hls4ml is not installed: no FPGA project is made")
    pytest.importorskip("qonnx", reason="qonnx is not installed: no FPGA project is made")


@needs_hls4ml
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile the project")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["mlp", "lenet5"])
def test_the_circuit_computes_the_model_bit_by_bit(name: str, tmp_path: Path) -> None:
    result = deployed(name, "fpga")
    path = result.export(tmp_path / "net.onnx", "qonnx").path
    project = hls_project(path, tmp_path / "project")
    project.compile()
    lowered = lower(result.model, result.inputs)
    batches = [inputs_of(name, 8), *trial_batches(lowered, result.inputs, 8)]
    found = [[project.predict(batch.args[0])] for batch in batches]
    agreement = compare(lowered, found, batches)
    assert agreement.exact == 1.0
    assert agreement.largest == 0.0


REFUSED = [
    ("separable", "fpga", "hls4ml cannot execute ReduceMean exactly; .*global average pool cannot"),
    ("resnet20", "fpga", "hls4ml cannot execute Pad, ReduceMean, Slice exactly"),
    ("mlp", "integer", 'a power of two; quantize with target="fpga"'),
    ("lenet5", "channel", "one per tensor"),
]


@needs_hls4ml
@pytest.mark.parametrize(("name", "scheme", "message"), REFUSED)
def test_what_hls4ml_cannot_express_is_refused(
    name: str, scheme: str, message: str, tmp_path: Path
) -> None:
    path = deployed(name, scheme).export(tmp_path / "net.onnx", "qonnx", verify=False).path
    with pytest.raises(ExportError, match=message):
        hls_project(path, tmp_path / "project")
    assert not (tmp_path / "project").exists()


def test_a_missing_package_is_named_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hls, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r'hls4ml.*pip install "cgmq-fx\[hls4ml\]"'):
        hls_project(tmp_path / "net.onnx", tmp_path / "project")


@needs_hls4ml
def test_a_file_that_is_no_qonnx_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ExportError, match="cannot be prepared"):
        hls_project(path, tmp_path / "project")
