"""Deployment presets: what they train, what they refuse, and how they go with chips."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional

import cgmq_fx
from benchmarks.op_nets import OPS, Between
from cgmq_fx import PRESETS, OptionError, Preset, Scheme, TargetError, UnsupportedModelError
from cgmq_fx.cli import main
from cgmq_fx.cost_models import load_target, parse_budget, target_names
from cgmq_fx.exporters import exporters, onnx_reader
from cgmq_fx.exporters.onnx_file import Portable
from cgmq_fx.graphs import float_graph
from cgmq_fx.passes.capture import Captured
from cgmq_fx.passes.inputs import ExampleInputs
from cgmq_fx.passes.scheme import Granularity
from cgmq_fx.presets import NONE, deployment, float_op
from tests.deploy_nets import float_net, inputs_of
from tests.nets import quantizers, small_classifier
from tests.test_opaque import Block, Outlier
from tests.test_target import target_of

RUNTIMES = [name for name in PRESETS if name != "none"]


def test_these_presets_exist() -> None:
    assert list(PRESETS) == ["onnxruntime", "fpga", "xnnpack", "litert", "none"]
    assert not set(PRESETS) & set(target_names())


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_has_tensors_of_8_bits_from_end_to_end(name: str) -> None:
    scheme = PRESETS[name].apply(None)
    assert scheme.bit_widths == (2, 4, 8)
    assert (scheme.activations, scheme.output_bits) == ("tensor", 8)
    assert scheme == PRESETS[name].scheme


def test_only_an_fpga_asks_for_shifts() -> None:
    shifts = {name for name in PRESETS if PRESETS[name].apply(None).power_of_two}
    single = {name for name in PRESETS if PRESETS[name].apply(None).weight_ranges == "tensor"}
    assert shifts == single == {"fpga"}


def test_every_preset_has_its_exporter() -> None:
    named = {name for preset in PRESETS.values() for name in preset.formats}
    assert named == {"onnx", "qonnx", "executorch", "litert"}
    assert named <= set(exporters())


def test_none_changes_nothing() -> None:
    given = Scheme((2, 32), "element", "channel", "tensor", 16)
    assert NONE.apply(None) == Scheme()
    assert NONE.apply(given) == given


# What the user names is kept, what is left at its default follows the preset.
KEPT: list[tuple[str, dict[str, Any]]] = [
    ("onnxruntime", {"bit_widths": (2, 3, 8), "weight_widths": (2, 4)}),
    ("onnxruntime", {"weights": "channel", "input_bits": 8}),
    ("onnxruntime", {"weight_widths": (5, 8)}),
    ("onnxruntime", {"bit_widths": (0, 2, 4, 8), "weights": "element", "weight_widths": (0, 4, 8)}),
    ("xnnpack", {"weight_ranges": "tensor", "power_of_two": True}),
    ("xnnpack", {"weights": "element", "bit_widths": (2, 3, 8), "power_of_two": True}),
    ("litert", {"bit_widths": (8,), "output_bits": 4}),
    ("fpga", {"bit_widths": (3, 5), "input_bits": 6}),
]


@pytest.mark.parametrize(("name", "options"), KEPT)
def test_an_option_that_the_runtime_executes_is_kept(name: str, options: dict[str, Any]) -> None:
    assert PRESETS[name].apply(Scheme(**options)) == replace(PRESETS[name].scheme, **options)


@pytest.mark.parametrize("options", [{"bit_widths": (2, 8)}, {"weights": "element"}])
def test_weights_have_the_widths_that_are_named_or_that_nest(options: dict[str, Any]) -> None:
    expected = replace(PRESETS["onnxruntime"].scheme, weight_widths=None, **options)
    assert PRESETS["onnxruntime"].apply(Scheme(**options)) == expected


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("onnxruntime", {"bit_widths": (2, 8, 16)}, "execute 16 bits; it takes 0 or 2 to 8"),
    ("xnnpack", {"bit_widths": (8, 32)}, "execute 32 bits"),
    ("litert", {"bit_widths": (0, 8)}, "execute 0 bits; it takes 2 to 8 bits"),
    ("fpga", {"input_bits": 32}, "execute 32 bits"),
    ("xnnpack", {"output_bits": 16}, "execute 16 bits"),
    ("litert", {"weight_widths": (4, 16)}, "execute 16 bits"),
    ("litert", {"weights": "element", "weight_widths": (3, 8)}, r"weight_widths=\(3, 8\) within"),
    ("onnxruntime", {"activations": "channel"}, "activations='channel'; .* activations='tensor'"),
    ("fpga", {"weights": "channel"}, r"weights='channel'; it takes weights of \('tensor',\)"),
    ("litert", {"weights": "element", "bit_widths": (3, 8)}, r"\(3, 8\) within one range"),
    (
        "litert",
        {"weights": "channel", "weight_ranges": "tensor", "bit_widths": (2, 3)},
        "widths that divide each other there",
    ),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_an_option_that_contradicts_is_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=f"^the target {name} cannot .*{message}"):
        PRESETS[name].apply(Scheme(**options))


def test_an_fpga_refuses_what_hls4ml_does_not_have_before_training() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    message = r"the target fpga cannot execute adaptive_avg_pool2d \(1.*it takes conv1d, conv2d, "
    for function in (cgmq_fx.prepare, cgmq_fx.explain):
        with pytest.raises(UnsupportedModelError, match=message):
            function(model, "bops <= 5%", torch.rand(2, 1, 8, 8), target="fpga")
    cgmq_fx.prepare(model, "bops <= 5%", torch.rand(2, 1, 8, 8), target="litert")


FOREIGN = [
    ("fpga", "linear on rows", r"linear on 3 dimensions \("),
    ("fpga", "max_pool1d", "max_pool1d"),
    ("xnnpack", "softmax", r"softmax of images \("),
    ("xnnpack", "conv3d", r"conv3d \(.*what was tried there, PRESETS\['xnnpack'\].ops; to try"),
]


@pytest.mark.parametrize(("name", "op", "message"), FOREIGN)
def test_what_an_exporter_does_not_take_is_refused_before_training(
    name: str, op: str, message: str
) -> None:
    net = OPS[op]
    with pytest.raises(UnsupportedModelError, match=f"target {name} cannot execute .*{message}"):
        graph_of(net.build(), net.inputs(), name)


@pytest.mark.parametrize("name", ["fpga", "xnnpack", "litert"])
def test_an_op_that_was_never_tried_is_refused_before_training(name: str) -> None:
    model = Between(torch.cosh, (8,))
    message = f"target {name} cannot execute cosh .*; it takes "
    with pytest.raises(UnsupportedModelError, match=message):
        cgmq_fx.prepare(model, "bops <= 5%", torch.rand(2, 8), target=name)
    anything = replace(PRESETS[name], ops=(), rules=())
    cgmq_fx.prepare(model, "bops <= 5%", torch.rand(2, 8), target=anything)


def test_an_op_that_was_never_tried_is_tried_in_onnx() -> None:
    inputs = torch.rand(2, 8)
    cgmq_fx.prepare(Between(torch.cosh, (8,)), "bops <= 5%", inputs, target="onnxruntime")
    message = r"target onnxruntime cannot execute lgamma \(.*\); torch.onnx cannot translate"
    with pytest.raises(UnsupportedModelError, match=message):
        cgmq_fx.prepare(Between(torch.lgamma, (8,)), "bops <= 5%", inputs, target="onnxruntime")


class AsManyGroups(nn.Module):
    """A convolution with weights of each sample, as in StyleGAN2."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3, 2, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[0]
        w = (self.w[:1] * x.mean((2, 3))[:, None, :, None, None]).reshape(count * 3, 2, 3, 3)
        return functional.conv2d(x.reshape(1, -1, 6, 6), w, groups=count).reshape(count, 3, 4, 4)


@pytest.mark.parametrize("name", RUNTIMES)
def test_groups_that_depend_on_the_inputs_are_refused(name: str) -> None:
    message = "conv2d with a number of groups that depends on the inputs"
    with pytest.raises(UnsupportedModelError, match=message):
        graph_of(AsManyGroups(), torch.randn(2, 2, 6, 6), name)


class ReturnsBeside(nn.Module):
    """A layer, and something that no node makes."""

    def __init__(self, other: object) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(6, 4), other

    def forward(self, x: Tensor) -> dict[str, object]:
        return {"y": self.layer(x), "other": self.other}


@pytest.mark.parametrize("name", ["onnxruntime", "fpga"])
def test_what_is_no_tensor_cannot_be_returned(name: str) -> None:
    graph_of(ReturnsBeside(None), torch.randn(2, 6), name)
    for other in (3.5, True, "text"):
        message = f"cannot execute output of {other!r}, which is no tensor .*write the model witho"
        with pytest.raises(UnsupportedModelError, match=message):
            graph_of(ReturnsBeside(other), torch.randn(2, 6), name)


def test_a_reader_that_fails_does_not_call_a_file_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(onnx_reader, "is_qonnx", fails)
    message = "cannot be counted: its reader fails: IndexError: list index out of range"
    with pytest.raises(UnsupportedModelError, match=message):
        graph_of(Between(torch.cosh, (8,)), torch.rand(2, 8), "onnxruntime")


def test_without_its_packages_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Portable, "packages", ("no_such_package",))
    message = r"cannot execute cosh \(.*no_such_package.*pip install"
    with pytest.raises(UnsupportedModelError, match=message):
        graph_of(Between(torch.cosh, (8,)), torch.rand(2, 8), "onnxruntime")


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_module_that_is_kept_as_it_is_cannot_be_deployed(name: str) -> None:
    message = rf"target {name} cannot execute inner\.0, kept as it is"
    with pytest.raises(UnsupportedModelError, match=message):
        cgmq_fx.prepare(Block(Outlier()), "bops <= 60%", torch.randn(4, 8), target=name)


def graph_of(model: nn.Module, inputs: torch.Tensor, name: str) -> Captured:
    """The float graph of a model, checked."""
    captured = float_graph(model.eval(), ExampleInputs((inputs,)))
    PRESETS[name].check_ops(captured)
    return captured


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("budget", ["weights <= 90%", "bops <= 9%, arena <= 90%", "bops <= 9%"])
def test_bounds_on_memory_are_not_what_bytes_take(name: str, budget: str) -> None:
    found = PRESETS[name].remarks(parse_budget(budget))
    in_bytes = name in {"onnxruntime", "xnnpack", "litert"} and budget != "bops <= 9%"
    assert len(found) == in_bytes
    assert all("in bytes, but" in text for text in found)


def test_what_a_bound_does_not_say_goes_with_the_result() -> None:
    batches = [torch.rand(2, 4)]
    result = cgmq_fx.quantize(
        *(nn.Linear(4, 4), "weights <= 90%", batches), target="litert", epochs=0, progress=False
    )
    assert "litert keeps weights and activations" in result.warnings[-1]


@pytest.mark.parametrize("name", ["onnxruntime", "xnnpack", "litert"])
@pytest.mark.parametrize("net", ["lenet5", "mlp", "resnet20", "separable", "transformer"])
def test_what_was_seen_to_export_is_taken(net: str, name: str) -> None:
    captured = graph_of(float_net(net), inputs_of(net, 2).args[0], name)
    found = {float_op(node) for node in captured.module.graph.nodes} - {""}
    assert found
    assert found <= set(PRESETS[name].ops)


MINE = Preset("mine", "My chip.", (), Scheme((4, 8)), widths=(4, 8))
CHIP = load_target("cortex-m7")
FILE = Path(__file__).parents[1] / "cost_models" / "targets" / "mpic.json"

MEANINGS: list[tuple[Any, str, str | None]] = [
    (None, "none", None),
    ((), "none", None),
    ("none", "none", None),
    ("fpga", "fpga", None),
    ("cortex-m7", "none", "cortex-m7"),
    (CHIP, "none", "cortex-m7"),
    (FILE, "none", "mpic"),
    (str(FILE), "none", "mpic"),
    (MINE, "mine", None),
    (("litert", "cortex-m7"), "litert", "cortex-m7"),
    ([FILE, "xnnpack"], "xnnpack", "mpic"),
    ([MINE], "mine", None),
]


@pytest.mark.parametrize(("target", "preset", "chip"), MEANINGS)
def test_what_a_target_means(target: Any, preset: str, chip: str | None) -> None:
    found = deployment(target)
    assert found.preset.name == preset
    assert (found.chip and found.chip.name) == chip


WRONG: list[tuple[Any, type[Exception], str]] = [
    ("z80", cgmq_fx.UnknownTargetError, "no target 'z80'; presets are onnxruntime, fpga, .*chips"),
    (("fpga", "z80"), TargetError, "no target 'z80'"),
    (("fpga", "litert"), OptionError, "fpga and litert are two presets"),
    (["mpic", CHIP], OptionError, "mpic and cortex-m7 are two chips"),
    (8, OptionError, "takes names, files, presets and targets, not 8"),
    ([None], OptionError, "not None"),
]


@pytest.mark.parametrize(("target", "error", "message"), WRONG)
def test_no_target(target: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        deployment(target)


def test_a_chip_takes_away_what_it_would_split() -> None:
    assert deployment("cortex-m7").scheme(None).bit_widths == (2, 4, 8)
    assert deployment("cortex-m7").scheme(Scheme((2, 16))).bit_widths == (2, 16)
    found = deployment(("onnxruntime", "cortex-m7")).scheme(None)
    assert (found.bit_widths, found.weight_widths) == ((2, 4, 8), (2, 4, 7))
    narrow = PRESETS["onnxruntime"], target_of({(4, 4): 1.0})
    found = deployment(narrow).scheme(None)
    assert (found.bit_widths, found.weight_widths) == ((2, 4), (2, 4))
    assert deployment(narrow).scheme(Scheme(weight_widths=(8,))).weight_widths == (8,)
    both = deployment(("fpga", "cortex-m7")).scheme(Scheme(weights="tensor"))
    assert both == PRESETS["fpga"].scheme


TAKEN = [
    ((4, 8), Scheme((2, 4, 8), weight_widths=(2, 4))),
    ((8, 16), Scheme((2, 4, 8, 16), weight_widths=(2, 4, 8))),
    ((16, 8), Scheme((2, 4, 8), weight_widths=(2, 4, 8, 16))),
    ((8, 8), Scheme((2, 4, 8))),
]


@pytest.mark.parametrize(("pair", "scheme"), TAKEN)
def test_weights_and_activations_have_what_a_chip_takes(
    pair: tuple[int, int], scheme: Scheme
) -> None:
    where = deployment(target_of({pair: 1.0}))
    assert where.scheme(None) == scheme
    named = where.scheme(Scheme(weight_widths=(8,)))
    assert (named.bit_widths, named.weight_widths) == (scheme.bit_widths, (8,))


@pytest.mark.parametrize("name", ["aie-ml", "bismo", "cortex-m7", "mpic"])
def test_chips_that_come_with_the_library_take_8_bits_of_both(name: str) -> None:
    assert deployment(name).scheme(None) == Scheme((2, 4, 8))
    fast = deployment(("onnxruntime", name)).scheme(None)
    assert (fast.bit_widths, fast.weight_widths) == ((2, 4, 8), (2, 4, 7))


def test_a_chip_that_takes_all_widths_changes_no_scheme() -> None:
    assert deployment("horowitz-45nm").scheme(None) == Scheme()


def test_quantize_trains_under_a_preset() -> None:
    result = cgmq_fx.quantize(
        small_classifier(),
        "bops <= 5%",
        example_inputs=torch.rand(4, 3),
        epochs=0,
        target="fpga",
        progress=False,
    )
    own = quantizers(result.model)
    assert len(own) == 5  # two inputs, two weights, one output
    assert all(q.spec.power_of_two and q.log_range.numel() == 1 for q in own.values())
    assert all(int(q.bits.max()) <= 8 for q in own.values())


@pytest.mark.parametrize("weights", ["tensor", "channel", "element"])
def test_what_was_pruned_for_onnxruntime_can_be_exported(
    weights: Granularity, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    scheme = Scheme((0, 2, 4, 8), weights=weights, weight_widths=(0, 2, 4, 8))
    inputs = inputs_of("separable", 4).tensors[0]
    result = cgmq_fx.quantize(
        float_net("separable"),
        "bops <= 0.2%",
        example_inputs=inputs,
        epochs=0,
        scheme=scheme,
        target="onnxruntime",
        progress=False,
    )
    assert any((bits == 0).any() for bits in result.cost.assignment.values())
    exported = result.export(tmp_path / "net.onnx")
    assert exported.agreement is not None
    assert exported.agreement.largest <= 1.0


def test_prepare_trains_under_a_preset_and_counts_a_chip() -> None:
    prepared = cgmq_fx.prepare(
        small_classifier(), "latency <= 1 s", torch.rand(2, 3), target=("litert", "cortex-m7")
    )
    assert {q.spec.bit_widths for q in quantizers(prepared.model).values()} == {(2, 4, 8), (8,)}


def test_explain_counts_what_a_preset_allows() -> None:
    ceilings = [
        cgmq_fx.explain(small_classifier(), "bops <= 100%", torch.rand(2, 3), target=target)
        .ranges[0]
        .ceiling
        for target in ("none", "xnnpack")
    ]
    assert ceilings[1] == ceilings[0] / 16  # 8 x 8 bits instead of 32 x 32


def test_the_command_line_lists_both() -> None:
    listed = CliRunner().invoke(main, ["targets"], env={"COLUMNS": "140"})
    assert listed.exit_code == 0
    assert all(name in listed.output for name in (*PRESETS, *target_names()))
