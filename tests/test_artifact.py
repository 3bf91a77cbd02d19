from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cgmq_fx import (
    ArtifactError,
    BOPs,
    BoundError,
    CgmqError,
    CostModelError,
    Result,
    Scheme,
    UnknownCostError,
    load,
    prepare,
)
from tests.nets import NETS, Net, call, tensors

KEY = "cgmq_fx"
Header = dict[str, Any]
Tensors = dict[str, Tensor]
Content = tuple[Header, Tensors]
SCHEMES = {
    "tensor": Scheme(),
    "channel": Scheme(weights="channel", activations="channel"),
    "element": Scheme(weights="element", output_bits=8),
}


def quantized(net: Net, scheme: Scheme | None = None) -> Result:
    return prepare(net.build(), BOPs() <= "20%", net.inputs(2), scheme=scheme).finalize()


def read(path: Path) -> Content:
    with safe_open(path, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()[KEY]), found


def write(path: Path, header: Any, found: Tensors) -> Path:
    text = header if isinstance(header, str) else json.dumps(header)
    save_file({k: t.contiguous() for k, t in found.items()}, path, {KEY: text})
    return path


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Content:
    path = tmp_path_factory.mktemp("artifact") / "keywords"
    return read(quantized(NETS["keywords"]).save(path))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["cnn", "residual", "transposed", "mlp", "masked"])
def test_a_round_trip_loses_nothing(name: str, scheme: str, tmp_path: Path) -> None:
    result, inputs = quantized(NETS[name], SCHEMES[scheme]), NETS[name].inputs(3)
    loaded = load(result.save(tmp_path / "a"))
    assert all(map(torch.equal, call(loaded.model, inputs), call(result.model, inputs)))
    assert str(loaded) == str(result)
    assert loaded.report() == result.report()
    assert loaded.cost.facts == result.cost.facts
    assert loaded.save(tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


KINDS = ["tied", "keywords", "nested", "attention", "buffers", "token_norm"]


@pytest.mark.parametrize("name", KINDS)
def test_inputs_outputs_and_state_of_every_kind_survive(name: str, tmp_path: Path) -> None:
    result, inputs = quantized(NETS[name]), NETS[name].inputs(3)
    loaded = load(result.save(tmp_path / "a"))
    assert type(loaded.model(*inputs.args, **inputs.kwargs)) is type(
        result.model(*inputs.args, **inputs.kwargs)
    )
    assert all(map(torch.equal, call(loaded.model, inputs), call(result.model, inputs)))
    assert str(loaded) == str(result)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_model_that_was_converted_is_kept_as_it_was_captured(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    result = quantized(NETS["cnn"])
    inputs = result.inputs.tensors[0]
    expected = result.model(inputs)
    result.model.to(dtype)
    found = load(result.save(tmp_path / "net.safetensors")).model
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    torch.testing.assert_close(found(inputs), expected, rtol=0.05, atol=0.05)


def test_a_loaded_model_switches_modes_and_trains(tmp_path: Path) -> None:
    model = load(quantized(NETS["mlp"]).save(tmp_path / "a")).model
    inputs = NETS["mlp"].inputs(4)
    assert not model.training
    assert all(map(torch.equal, call(model, inputs), call(model, inputs)))
    assert not all(map(torch.equal, call(model.train(), inputs), call(model, inputs)))
    model(*inputs.args).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def node(header: Header, op: str, target: str = "") -> dict[str, Any]:
    """The first node of a kind whose target contains a text."""
    rows: list[dict[str, Any]] = header["graph"]["nodes"]
    return next(row for row in rows if row["op"] == op and target in row["target"])


def put(header: Header, target: str, *args: Any, op: str = "call_function", **more: Any) -> Header:
    """Add a node before the output."""
    row = {"op": op, "name": "added", "target": target, "args": list(args), "kwargs": {}}
    header["graph"]["nodes"].insert(-1, row | {"module": ""} | more)
    return header


def quantizer(header: Header, **fields: Any) -> None:
    """Change the first quantizer."""
    header["graph"]["modules"]["cgmq_quantizers.x"].update(fields)


def keyword(header: Header, name: str) -> None:
    """Rename a keyword input."""
    header["graph"]["in_spec"]["tuple"][1]["dict"][0] = [name]


def deep(depth: int, kind: str = "tuple") -> Any:
    nested: Any = "leaf"
    for _ in range(depth):
        nested = {kind: [nested]}
    return nested


X = {"node": "x"}
CODE = "x\n    __import__('os').system('touch /tmp/owned')\n    x"
SMUGGLED = "other': __import__('os').system('touch /tmp/owned'), 'y"

EDITS: dict[str, tuple[Callable[[Header], Any], str]] = {
    "newer": (lambda h: h.update(format=3), "has format 3, .*upgrade cgmq_fx"),
    "no format": (lambda h: h.pop("format"), "has format None"),
    "format text": (lambda h: h.update(format="1"), "has format '1'"),
    "format zero": (lambda h: h.update(format=0), "has format 0"),
    # what would reach the source that torch prints and executes
    "node name": (lambda h: put(h, "aten.relu.default", X, name=CODE), "is no name"),
    "input": (lambda h: node(h, "placeholder").update(target=CODE), "is no name"),
    "input default": (lambda h: node(h, "placeholder").update(args=["x"]), "has a default"),
    "argument": (lambda h: h["graph"].update(inputs=["x", "y=exit()"]), "is no name"),
    "argument self": (lambda h: h["graph"].update(inputs=["self", "other"]), "named 'self'"),
    "argument torch": (lambda h: h["graph"].update(inputs=["torch", "x"]), "named 'torch'"),
    "argument if": (lambda h: h["graph"].update(inputs=["if", "x"]), "named 'if'"),
    "keyword input": (lambda h: keyword(h, SMUGGLED), "is no name"),
    "keyword": (
        lambda h: put(h, "aten.relu.default", kwargs={"self=exit(), a": X}),
        "is no name",
    ),
    "state path": (lambda h: node(h, "get_attr").update(target='a").x; ("'), "is no path"),
    "module path": (lambda h: node(h, "call_module").update(target=CODE), "is no path"),
    "wide letters": (
        lambda h: put(h, "aten.relu.default", kwargs={"\uff53elf": X}),
        "is no name",
    ),
    "counter": (lambda h: put(h, "aten.relu.default", "# COUNTER: 1"), "is no text"),
    "text": (lambda h: put(h, "aten.relu.default", "a\nb"), "is no text"),
    "module text": (lambda h: put(h, "aten.relu.default", X, module="a\nb"), "is no text"),
    "dtype": (lambda h: put(h, "aten.to.dtype", X, {"dtype": "__doc__"}), "is no dtype"),
    # attributes that are no state, and modules that are not the library's
    "class": (lambda h: node(h, "get_attr").update(target="__class__"), "does not hold"),
    "globals": (lambda h: put(h, "forward.__globals__", op="get_attr"), "no module"),
    "method": (lambda h: put(h, "state_dict", op="call_module"), "does not hold"),
    "plain module": (lambda h: put(h, "cgmq_quantizers", op="call_module"), "does not hold"),
    "call_method": (lambda h: put(h, "tofile", X, "/tmp/owned", op="call_method"), "call_method"),
    "shadowed forward": (
        lambda h: h["graph"]["modules"].update(forward={"type": "TrainingFlag"}),
        "forward",
    ),
    "pickle": (lambda h: h["graph"]["modules"].update(a={"type": "pickle"}), "not known"),
    # structure
    "two ends": (lambda h: put(h, "output", [X], op="output"), "its one output"),
    "no end": (lambda h: h["graph"]["nodes"].pop(), "its one output"),
    "no nodes": (lambda h: h["graph"].update(nodes=[]), "its one output"),
    "twice": (lambda h: h["graph"]["nodes"].insert(0, h["graph"]["nodes"][0]), "two nodes have"),
    "cycle": (lambda h: put(h, "aten.relu.default", {"node": "added"}), "damaged"),
    "unknown node": (lambda h: put(h, "aten.relu.default", {"node": "none"}), "damaged"),
    "deep argument": (lambda h: put(h, "aten.relu.default", deep(40)), "too deeply"),
    "deep input": (lambda h: h["graph"].update(in_spec=deep(40)), "too deeply"),
    "very deep input": (lambda h: h["inputs"].update(args=[deep(200)]), "damaged"),
    "input kinds": (lambda h: h["graph"].update(in_spec="leaf"), "positional and keyword"),
    "unknown kind": (lambda h: h["graph"].update(out_spec=deep(1, "set")), "unknown kind 'set'"),
    "inputs": (lambda h: h["graph"].update(inputs=["x"]), "names .* do not fit"),
    "outputs": (lambda h: h["graph"].update(out_spec="leaf"), "outputs .* do not fit"),
    "no graph": (lambda h: h.pop("graph"), "damaged"),
    "no history": (lambda h: h.pop("history"), "damaged"),
    "phase": (
        lambda h: h["history"].update(steps=[{"step": 0, "steps": 1, "phase": "x", "costs": []}]),
        "is no phase",
    ),
    "input shape": (lambda h: h["inputs"]["args"][0].update(shape=[2, 5]), "damaged"),
    "input dtype": (lambda h: h["inputs"]["args"][0].update(dtype="nn"), "is no dtype"),
    "missing input": (lambda h: h["inputs"].update(args=[]), "damaged"),
    "batches": (lambda h: h["inputs"].update(batched=[True]), "whether it has a batch"),
    "batch": (lambda h: h["inputs"].update(batched=[1]), "whether it has a batch"),
    # quantizers
    "width 1": (lambda h: quantizer(h, bit_widths=[1, 2]), "no quantizer can take"),
    "width -3": (lambda h: quantizer(h, bit_widths=[-3]), "no quantizer can take"),
    "width 33": (lambda h: quantizer(h, bit_widths=[2, 33]), "no quantizer can take"),
    "width true": (lambda h: quantizer(h, bit_widths=[True]), "no quantizer can take"),
    "width text": (lambda h: quantizer(h, bit_widths="28"), "no quantizer can take"),
    "no width": (lambda h: quantizer(h, bit_widths=[]), "not among its bit-widths"),
    "other widths": (lambda h: quantizer(h, bit_widths=[3]), "not among its bit-widths"),
    "gates": (lambda h: quantizer(h, gate_shape=[3]), "wrong shape"),
    "ranges": (lambda h: quantizer(h, range_shape=[1, 1]), "wrong shape"),
    "role": (lambda h: quantizer(h, role="bias"), "damaged"),
    "bits written": (
        lambda h: (
            put(h, "cgmq_quantizers.x.bits", op="get_attr", name="own"),
            put(h, "aten.fill_.Scalar", {"node": "own"}, 32),
        ),
        "read by something that is no quantizer",
    ),
}


def refused(content: Content, tmp_path: Path, edit: Callable[[Header, Tensors], Any]) -> CgmqError:
    """The error of loading an edited copy."""
    header, found = copy.deepcopy(content)
    edit(header, found)
    with pytest.raises(CgmqError) as caught:
        load(write(tmp_path / "edited", header, found))
    return caught.value


@pytest.mark.parametrize(("edit", "message"), EDITS.values(), ids=EDITS)
def test_edited_headers_are_refused(
    content: Content, tmp_path: Path, edit: Callable[[Header], Any], message: str
) -> None:
    error = refused(content, tmp_path, lambda header, _: edit(header))
    assert isinstance(error, ArtifactError)
    assert error.__cause__ is None or "damaged" in str(error)
    with pytest.raises(ArtifactError, match=message):
        raise error
    assert not Path("/tmp/owned").exists()


@pytest.mark.parametrize(
    "target",
    [
        "aten.from_file.default",
        "aten.save.default",  # TorchScript's, which writes files
        "aten.warn.default",
        "aten.manual_seed.default",
        "aten._print.default",
        "aten._unsafe_index.Tensor",  # does not check its indices
        "aten.set_.source_Storage",
        "aten.set_.source_Tensor",
        "aten.resize_.default",
        "aten.record_stream.default",
        "aten.no_such_op.default",
        "aten.relu.no_such_overload",
        "aten.__class__.__init__",
        "aten.relu",
        "prim.Print.default",
        "profiler._record_function_enter.default",
        "torch.load",
        "torch.ops.aten.relu.default",
        "math.__loader__",
        "os.system",
        "builtins.eval",
        "operator.attrgetter",
        "operator.methodcaller",
        "eval('1')",
        "",
        None,
        7,
    ],
)
def test_calls_beyond_tensors_are_refused(content: Content, tmp_path: Path, target: Any) -> None:
    error = refused(content, tmp_path, lambda header, _: put(header, target, X))
    assert isinstance(error, ArtifactError)
    assert any(words in str(error) for words in ("not allowed", "does not have", "is no name"))


BITS, RANGE = "cgmq_quantizers.x.bits", "cgmq_quantizers.x.log_range"


def replaced(name: str, value: Any, dtype: torch.dtype | None = None) -> Callable[[Tensors], Any]:
    return lambda found: found.update({name: torch.tensor(value, dtype=dtype)})


TENSOR_EDITS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "seven bits": (replaced(BITS, [8] * 7, torch.int8), "wrong shape"),
    "negative bits": (replaced(BITS, -100, torch.int8), "not among its bit-widths"),
    "33 bits": (replaced(BITS, 33, torch.int8), "not among its bit-widths"),
    "5 bits": (replaced(BITS, 5, torch.int8), "not among its bit-widths"),
    "long bits": (replaced(BITS, 8 + 256, torch.int64), "not among its bit-widths"),
    "broken bits": (replaced(BITS, 2.7), "no whole numbers, but torch.float32"),
    "float bits": (replaced(BITS, 8.0), "no whole numbers"),
    "truth": (replaced(BITS, True), "no whole numbers, but torch.bool"),
    "no bits": (lambda t: t.pop(BITS), "no range or no bits"),
    "more state": (replaced("cgmq_quantizers.x.more", 1.0), "no range or no bits"),
    "no range": (lambda t: t.pop(RANGE), "no range or no bits"),
    "nan range": (replaced(RANGE, float("nan")), "not a finite number"),
    "infinite range": (replaced(RANGE, float("inf")), "not a finite number"),
    "whole range": (replaced(RANGE, 1), "damaged"),
    "no weight": (lambda t: t.pop("a.weight"), "does not hold"),
    "weight shape": (replaced("a.weight", [[1.0]]), "damaged"),
    "whole weight": (lambda t: t.update({"a.weight": t["a.weight"].long()}), "damaged"),
    "path": (replaced('a"b.weight', 1.0), "is no path"),
    "class": (replaced("__class__", 1.0), "damaged"),
    "taken": (replaced("a", 1.0), "damaged"),
}


@pytest.mark.parametrize(("edit", "message"), TENSOR_EDITS.values(), ids=TENSOR_EDITS)
def test_edited_tensors_are_refused(
    content: Content, tmp_path: Path, edit: Callable[[Tensors], Any], message: str
) -> None:
    error = refused(content, tmp_path, lambda _, found: edit(found))
    with pytest.raises(ArtifactError, match=message):
        raise error


def test_gates_that_do_not_fit_their_tensor_are_refused(content: Content, tmp_path: Path) -> None:
    """Bits of 1000 gates on 12 weights would count as none: 12 // 1000 elements per gate."""

    def edit(header: Header, found: Tensors) -> None:
        header["graph"]["modules"]["cgmq_quantizers.a_weight"]["gate_shape"] = [1000, 4, 3]
        found["cgmq_quantizers.a_weight.bits"] = torch.full((1000, 4, 3), 2, dtype=torch.int8)
        header["graph"]["modules"]["cgmq_quantizers.a_weight"]["bit_widths"] = [2]

    assert isinstance(refused(content, tmp_path, edit), ArtifactError)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"value": 1e-3}, BoundError, "bops .*VIOLATED"),
        ({"cost": "watts"}, UnknownCostError, "no cost model named 'watts'"),
        ({"value": 0.0}, ArtifactError, "positive, finite number"),
        ({"value": -1.0}, ArtifactError, "positive, finite number"),
        ({"value": float("nan")}, ArtifactError, "positive, finite number"),
        ({"counted": 3.0}, CostModelError, "and counted 3 when it was written"),
    ],
)
def test_budgets_are_checked_again(
    content: Content, tmp_path: Path, change: Header, kind: type[CgmqError], message: str
) -> None:
    error = refused(content, tmp_path, lambda header, _: header["budget"][0].update(change))
    with pytest.raises(kind, match=message):
        raise error


def test_bits_that_break_the_bound_are_found(content: Content, tmp_path: Path) -> None:
    def edit(header: Header, found: Tensors) -> None:
        for name in [n for n in found if n.endswith(".bits")]:
            entry = header["graph"]["modules"][name.removesuffix(".bits")]
            found[name].fill_(max(b for b in entry["bit_widths"] if b < 32))

    assert isinstance(refused(content, tmp_path, edit), BoundError)


class Odd(nn.Module):
    """A parameter whose name cannot stand in source."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.ParameterDict({"a b": torch.ones(3, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return x.matmul(self.odd["a b"])


class Unsafe(nn.Module):
    """Calls an op that an artifact must not hold."""

    def forward(self, x: Tensor) -> Tensor:
        index = torch.zeros(1, dtype=torch.long)
        y: Tensor = torch.ops.aten._unsafe_index.Tensor(x @ x.T, [index])
        return y


@pytest.mark.parametrize(
    ("model", "message"),
    [(Odd(), "'odd.a b' is no path"), (Unsafe(), "_unsafe_index.Tensor is not allowed")],
)
def test_what_would_not_load_is_not_written(model: nn.Module, message: str, tmp_path: Path) -> None:
    result = quantized(Net("", lambda: model, tensors((3,))))
    with pytest.raises(ArtifactError, match=message):
        result.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())
