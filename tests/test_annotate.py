from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

from cgmq_fx import DataError, NodeFacts, PassError, UnsupportedModelError
from cgmq_fx.cost_models import GraphFacts, Operand
from cgmq_fx.cost_models.facts import Role, Stored
from cgmq_fx.graphs import float_graph
from cgmq_fx.passes.annotate import annotate
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.infra import Pass, PassResult, run_passes
from tests.nets import NETS, Net, call, quantized, tensors


def facts_of(model: nn.Module, inputs: ExampleInputs) -> GraphFacts:
    captured = float_graph(model, inputs)
    return annotate(captured.module, captured.inputs.batch or 1)


Shape = tuple[int, ...]
LAYERS: dict[str, tuple[nn.Module, Shape, int]] = {
    # output elements x products per element
    "conv1d": (nn.Conv1d(2, 3, 4), (2, 10), (3 * 7) * (2 * 4)),
    "conv2d": (nn.Conv2d(3, 4, 3), (3, 8, 6), (4 * 6 * 4) * (3 * 3 * 3)),
    "conv3d": (nn.Conv3d(2, 3, 2), (2, 4, 5, 6), (3 * 3 * 4 * 5) * (2 * 2 * 2 * 2)),
    "stride": (nn.Conv2d(3, 4, 3, stride=2), (3, 9, 9), (4 * 4 * 4) * (3 * 9)),
    "dilation": (nn.Conv2d(3, 4, 3, dilation=2), (3, 9, 9), (4 * 5 * 5) * (3 * 9)),
    "padding": (nn.Conv2d(3, 4, 3, padding=1), (3, 9, 9), (4 * 9 * 9) * (3 * 9)),
    "same": (nn.Conv2d(3, 4, (3, 5), padding="same"), (3, 9, 7), (4 * 9 * 7) * (3 * 15)),
    "valid": (nn.Conv1d(3, 4, 3, padding="valid"), (3, 9), (4 * 7) * (3 * 3)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5), (6 * 3 * 3) * (2 * 9)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (4, 5, 5), (4 * 3 * 3) * 9),
    "multiplier": (nn.Conv2d(4, 8, 3, groups=4), (4, 5, 5), (8 * 3 * 3) * 9),
    # input elements x weights that each meets
    "transposed": (nn.ConvTranspose2d(3, 4, 3), (3, 5, 5), (3 * 5 * 5) * (4 * 9)),
    "transposed 1d": (nn.ConvTranspose1d(3, 4, 3, stride=2), (3, 5), (3 * 5) * (4 * 3)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2), (2, 3, 3, 3), (2 * 27) * (3 * 8)),
    "transposed groups": (
        nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2),
        (4, 5, 5),
        (4 * 5 * 5) * (3 * 9),
    ),
    "linear": (nn.Linear(7, 5), (7,), 5 * 7),
    "tokens": (nn.Linear(7, 5), (3, 4, 7), (3 * 4 * 5) * 7),
}


@pytest.mark.parametrize(("layer", "shape", "macs"), LAYERS.values(), ids=LAYERS)
def test_macs_of_layers(layer: nn.Module, shape: Shape, macs: int) -> None:
    inputs = tensors(shape)(3)
    assert facts_of(layer, inputs).macs == macs
    with FlopCounterMode(display=False) as counter:
        layer(*inputs.args)
    assert counter.get_total_flops() == 2 * 3 * macs  # a MAC is two, and a batch of 3


class Apply(nn.Module):
    """A function of the input and a parameter."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


PRODUCTS: dict[str, tuple[nn.Module, Shape, int]] = {
    "matmul": (Apply(torch.matmul, 4, 5), (3, 4), 3 * 5 * 4),
    "matmul broadcast left": (Apply(torch.matmul, 2, 4, 5), (1, 3, 4), (2 * 3 * 5) * 4),
    "matmul broadcast right": (Apply(torch.matmul, 1, 4, 5), (2, 3, 4), (2 * 3 * 5) * 4),
    "matmul vector": (Apply(torch.matmul, 4), (3, 4), 3 * 4),
    "mm": (Apply(torch.mm, 4, 5), (4,), 5 * 4),
    "addmm": (Apply(lambda x, w: torch.addmm(x[:, :1], x, w), 4, 5), (4,), 5 * 4),
    "bmm": (Apply(lambda x, w: torch.bmm(x, x.transpose(1, 2)), 1), (3, 4), (3 * 3) * 4),
    "baddbmm": (
        Apply(lambda x, w: torch.baddbmm(x[:, :, :1], x, x.transpose(1, 2)), 1),
        (3, 4),
        (3 * 3) * 4,
    ),
    "attention": (
        NETS["attention"].make(),
        (5, 8),
        5 * 24 * 8 + 2 * (5 * 5 * 4) * 2 + 5 * 8 * 8,  # projections, two products in two heads
    ),
}


@pytest.mark.parametrize(("model", "shape", "macs"), PRODUCTS.values(), ids=PRODUCTS)
def test_macs_of_products(model: nn.Module, shape: Shape, macs: int) -> None:
    facts = facts_of(model, tensors(shape)(3))
    assert facts.macs == macs
    assert not facts.unknown


@pytest.mark.parametrize("name", ["cnn", "residual", "separable", "transposed", "conv1d", "conv3d"])
def test_macs_of_whole_nets_equal_those_of_torch(name: str) -> None:
    net = NETS[name]
    with FlopCounterMode(display=False) as counter:
        call(net.build().eval(), net.inputs(2))
    captured = net.float_graph()
    assert annotate(captured.module, 2).macs == counter.get_total_flops() / 4


@pytest.mark.parametrize("name", NETS)
def test_facts_are_per_sample(name: str) -> None:
    def counted(batch: int) -> list[tuple[object, ...]]:
        captured = NETS[name].float_graph(batch)
        facts = annotate(quantized(captured), batch)
        return [(n.name, n.macs, n.operands, n.output_elements, n.stored) for n in facts.nodes]

    assert counted(2) == counted(6)


def node_facts(net: Net, name: str) -> NodeFacts:
    facts = annotate(net.quantized(), 2)
    return next(node for node in facts.nodes if node.name == name)


def test_facts_of_a_convolution() -> None:
    """Input (6, 3, 3) of 54 elements, 4 filters of 6 weights, output (4, 3, 3)."""
    assert node_facts(NETS["separable"], "conv2d_1") == NodeFacts(
        name="conv2d_1",
        op="aten.conv2d.default",
        macs=(4 * 3 * 3) * 6,
        operands=(
            Operand(Role.WEIGHT, 24, "3_weight", (1, 1, 1, 1)),
            Operand(Role.ACTIVATION, 54, "hardtanh", (1, 1, 1, 1)),
        ),
        output_elements=36,
        output_shape=(2, 4, 3, 3),
        groups=1,
        stored=(Stored("3.weight", 24, "3_weight"), Stored("3.bias", 4, None, 32)),
        module="3",
    )


def test_a_product_of_activations_has_no_weight() -> None:
    facts = node_facts(NETS["masked"], "matmul")
    assert [(o.role, o.elements, o.quantizer) for o in facts.operands] == [
        (Role.ACTIVATION, 20, "linear"),
        (Role.ACTIVATION, 20, "x"),
    ]
    assert facts.stored == ()


def test_a_float_graph_has_operands_without_quantizers() -> None:
    facts = annotate(NETS["cnn"].float_graph().module, 2)
    assert [o.quantizer for n in facts.nodes for o in n.operands] == [None] * 4
    assert facts.quantizers == {}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tied", [("table.weight", 28, "table_weight", 32)]),
        (
            "buffers",
            [
                ("shift", 3, None, 32),
                ("scale", 1, None, 32),
                ("a.weight", 9, "a_weight", 32),
                ("a.bias", 3, None, 32),
                ("lifted_tensor_0", 3, None, 32),
            ],
        ),
        (
            "token_norm",
            [
                ("a.weight", 12, "a_weight", 32),
                ("a.bias", 4, None, 32),
                ("norm.weight", 5, None, 32),
                ("norm.bias", 5, None, 32),
                ("norm.running_mean", 5, None, 32),
                ("norm.running_var", 5, None, 32),
            ],
        ),
    ],
)
def test_every_stored_tensor_is_counted_once(
    name: str, expected: list[tuple[str, int, str | None, int]]
) -> None:
    facts = annotate(NETS[name].quantized(), 2)
    stored = [s for node in facts.nodes for s in node.stored]
    assert sorted((s.name, s.elements, s.quantizer, s.bits) for s in stored) == sorted(expected)


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        (torch.int64, 64),
        (torch.bool, 8),
        (torch.half, 32),
        (torch.bfloat16, 32),
        (torch.double, 32),
    ],
)
def test_what_is_not_quantized_counts_at_what_is_deployed(dtype: torch.dtype, bits: int) -> None:
    model = nn.Linear(3, 3)
    model.register_buffer("table", torch.ones(3).to(dtype))
    model.register_forward_hook(lambda m, _, y: y * m.get_buffer("table"))
    facts = facts_of(model, tensors((3,))(2))
    assert [s.bits for n in facts.nodes for s in n.stored if s.name == "table"] == [bits]


E = torch.eye(4)

UNKNOWN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "cdist": (lambda x: torch.cdist(x, x), "aten.cdist.default"),
    "pdist": (torch.pdist, "aten.pdist.default"),
    "cdist of constants": (lambda x: x + torch.cdist(E, E)[0], "aten.cdist.default"),
}


@pytest.mark.parametrize(("function", "op"), UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_ops_are_listed_with_their_place(
    function: Callable[[Tensor], Tensor], op: str
) -> None:
    facts = facts_of(Apply(lambda x, _: function(x), 1), tensors((4,))(2))
    (found,) = facts.unknown
    assert f"({op}, " in found
    assert 'test_annotate.py", line ' in found


def test_places_that_depend_on_no_input_are_no_gap() -> None:
    def pairs(x: Tensor, _: Tensor) -> Tensor:
        rows, columns = torch.tril_indices(4, 4, -1)
        return (x[:, :, None] * x[:, None])[:, rows, columns]

    assert facts_of(Apply(pairs, 1), tensors((4,))(2)).unknown == ()


@pytest.mark.parametrize("name", NETS)
def test_the_ops_of_ordinary_nets_are_known(name: str) -> None:
    assert annotate(NETS[name].quantized(), 2).unknown == ()


def test_a_graph_is_left_as_it_was() -> None:
    module = NETS["cnn"].quantized()
    before, keys = module.code, {n.name: set(n.meta) for n in module.graph.nodes}
    assert annotate(module, 2) == annotate(module, 2)
    assert module.code == before
    assert {n.name: set(n.meta) for n in module.graph.nodes} == keys


@dataclass(frozen=True)
class Fine(Pass):
    """Changes nothing."""

    def run(self, module: GraphModule) -> PassResult:
        return PassResult(module, modified=False)


@dataclass(frozen=True)
class Fails(Pass):
    """Raises what it is given."""

    error: Exception

    def run(self, module: GraphModule) -> PassResult:
        raise self.error


@dataclass(frozen=True)
class Breaks(Pass):
    """Leaves a graph that reads a value before it exists."""

    def run(self, module: GraphModule) -> PassResult:
        nodes = list(module.graph.nodes)
        nodes[0].append(nodes[-2])
        return PassResult(module, modified=True)


@dataclass(frozen=True)
class Refuses(Pass):
    """Does nothing, but its contract does not hold."""

    def run(self, module: GraphModule) -> PassResult:
        return PassResult(module, modified=False)

    def check(self, module: GraphModule) -> None:
        raise PassError("the contract is broken")


@pytest.mark.parametrize(
    ("passes", "kind", "message"),
    [
        ([Fails(KeyError("gone"))], PassError, r"the pass Fails failed: 'gone' .*before it: none"),
        ([Fine(), Fine(), Breaks()], PassError, r"(?s)Breaks failed: .*before it: Fine, Fine"),
        ([Fine(), Refuses()], PassError, "^the contract is broken$"),
        ([Fails(UnsupportedModelError("not this"))], UnsupportedModelError, "^not this$"),
        ([Fails(DataError("empty"))], DataError, "^empty$"),
    ],
)
def test_errors_name_the_pass_and_those_before_it(
    passes: list[Pass], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        run_passes(NETS["mlp"].float_graph().module, passes)


def test_passes_that_work_go_through() -> None:
    module = NETS["mlp"].float_graph().module
    assert run_passes(module, [Fine(), Fine()]) is module
