from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cgmq_fx import ArtifactError, BoundError, BudgetError, ExportError
from cgmq_fx.cli import main
from cgmq_fx.cost_models import parse_budget
from cgmq_fx.exporters.certificate import SUFFIX, manifest_of, verify
from cgmq_fx.exporters.code_bits import Layout, activation_bits, weight_bits
from cgmq_fx.exporters.cost_graph import Manifest
from cgmq_fx.recount import count
from tests.deploy_nets import deployed

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

EVERYTHING = (
    "bops <= 100%, bops <= 100% of 8 bits, macs <= 100%, weights <= 100%, activations <= 100%, "
    "arena <= 100%"
)
EXACT = [
    ("lenet5", "tensor", "onnx"),
    ("lenet5", "channel", "onnx"),
    ("lenet5", "w2", "onnx-compact"),
    ("mlp", "both", "onnx"),
    ("mlp", "w16", "onnx"),
    ("resnet20", "channel", "onnx"),
    ("separable", "both", "onnx"),
    ("lenet5", "channel", "safetensors"),
    ("lenet5", "channel", "pt2"),
    ("mlp", "both", "pt2"),
    ("separable", "tensor", "pt2"),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exported files, each written once."""
    folder, written = tmp_path_factory.mktemp("certificates"), set()

    def write(name: str, scheme: str, kind: str = "onnx") -> Path:
        suffix = "onnx" if kind.startswith("onnx") else kind
        path = folder / f"{name}-{scheme}-{kind}.{suffix}"
        if path not in written:
            deployed(name, scheme).export(path, kind, verify=False)
            written.add(path)
        return path

    return write


@pytest.mark.parametrize(("name", "scheme", "kind"), EXACT)
def test_a_file_costs_what_the_graph_costs(
    name: str, scheme: str, kind: str, file: Callable[..., Path]
) -> None:
    result = deployed(name, scheme)
    expected = count(result.model, result.inputs, parse_budget(EVERYTHING)).states
    found = verify(file(name, scheme, kind), EVERYTHING)
    assert [s.value for s in found.states] == [s.value for s in expected]
    assert [s.reference for s in found.states] == [s.reference for s in expected]
    assert found.unknown == ()


@pytest.mark.parametrize(
    ("name", "scheme", "kind"),
    [
        ("transformer", "tensor", "onnx"),
        ("transformer", "tensor", "pt2"),
        ("mlp", "element", "onnx"),
        ("mlp", "element", "pt2"),
    ],
)
def test_a_file_never_costs_more_than_the_graph(
    name: str, scheme: str, kind: str, file: Callable[..., Path]
) -> None:
    """Codes that need fewer bits than their gates allow, and rounding in front of what moves."""
    result = deployed(name, scheme)
    expected = count(result.model, result.inputs, parse_budget(EVERYTHING)).states
    found = verify(file(name, scheme, kind), EVERYTHING).states
    for own, other in zip(found, expected, strict=True):
        assert 0.5 * other.value <= own.value <= other.value


def test_the_certificate_lies_beside_the_file(file: Callable[..., Path]) -> None:
    path = file("lenet5", "tensor")
    data = json.loads(path.with_name(path.name + SUFFIX).read_text())
    assert data["file"] == path.name
    assert data["bytes"] == path.stat().st_size
    assert data["counted_from"] == "file"
    assert data["satisfied"] is True
    assert data["constraints"][0]["constraint"] == "bops <= 2%"
    assert "1 MAC" in data["convention"]


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["verify", *map(str, arguments)])
    return done.exit_code, done.output


@pytest.mark.parametrize("kind", ["onnx", "safetensors", "pt2"])
def test_the_command_says_whether_bounds_hold(kind: str, file: Callable[..., Path]) -> None:
    path = file("lenet5", "tensor", kind)
    status, text = run(path, "--budget", "bops <= 2%, weights <= 1 MB")
    assert status == 0
    assert text.splitlines()[0].startswith("bops 1.9288% <= 2.0000%")
    assert text.splitlines()[1].startswith("weights 557880 <= 1e+06 byte")
    status, text = run(path, "--budget", "bops <= 1%")
    assert status == 1
    assert "VIOLATED" in text
    assert run(path)[0] == 0  # what it states itself


def test_the_command_prints_a_certificate(file: Callable[..., Path]) -> None:
    status, text = run(file("lenet5", "tensor"), "--json", "--budget", "macs <= 100%")
    assert status == 0
    assert json.loads(text)["constraints"][0]["value"] == 4267008


def test_a_missing_package_is_named(
    file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file("lenet5", "tensor")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ExportError, match=r'needs onnx; .*pip install "cgmq-fx\[verify\]"'):
        verify(path)


def test_a_wrong_budget_is_an_error(file: Callable[..., Path]) -> None:
    with pytest.raises(BudgetError, match="flops"):
        verify(file("lenet5", "tensor"), "flops <= 1")
    assert run(file("lenet5", "tensor"), "--budget", "flops <= 1")[0] == 2


def copied(path: Path, folder: Path) -> Path:
    """A copy without its certificate."""
    target = folder / path.name
    target.write_bytes(path.read_bytes())
    return target


def test_a_changed_file_is_not_the_certified_one(file: Callable[..., Path], tmp_path: Path) -> None:
    path = file("lenet5", "tensor")
    other = copied(path, tmp_path)
    beside = other.with_name(other.name + SUFFIX)
    beside.write_text(path.with_name(path.name + SUFFIX).read_text())
    assert verify(other).satisfied
    other.write_bytes(path.read_bytes() + b"\0\0")
    with pytest.raises(ArtifactError, match="its hash is another one"):
        verify(other)
    beside.write_text("{}")
    with pytest.raises(ArtifactError, match="is no certificate"):
        verify(other)


def test_a_certificate_that_states_other_costs(file: Callable[..., Path], tmp_path: Path) -> None:
    path = file("lenet5", "tensor")
    other = copied(path, tmp_path)
    stated = json.loads(path.with_name(path.name + SUFFIX).read_text())
    stated["constraints"][0]["value"] += 1
    other.with_name(other.name + SUFFIX).write_text(json.dumps(stated))
    for budget in (None, "bops <= 50%"):  # what a bound is, is not its business
        with pytest.raises(
            ArtifactError, match=r"states \S+ bop of bops, but counted from the file"
        ):
            verify(other, budget)
    assert verify(other, "macs <= 100%").satisfied  # it says nothing about that
    stated["constraints"][0]["value"] = 10**400
    other.with_name(other.name + SUFFIX).write_text(json.dumps(stated))
    with pytest.raises(ArtifactError, match="is no certificate"):
        verify(other)


def test_a_chip_has_a_name_here_too(file: Callable[..., Path]) -> None:
    (state,) = verify(file("lenet5", "tensor"), "latency <= 9 s", target="cortex-m7").states
    assert 0 < state.value < 9


def more_codes(model: Any) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == "conv1_weight_codes":
            values = np.full(tuple(tensor.dims), 127, np.int8)
            values[0, 0, 0, 0] = 1
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def wider_clip(model: Any) -> None:
    for node in model.graph.node:
        if node.op_type == "Clip":
            whole = onnx.numpy_helper.from_array(np.uint8(255), "whole")
            model.graph.initializer.append(whole)
            node.input[2] = "whole"


def larger_image(model: Any) -> None:
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 40


CHEATS = {"codes": more_codes, "clips": wider_clip}


@pytest.mark.parametrize("cheat", CHEATS)
def test_what_a_file_costs_is_read_not_believed(
    cheat: str, file: Callable[..., Path], tmp_path: Path
) -> None:
    path = copied(file("lenet5", "tensor"), tmp_path)
    model = onnx.load(path)
    before = verify(path, "bops <= 100%").states[0].value
    CHEATS[cheat](model)
    onnx.save(model, path)
    assert verify(path, "bops <= 100%").states[0].value > before
    assert not verify(path).satisfied


def drop_manifest(model: Any) -> None:
    del model.metadata_props[:]


def newer(model: Any) -> None:
    data = json.loads(model.metadata_props[0].value)
    model.metadata_props[0].value = json.dumps(data | {"format": 2})


def no_json(model: Any) -> None:
    model.metadata_props[0].value = "{"


def odd_manifest(model: Any) -> None:
    data = json.loads(model.metadata_props[0].value)
    model.metadata_props[0].value = json.dumps(data | {"bits": {"conv1_weight": [[5000], [], 0]}})


def huge_batch(model: Any) -> None:
    data = json.loads(model.metadata_props[0].value)
    model.metadata_props[0].value = json.dumps(data | {"batch": 1 << 40})


def outside(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def other_domain(model: Any) -> None:
    model.opset_import.add(domain="evil.ops", version=1)


def nested(model: Any) -> None:
    inner = onnx.helper.make_graph([], "inner", [], [])
    name = model.graph.input[0].name
    model.graph.node.append(
        onnx.helper.make_node("If", [name], ["z"], then_branch=inner, else_branch=inner)
    )


def unread_steps(model: Any) -> None:
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            node.input[1] = "nowhere"


DAMAGE: dict[Callable[[Any], None], str] = {
    drop_manifest: "not one that cgmq_fx exported",
    newer: "has format '?2'?.*upgrade cgmq_fx",
    no_json: "is no JSON",
    odd_manifest: "manifest.*is damaged",
    huge_batch: "states a batch of",
    outside: "another file",
    other_domain: "ops of other domains",
    nested: "damaged|graph of its own",
    unread_steps: "not in the file|damaged",
    larger_image: "damaged",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_damage_is_a_clear_error(
    damage: Callable[[Any], None], file: Callable[..., Path], tmp_path: Path
) -> None:
    path = copied(file("lenet5", "tensor"), tmp_path)
    model = onnx.load(path)
    damage(model)
    onnx.save(model, path)
    with pytest.raises(ArtifactError, match=DAMAGE[damage]):
        verify(path)
    assert run(path)[0] == 1


@pytest.mark.parametrize("kept", [0, 1, 100, 5000])
def test_truncated_files_are_refused(kept: int, file: Callable[..., Path], tmp_path: Path) -> None:
    path = copied(file("lenet5", "tensor"), tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match=r"damaged|not one that"):
        verify(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.onnx", "not an ONNX file"),
        ("text.safetensors", "cannot be read as a safetensors file"),
        ("text.pt2", "is not a .pt2 file"),
        ("text.bin", "cannot tell the format"),
        ("nowhere.onnx", "cannot be read"),
    ],
)
def test_files_that_are_not_ours_are_refused(name: str, message: str, tmp_path: Path) -> None:
    if not name.startswith("nowhere"):
        (tmp_path / name).write_text("this is no model, whatever its name says")
    with pytest.raises(ArtifactError, match=message):
        verify(tmp_path / name)


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_a_file_that_costs_too_much_is_not_left_behind(kind: str, tmp_path: Path) -> None:
    result = deployed("mlp", "w8")
    budget = parse_budget("bops <= 1%")
    cost = count(result.model, result.inputs, budget)
    with pytest.raises(BoundError, match=r"bops 6.2500% > .*removed"):
        replace(result, budget=budget, cost=cost).export(tmp_path / f"net.{kind}", verify=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("codes", "ranges", "layout", "expected"),
    [
        ([[1, -1], [0, 1]], (), Layout((2, 4, 8)), [[2]]),
        ([[7, -1], [0, 1]], (), Layout((2, 4, 8)), [[4]]),
        ([[8, -1], [0, 1]], (), Layout((2, 4, 8)), [[8]]),
        ([[8, -1], [0, 1]], (), Layout(), [[5]]),
        ([[7, -1], [0, 1]], (2, 1), Layout((2, 4, 8), (2, 1)), [[4], [2]]),
        ([[85, 0], [17, 119]], (), Layout((2, 4, 8), (2, 2)), [[2, 2], [4, 4]]),
        ([[85, 0], [17, 119]], (), Layout((0, 2, 4, 8), (2, 2)), [[2, 0], [4, 4]]),
        ([[85, 1], [17, 119]], (), Layout((2, 4, 8), (2, 1)), [[8], [4]]),
        ([[64, 0], [3, 1]], (), Layout((2, 4, 8), (2, 1), power_of_two=True), [[2], [4]]),
        ([[63, 0], [1, 1]], (2, 1), Layout((2, 4, 7)), [[7]]),
        ([[63, 0], [0, 0]], (2, 1), Layout((2, 4, 7), (2, 1)), [[7], [2]]),
        ([[1, -1], [0, 0]], (2, 1), Layout((0, 2, 4, 8)), [[2]]),
        ([[7, -1], [0, 0]], (2, 1), Layout((0, 2, 4, 8), (2, 1)), [[4], [0]]),
    ],
)
def test_bits_of_weights_are_the_fewest_that_hold_their_codes(
    codes: list[list[int]], ranges: tuple[int, ...], layout: Layout, expected: list[list[int]]
) -> None:
    """An 8-bit grid has a 2-bit one at every 85th code (255 / 3) and a 4-bit one at every 17th."""
    assert weight_bits(np.array(codes, np.int8), ranges, layout).tolist() == expected


@pytest.mark.parametrize(
    ("low", "high", "widths", "expected"),
    [(0, 3, (2, 4), 2), (0, 13, (2, 4, 8), 4), (-7, 7, (2, 4), 4), (-8, 7, (4, 8), 8)],
)
def test_bits_of_activations_are_the_fewest_that_hold_their_limits(
    low: int, high: int, widths: tuple[int, ...], expected: int
) -> None:
    assert activation_bits(np.array(low), np.array(high), Layout(widths)) == expected


def test_codes_that_no_width_holds_are_refused() -> None:
    with pytest.raises(ArtifactError, match="too many"):
        weight_bits(np.array([[9]]), (), Layout((2, 4)))
    with pytest.raises(ArtifactError, match="too many"):
        activation_bits(np.array(0), np.array(256), Layout((2, 8)))
    with pytest.raises(ArtifactError, match="do not fit"):
        weight_bits(np.array([[1]]), (), Layout((2, 4), (3, 3)))


def test_a_manifest_reads_back() -> None:
    manifest = manifest_of(deployed("mlp", "both"))
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json())), "x") == manifest


@pytest.mark.parametrize("suffix", ["onnx", "pt2", "safetensors"])
def test_shares_of_a_shortened_network_refer_to_the_whole_one(suffix: str, tmp_path: Path) -> None:
    result, whole = deployed("mlp", "pruned", "macs <= 60%"), deployed("mlp", "tensor")
    exported = result.export(tmp_path / f"net.{suffix}")
    assert result.cost.facts.macs <= 0.6 * whole.cost.facts.macs
    for budget in (None, "macs <= 60%"):
        (state,) = verify(exported.path, budget).states
        assert state.satisfied
        assert state.relative == result.cost["macs"].relative
    (other,) = verify(exported.path, "bops <= 50%").states  # nobody said what these were
    assert other.reference < whole.cost["bops"].reference


@pytest.mark.parametrize("stated", [-1.0, float("inf"), "x", None])
def test_a_reference_that_is_no_cost_is_refused(stated: object) -> None:
    manifest = {"format": 1, "batch": 1, "budget": "", "bits": {}, "references": {"bops": stated}}
    with pytest.raises(ArtifactError, match="manifest of here"):
        Manifest.from_json(manifest, "here")
