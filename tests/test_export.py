from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from cgmq_fx import DataError, ExportError, OptionError, export, prepare, register_exporter
from cgmq_fx.exporters import Exporter, Source, exporters, find_exporter
from cgmq_fx.exporters import exporter as registry
from cgmq_fx.exporters.agreement import compare, outputs_of, trial_batches
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.codes import is_quantize
from cgmq_fx.passes.lower import lower
from tests.deploy_nets import deployed, inputs_of


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> type[Exporter]:
    """A format whose runtime computes something else: everything is one per cent larger."""
    monkeypatch.setattr(registry, "_EXPORTERS", dict(exporters()))

    @register_exporter
    class Broken(Exporter):
        name: ClassVar[str] = "broken"
        suffix: ClassVar[str] = ".broken"

        def write(self, source: Source, path: Path) -> None:
            path.write_text(source.manifest)

        def run(self, path: Path, batches: Sequence[ExampleInputs]) -> list[list[Tensor]]:
            right = outputs_of(deployed("mlp").model, batches)
            return [[output * 1.1 for output in outputs] for outputs in right]

    return Broken


def test_what_computes_something_else_is_not_left_behind(
    broken: type[Exporter], tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=r"does not compute what the model computes.*removed"):
        deployed("mlp").export(tmp_path / "net.broken")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_draws_random_numbers_is_told_so(tmp_path: Path) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            z: Tensor = self.second(y + torch.randn_like(y))
            return z

    result = prepare(Noisy(), "bops <= 100%", torch.rand(8, 4)).finalize()
    with pytest.raises(ExportError, match="itself: randn_like draws random numbers"):
        result.export(tmp_path / "net.safetensors")


def test_integers_that_are_not_the_model_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(module: GraphModule, inputs: ExampleInputs, offset: bool = False) -> GraphModule:
        found = lower(module, inputs, offset)
        codes = next(t for n, t in found.named_buffers() if n.endswith("_bias_codes"))
        codes.neg_()
        return found

    monkeypatch.setattr(registry, "lower", wrong)
    with pytest.raises(ExportError, match=r"do not compute what it computes itself \("):
        deployed("mlp").export(tmp_path / "net.safetensors")


def test_what_does_not_fit_is_told_before_a_runtime_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the model fails on the samples: .*shape"):
        deployed("mlp").export(tmp_path / "net.safetensors", samples=[torch.rand(2, 5)])
    with pytest.raises(OptionError, match="export takes what quantize gave, not NoneType"):
        export(None, tmp_path / "net.onnx")  # type: ignore[arg-type]
    assert deployed("mlp").export(tmp_path / "NET.SAFETENSORS").format == "safetensors"


def test_a_file_that_was_there_survives_a_failure(broken: type[Exporter], tmp_path: Path) -> None:
    path = tmp_path / "net.broken"
    path.write_text("before")
    with pytest.raises(ExportError):
        deployed("mlp").export(path)
    assert path.read_text() == "before"


def test_verification_can_be_left_out(broken: type[Exporter], tmp_path: Path) -> None:
    exported = deployed("mlp").export(tmp_path / "net.broken", verify=False)
    assert exported.agreement is None
    assert exported.path.exists()
    assert "broken" in str(exported)


def test_a_format_is_registered_once(broken: type[Exporter]) -> None:
    with pytest.raises(ExportError, match="'broken' already"):
        register_exporter(broken)


def of_kind(**attributes: Any) -> type[Exporter]:
    methods: dict[str, Any] = {"write": lambda *_: None, "run": lambda *_: []}
    given = {"name": "mine", "suffix": ".mine", **methods, **attributes}
    return type("Mine", (Exporter,), {k: v for k, v in given.items() if v is not None})


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"name": None}, "Mine needs a `name`, such as 'mine'; it has None"),
        ({"suffix": None}, "needs a `suffix` in small letters, such as '.mine'; it has None"),
        ({"suffix": "mine"}, "it has 'mine'"),
        ({"suffix": ".MINE"}, "it has '.MINE'"),
        ({"write": None, "run": None}, "Mine has to define run, write"),
        ({"name": "onnx"}, "there is a format 'onnx' already"),
    ],
)
def test_formats_that_could_not_be_used_are_not_registered(
    attributes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_EXPORTERS", dict(exporters()))
    with pytest.raises(ExportError, match=re.escape(message)):
        register_exporter(of_kind(**attributes))
    assert "mine" not in exporters()


OWN_FORMAT = """
from pathlib import Path
from cgmq_fx.exporters import Exporter, exporters, find_exporter, register_exporter

@register_exporter
class Mine(Exporter):
    name, suffix = "mine", ".onnx"
    def write(self, source, path): pass
    def run(self, path, batches): return []

print(find_exporter(Path("a.onnx"), None).name, list(exporters())[-1])
"""


def test_formats_of_this_library_keep_their_suffixes() -> None:
    command = [sys.executable, "-c", OWN_FORMAT]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == (
        "onnx mine\n"
    )


@pytest.mark.parametrize(
    ("path", "name", "expected"),
    [("a.onnx", None, "onnx"), ("a.pt2", None, "pt2"), ("a.bin", "pt2", "pt2")],
)
def test_formats_go_by_suffix_or_by_name(path: str, name: str | None, expected: str) -> None:
    assert find_exporter(Path(path), name).name == expected


@pytest.mark.parametrize(
    ("path", "name", "message"),
    [
        ("a.onnx", "tensorrt", "no format 'tensorrt'; there are onnx, "),
        ("a.bin", None, "its suffix is none of .onnx"),
        ("a", None, "cannot tell the format of 'a'"),
    ],
)
def test_unknown_formats_are_refused(path: str, name: str | None, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        find_exporter(Path(path), name)


def test_a_missing_package_is_named_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r'onnxruntime.*pip install "cgmq-fx\[onnx\]"'):
        deployed("mlp").export(tmp_path / "a.onnx")


def test_a_folder_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be written"):
        deployed("mlp").export(tmp_path / "nowhere" / "a.pt2")


def test_samples_are_run_too(tmp_path: Path) -> None:
    samples = [(torch.randn(4, 16), torch.zeros(4))] * 2
    alone = export(deployed("mlp"), tmp_path / "a.pt2").agreement
    more = export(deployed("mlp"), tmp_path / "b.pt2", samples=samples).agreement
    assert alone is not None
    assert more is not None
    assert more.values == alone.values + 2 * 4 * 5


def test_samples_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        deployed("mlp").export(tmp_path / "a.pt2", samples=["text"])


def test_trial_data_saturates_every_quantizer() -> None:
    """In every quantized tensor, some value is at the upper limit of its codes."""
    result = deployed("lenet5", "channel")
    module = lower(result.model, result.inputs)
    (batch, *_) = trial_batches(module, result.inputs, 32)
    reached: Counter[bool] = Counter()

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if is_quantize(n):
                reached[int(value.max()) == n.args[4][0]] += 1  # type: ignore[index]
            return value

    Watch(module).run(*batch.args, enable_io_processing=False)
    assert reached == {True: 4}


def test_agreement_counts_steps_of_the_output() -> None:
    result = deployed("mlp", "w8")
    module = lower(result.model, result.inputs)
    batches = trial_batches(module, result.inputs, 64)
    right = outputs_of(module, batches)
    same = compare(module, right, batches)
    assert (same.exact, same.within, same.argmax) == (1.0, 1.0, 1.0)
    whole = torch.cat([o for outputs in right for o in outputs])
    step = float(whole.max() - whole.min()) / 255
    off = compare(module, [[o + 2 * step for o in outputs] for outputs in right], batches)
    assert off.largest == pytest.approx(2.0, abs=1e-3)
    assert (off.exact, off.within, off.argmax, off.holds) == (0.0, 0.0, 1.0, False)


def test_outputs_of_another_shape_never_agree() -> None:
    result = deployed("mlp")
    module = lower(result.model, result.inputs)
    assert not compare(module, [[torch.zeros(1, 1)]], [inputs_of("mlp", 2)]).holds


def test_no_outputs_are_no_agreement() -> None:
    result = deployed("mlp")
    assert not compare(lower(result.model, result.inputs), [], []).holds
