from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.op_nets import OPS
from cgmq_fx import Scheme, UnsupportedModelError, prepare
from cgmq_fx.exporters import exporters
from cgmq_fx.exporters.agreement import compare, trial_batches
from cgmq_fx.exporters.certificate import verify
from cgmq_fx.exporters.onnx_file import run_onnx
from cgmq_fx.passes.lower import lower
from tests.deploy_nets import assert_counted, deployed, inputs_of
from tests.nets import NETS, call

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CASES = {
    ("lenet5", "tensor"): {"QLinearConv": 2, "QGemm": 2},
    ("lenet5", "channel"): {"QLinearConv": 2, "QGemm": 2},
    ("mlp", "tensor"): {"QGemm": 3},
    ("resnet20", "channel"): {"QLinearConv": 19, "QLinearAdd": 9, "QGemm": 1, "Add": 0},
    ("separable", "both"): {},
    ("separable", "tensor"): {"QLinearConv": 3, "QGemm": 1},
    ("parts", "channel"): {},
    ("transformer", "tensor"): {},
    ("mlp", "both"): {},
    ("mlp", "w16"): {},
    ("mlp", "float"): {},
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Exported files, each written once."""
    folder, written = tmp_path_factory.mktemp("onnx"), {}

    def write(name: str, scheme: str) -> Path:
        path = folder / f"{name}-{scheme}.onnx"
        if path not in written:
            written[path] = deployed(name, scheme).export(path)
        return path

    return write


def optimised(path: Path, folder: Path) -> Counter[str]:
    """The ops of the graph that onnxruntime really executes."""
    target = folder / "optimised.onnx"

    def configure(options: Any) -> None:
        options.optimized_model_filepath = str(target)

    run_onnx(path, [], configure)
    return Counter(node.op_type for node in onnx.load(target).graph.node)


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_onnxruntime_computes_it_on_integer_kernels(
    name: str, scheme: str, file: Callable[[str, str], Path], tmp_path: Path
) -> None:
    path, result = file(name, scheme), deployed(name, scheme)
    ops = optimised(path, tmp_path)
    expected = CASES[name, scheme]
    assert {op: ops[op] for op in expected} == expected
    inputs = [inputs_of(name, batch) for batch in (1, 3, 7)]
    agreement = compare(
        lower(result.model, result.inputs), exporters()["onnx"].run(path, inputs), inputs
    )
    assert agreement.largest <= 1.01, agreement
    assert agreement.argmax == 1.0


def kinds_of(path: Path, ending: str) -> list[str]:
    """The types of the tensors whose names end so."""
    tensors = [t for t in onnx.load(path).graph.initializer if t.name.endswith(ending)]
    return [onnx.numpy_helper.to_array(t).dtype.name for t in tensors]


@pytest.mark.parametrize(
    ("name", "scheme", "weights"),
    [
        ("mlp", "w8", ["uint8"] * 3),
        ("mlp", "w2", ["int8"] * 3),
        ("transformer", "w8", ["int8"] + ["uint8"] * 5),  # its table is multiplied with nothing
        ("mlp", "w16", ["int16"] * 3),
    ],
)
def test_weights_are_bytes_and_biases_whole_numbers(
    name: str, scheme: str, weights: list[str], file: Callable[[str, str], Path]
) -> None:
    path = file(name, scheme)
    assert sorted(kinds_of(path, "weight_codes")) == sorted(weights)
    assert set(kinds_of(path, "bias_codes")) == {"int32"}
    unread = {t.name for t in onnx.load(path).graph.initializer}
    unread -= {name for node in onnx.load(path).graph.node for name in node.input}
    assert not unread
    result = deployed(name, scheme)
    states = verify(path, result.budget).states
    assert [s.value for s in states] == [s.value for s in result.cost.states]


def test_nothing_of_the_user_s_machine_is_in_the_file(file: Callable[[str, str], Path]) -> None:
    content = file("lenet5", "tensor").read_bytes()
    assert b"lenet5.py" not in content
    assert b"nn_module_stack" not in content


@pytest.mark.parametrize(("name", "scheme"), [("lenet5", "tensor"), ("resnet20", "channel")])
def test_what_users_call_has_names(
    name: str, scheme: str, file: Callable[[str, str], Path]
) -> None:
    graph = onnx.load(file(name, scheme)).graph
    (image,), (output,) = graph.input, graph.output
    assert output.name == "output"
    sizes = [put.type.tensor_type.shape.dim[0].dim_param for put in (image, output)]
    assert sizes == ["batch", "batch"]
    free = {d.dim_param for v in graph.value_info for d in v.type.tensor_type.shape.dim}
    assert not [size for size in free if "s" in size]  # nothing is left of torch.export's names


def test_versions_are_ones_that_runtimes_take(file: Callable[[str, str], Path]) -> None:
    model = onnx.load(file("mlp", "tensor"))
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version <= 10
    assert {o.domain: o.version for o in model.opset_import} == {"": 21}


@pytest.mark.parametrize("name", ["glu", "gru", "unbind", "group_norm"])
def test_ops_whose_outputs_are_hard_to_tell_are_counted(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = OPS[name]
    prepared = prepare(net.build().eval(), "bops <= 100%", net.inputs(), target="onnxruntime")
    result = prepared.finalize()
    certificate = result.export(tmp_path / "net.onnx").certificate
    assert certificate.from_file
    assert [s.value for s in certificate.states] == [s.value for s in result.cost.states]


def test_keyword_inputs_and_nested_outputs_keep_their_order(tmp_path: Path) -> None:
    for name in ("keywords", "nested"):
        net = NETS[name]
        scheme = Scheme((4, 8))
        result = prepare(net.build(), "bops <= 10%", net.inputs(2), scheme=scheme).finalize()
        path = result.export(tmp_path / f"{name}.onnx").path
        inputs = net.inputs(3)
        found = exporters()["onnx"].run(path, [inputs])[0]
        for given, wanted in zip(found, call(result.model, inputs), strict=True):
            np.testing.assert_allclose(given, wanted, atol=1e-4)


def without_clips(model: Any) -> None:
    """What runtimes make of limits that are not written out: they do not know of them."""
    replaced = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Clip"}
    for node in model.graph.node:
        node.input[:] = [replaced.get(name, name) for name in node.input]
    kept = [node for node in model.graph.node if node.op_type != "Clip"]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def with_coarse_biases(model: Any) -> None:
    """What runtimes make of a float bias: they round it to a grid that was not trained."""
    for tensor in model.graph.initializer:
        if tensor.name.endswith("bias_codes"):
            codes = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(codes // 64 * 64, tensor.name))


@pytest.mark.parametrize("defect", [without_clips, with_coarse_biases], ids=lambda f: f.__name__)
def test_known_defects_of_exports_are_noticed(
    defect: Callable[[Any], None], file: Callable[[str, str], Path], tmp_path: Path
) -> None:
    result = deployed("lenet5", "tensor")
    model = onnx.load(file("lenet5", "tensor"))
    defect(model)
    onnx.save(model, tmp_path / "net.onnx")
    lowered = lower(result.model, result.inputs)
    batches = trial_batches(lowered, result.inputs, 32)
    found = exporters()["onnx"].run(tmp_path / "net.onnx", batches)
    assert not compare(lowered, found, batches).holds


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        nn.AvgPool2d(3, 2, 1),
    ],
)
def test_averages_at_the_border_are_exact(pool: nn.Module, tmp_path: Path) -> None:
    """Windows that overhang are divided by what is in the image, in integer kernels too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), pool, nn.Conv2d(4, 4, 1)).eval()
    inputs = torch.randn(4, 3, 13, 13)
    prepared = prepare(model, "bops <= 7%", inputs, target="onnxruntime")
    prepared.calibrate([inputs])
    exported = prepared.finalize().export(tmp_path / "net.onnx")
    assert exported.agreement is not None
    assert exported.agreement.is_close
    assert "QLinearAveragePool" in optimised(exported.path, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ceil_mode": True, "padding": 1}, "avg_pool2d with ceil_mode and padding that counts"),
        ({"divisor_override": 2}, "avg_pool2d with divisor_override=2"),
    ],
)
def test_averages_that_kernels_take_wrongly_are_refused(
    options: dict[str, Any], message: str
) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AvgPool2d(2, **options))
    with pytest.raises(UnsupportedModelError, match=message):
        prepare(model, "bops <= 7%", torch.randn(2, 2, 7, 7), target="onnxruntime")


class Limited(nn.Module):
    """A layer whose outputs are kept below others, or below constants."""

    def __init__(self, by_a_layer: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)
        self.third, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.by_a_layer = by_a_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, most = self.first(x), self.first.bias
        if self.by_a_layer:
            most = self.third(self.second(x))
        else:
            first = self.third(self.second(first))
        result: torch.Tensor = self.last(torch.clamp(first, max=most))
        return result


@pytest.mark.parametrize("by_a_layer", [True, False])
def test_limits_that_are_tensors_keep_what_the_model_keeps(
    by_a_layer: bool, tmp_path: Path
) -> None:
    budget = "activations <= 100%, arena <= 100%"
    result = prepare(Limited(by_a_layer).eval(), budget, torch.rand(2, 8)).finalize()
    assert_counted(result.export(tmp_path / "net.onnx"), result)


class Halves(nn.Module):
    """A tensor in two halves, one of which waits for what is made of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.part = nn.Linear(8, 64), nn.Linear(32, 24)
        self.first, self.last = nn.Linear(32, 16), nn.Linear(56, 16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = self.whole(x).relu().chunk(2, 1)
        return self.first(left), self.last(torch.cat([right, self.part(left)], 1))


def test_halves_are_made_in_the_order_of_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    budget = "arena <= 101%, bops <= 5%"
    result = prepare(Halves().eval(), budget, torch.rand(2, 8)).finalize()
    assert_counted(result.export(tmp_path / "net.onnx", verify=False), result)
