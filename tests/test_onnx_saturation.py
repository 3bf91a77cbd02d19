from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import rand

import cgmq_fx
from cgmq_fx.cost_models.errors import ArtifactError
from cgmq_fx.exporters.onnx_reader import read_onnx
from cgmq_fx.exporters.onnx_saturation import can_saturate
from tests.deploy_nets import assert_counted, assert_runs, deployed, inputs_of
from tests.nets import small_classifier

onnx = pytest.importorskip("onnx")

# 16 bits hold -32768 .. 32767
RULE: list[tuple[list[list[int]], int, int, bool]] = [
    ([[126, 2]], 0, 255, False),  # 128 * 255 = 32640
    ([[127, 2]], 0, 255, True),  # 129 * 255 = 32895
    ([[-126, -2]], 0, 255, False),  # -32640
    ([[-127, -2]], 0, 255, True),  # -32895
    ([[127, -127]], 0, 255, False),  # opposite signs: alone 127 * 255 = 32385
    ([[127]], 0, 255, False),
    ([[100, 0, 0, 29]], 0, 255, True),  # any two of an output may be a pair
    ([[127], [127]], 0, 255, False),  # two outputs are never added up
    ([[127], [127]], -1, 255, True),
    ([[127, 127]], 0, 129, False),  # 254 * 129 = 32766: 2 bits with a zero point of 128
    ([[127, 127]], 0, 130, True),  # 254 * 130 = 33020
    ([[7, 7]], 0, 255, False),
    ([[63, 63]], 0, 255, False),  # 126 * 255 = 32130: weights of 7 bits never saturate
]


@pytest.mark.parametrize(("codes", "axis", "largest", "expected"), RULE)
def test_the_two_largest_codes_of_an_output_decide(
    codes: list[list[int]], axis: int, largest: int, expected: bool
) -> None:
    assert can_saturate(np.array(codes, np.int8), axis, largest) is expected


@pytest.mark.parametrize("shape", [(2, 3, 3, 3), (4, 5), (1, 1)])
def test_the_rule_is_what_all_pairs_say(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    for most in (*range(60, 128, 7), 127):
        codes = generator.integers(-most, most + 1, shape).astype(np.int8)
        rows = codes.reshape(shape[0], -1).astype(int)
        sums = [a + b for row in rows for i, a in enumerate(row) for b in row[i + 1 :]]
        expected = any(not -(2**15) <= 255 * total < 2**15 for total in sums)
        assert can_saturate(codes, 0, 255) is expected


def test_small_activations_leave_large_weights_signed(tmp_path: Path) -> None:
    path = deployed("lenet5", "tensor").export(tmp_path / "net.onnx").path
    graph = onnx.load(path).graph
    stored = {t.name: t for t in graph.initializer}
    makers = {out: node for node in graph.node for out in node.output}
    seen = set()
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            weight = onnx.numpy_helper.to_array(stored[makers[node.input[1]].input[0]])
            clip = makers[makers[node.input[0]].input[0]]
            limited = clip.op_type == "Clip"
            largest = onnx.numpy_helper.to_array(stored[clip.input[2]]) if limited else 255
            signed = weight.astype(int) - (128 if weight.dtype == np.uint8 else 0)
            assert (weight.dtype == np.uint8) is can_saturate(signed, 0, int(largest))
            seen.add(weight.dtype.name)
    assert seen == {"int8", "uint8"}


def test_slower_kernels_are_told_of(tmp_path: Path) -> None:
    wide = deployed("mlp", "w8")
    exported = wide.export(tmp_path / "wide.onnx")
    (remark,) = exported.remarks
    assert remark.startswith("3 weights of 8 bits meet 8-bit activations and are unsigned")
    assert str(exported).endswith(remark)
    assert wide.export(tmp_path / "wide.onnx", "onnx-signed", verify=False).remarks == ()
    fast = cgmq_fx.prepare(small_classifier(), "bops <= 100%", rand(4, 3), target="onnxruntime")
    assert fast.finalize().export(tmp_path / "fast.onnx").remarks == ()


def adds_in_32_bits() -> bool:
    """Whether this processor is known to have VNNI."""
    told = Path("/proc/cpuinfo")
    return told.exists() and "vnni" in told.read_text()


@pytest.mark.parametrize("name", ["lenet5", "separable"])
def test_signed_files_have_no_unsigned_weight(name: str, tmp_path: Path) -> None:
    result, exact = deployed(name, "w8"), adds_in_32_bits()
    exported = result.export(tmp_path / "net.onnx", "onnx-signed", verify=exact)
    stored = [onnx.numpy_helper.to_array(t) for t in onnx.load(exported.path).graph.initializer]
    assert {values.dtype.name for values in stored if values.ndim > 1} == {"int8"}
    assert_counted(exported, result)
    if exact:
        assert_runs(exported, result, inputs_of(name, 5))


def test_a_weight_with_several_zero_points_is_refused(tmp_path: Path) -> None:
    path = deployed("mlp", "w8").export(tmp_path / "net.onnx").path
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name.startswith("weight_zero_point_32"):
            values = np.full(32, 128, np.uint8)
            values[3] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)
    with pytest.raises(ArtifactError, match="several zero points"):
        read_onnx(path)
