"""Files that are looked into: every tensor of codes against those before it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from cgmq_fx import ExportError
from cgmq_fx.exporters import exporters
from cgmq_fx.exporters.agreement import Agreement, Reference
from cgmq_fx.exporters.exporter import Source
from cgmq_fx.exporters.inside import Inside, look_inside
from cgmq_fx.passes.codes import is_quantize
from tests.deploy_nets import deployed, inputs_of

Change: TypeAlias = Callable[[Tensor], Tensor]
SAMPLES = 50
FAR = Agreement(0.5, 0.5, 90.0, 0.5, 100)


class Changed(Interpreter):
    """A runtime that computes what a graph says, but for one tensor of codes."""

    def __init__(self, module: GraphModule, name: str, change: Change) -> None:
        super().__init__(module)
        self.name, self.change = name, change
        self.codes: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        made = super().run_node(n)
        if is_quantize(n):
            made = self.change(made) if n.name == self.name else made
            self.codes[n.name] = made
        return made


def off_by(amount: int, every: int) -> Change:
    """One of so many codes is another, towards the middle of all."""

    def change(codes: Tensor) -> Tensor:
        flat = codes.flatten().long()
        some = flat[::every]
        flat[::every] = torch.where(some > flat.float().mean(), some - amount, some + amount)
        return flat.reshape(codes.shape).to(codes.dtype)

    return change


@pytest.mark.parametrize(
    ("scheme", "change", "wrong"),
    [
        ("tensor", off_by(0, 1), None),
        ("tensor", off_by(1, 51), None),
        ("tensor", off_by(1, 40), "30 of 1,200 codes are off, by up to 1"),
        ("tensor", off_by(2, 10**9), "1 of 1,200 codes are off, by up to 2"),
        ("w16", off_by(6, 1), None),
        ("w16", off_by(12, 1), "1,200 of 1,200 codes are off, by up to 1"),
    ],
)
def test_codes_on_borders_are_few_and_off_by_one(
    scheme: str, change: Change, wrong: str | None
) -> None:
    module = Source(deployed("mlp", scheme)).lowered
    names = [node.name for node in module.graph.nodes if is_quantize(node)]
    inputs = inputs_of("mlp", SAMPLES)
    runtime = Changed(module, names[2], change)
    outputs = [runtime.run(*inputs.args)]
    finding = look_inside(Inside(module, [runtime.codes], [outputs]), [inputs])
    assert finding.tensors == len(names)
    assert str(finding.wrong).startswith("None" if wrong is None else f"{names[2]}: {wrong}")
    assert (finding.excuse is None) == (wrong is not None)


def test_outputs_are_looked_at_as_well() -> None:
    module, inputs = Source(deployed("mlp")).lowered, inputs_of("mlp", SAMPLES)
    runtime = Changed(module, "", torch.neg)
    outputs = [runtime.run(*inputs.args) * 1.1]
    finding = look_inside(Inside(module, [runtime.codes], [outputs]), [inputs])
    assert finding.wrong is not None
    assert finding.wrong.startswith("the outputs: ")


@pytest.mark.parametrize("name", ["mlp", "lenet5", "transformer", "parts"])
def test_onnxruntime_shows_all_codes(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    source, path, batches = Source(deployed(name)), tmp_path / "net.onnx", [inputs_of(name, 8)]
    exporter = exporters()["onnx"]
    exporter.write(source, path)
    inside = exporter.inside(source, path, batches)
    assert inside is not None
    torch.testing.assert_close(inside.outputs, exporter.run(path, batches), rtol=0, atol=1e-6)
    finding = look_inside(inside, batches)
    rounded = [node for node in inside.module.graph.nodes if is_quantize(node)]
    assert finding.tensors == len(rounded) > 1
    assert finding.wrong is None


def test_files_whose_outputs_disagree_are_taken_if_all_codes_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(Reference, "compare", lambda *_: FAR)
    monkeypatch.setattr("cgmq_fx.exporters.api._check_lowered", lambda *_: None)
    exported = deployed("mlp").export(tmp_path / "net.onnx")
    assert "tensors of codes in the file are what the model makes" in str(exported)


def test_errors_say_where_a_file_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight is changed in the file: outputs that agree all the same are no proof."""
    pytest.importorskip("onnxscript")
    import onnx

    kind = type(exporters()["onnx"])
    write = kind.write

    def changed(own: Any, source: Source, path: Path) -> None:
        write(own, source, path)
        model = onnx.load(path)
        stored = next(i for i in model.graph.initializer if i.name.startswith("2_weight"))
        values = onnx.numpy_helper.to_array(stored).copy()
        values[0] *= -1
        stored.CopyFrom(onnx.numpy_helper.from_array(values, stored.name))
        onnx.save(model, path)

    monkeypatch.setattr(kind, "write", changed)
    near = Agreement(0.99, 0.99, 40.0, 0.99, 100)
    monkeypatch.setattr(Reference, "compare", lambda *_: near)
    monkeypatch.setattr("cgmq_fx.exporters.api._check_lowered", lambda *_: None)
    with pytest.raises(ExportError, match=r"differ from what is before it: quantize_\d: [\d,]+ of"):
        deployed("mlp").export(tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()
