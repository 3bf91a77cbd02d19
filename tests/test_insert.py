from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cgmq_fx
from cgmq_fx import PassError, Scheme, UnsupportedModelError
from cgmq_fx.cost_models.facts import Role
from cgmq_fx.graphs import float_graph
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.grid import DEFAULT_BIT_WIDTHS
from cgmq_fx.passes.insert import QUANTIZERS, InsertQuantizers
from cgmq_fx.passes.quantizer import QuantizerSpec
from tests.nets import NETS, call, distance, quantized, quantizers, small_classifier, tensors


def activation(signed: bool, widths: tuple[int, ...] = DEFAULT_BIT_WIDTHS) -> QuantizerSpec:
    return QuantizerSpec(Role.ACTIVATION, signed, widths, batched=True)


def weight(*ranges: int) -> QuantizerSpec:
    return QuantizerSpec(Role.WEIGHT, True, DEFAULT_BIT_WIDTHS, range_shape=ranges)


SIGNED, UNSIGNED = activation(True), activation(False)
LINK, UNSIGNED_LINK = activation(True, (2, 4, 8)), activation(False, (2, 4, 8))

EXPECTED = {
    "cnn": {
        "input_1": SIGNED,
        "0_weight": weight(4, 1, 1, 1),
        "max_pool2d": UNSIGNED,  # of a ReLU, before it is flattened
        "5_weight": weight(5, 1),
    },
    "residual": {
        "x": SIGNED,
        "stem_weight": weight(4, 1, 1, 1),
        "relu_": UNSIGNED,  # read by a convolution and by the sum
        "a_weight": weight(4, 1, 1, 1),
        "relu__1": UNSIGNED,
        "b_weight": weight(4, 1, 1, 1),
        "conv2d_2": LINK,  # only the sum reads it
        "relu__2": UNSIGNED_LINK,  # only the mean reads it
        "mean": UNSIGNED,
        "head_weight": weight(5, 1),
    },
    "concat": {
        "x": SIGNED,
        "a_weight": weight(2, 1, 1, 1),
        "b_weight": weight(3, 1, 1, 1),
        "cat": SIGNED,  # one of its parts is signed
        "c_weight": weight(2, 1, 1, 1),
    },
    "separable": {
        "input_1": SIGNED,
        "0_weight": weight(6, 1, 1, 1),
        "hardtanh": UNSIGNED,
        "3_weight": weight(4, 1, 1, 1),
    },
    "transposed": {
        "input_1": SIGNED,
        "0_weight": weight(1, 4, 1, 1),
        "relu": UNSIGNED,
        "3_weight": weight(),  # in groups, axis 1 is not all output channels
    },
    "mlp": {
        "layer_norm": SIGNED,
        "1_weight": weight(8, 1),
        "dropout": SIGNED,
        "4_weight": weight(3, 1),
    },
    "linear_norm": {
        "input_1": SIGNED,
        "0_weight": weight(4, 1),
        "sigmoid": UNSIGNED,
        "3_weight": weight(2, 1),
    },
    "tied": {"embedding": SIGNED, "table_weight": weight(7, 1)},
    "keywords": {
        "x": SIGNED,
        "a_weight": weight(4, 1),
        "other": SIGNED,
        "b_weight": weight(4, 1),
    },
    "attention": {
        "x": SIGNED,
        "attention_in_proj_weight": weight(24, 1),
        "select": SIGNED,  # queries
        "select_1": SIGNED,  # keys
        "select_2": SIGNED,  # values
        "softmax": UNSIGNED,
        "matmul_1": SIGNED,
        "attention_out_proj_weight": weight(8, 1),
    },
    "masked": {  # neither the mask nor the index
        "x": SIGNED,
        "a_weight": weight(4, 1),
        "linear": SIGNED,
        "softmax": UNSIGNED,
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_quantizers_stand_where_they_should(name: str) -> None:
    found = {q: module.spec for q, module in quantizers(NETS[name].quantized()).items()}
    assert found == EXPECTED[name]


@pytest.mark.parametrize("name", NETS)
def test_quantizers_at_32_bits_change_nothing(name: str) -> None:
    net = NETS[name]
    inputs, module = net.inputs(3), net.quantized().eval()
    expected = call(net.float_graph().module.eval(), inputs)
    assert distance(call(module, inputs), expected) < 1e-6


def test_the_code_of_a_small_graph() -> None:
    captured = float_graph(small_classifier(), ExampleInputs((torch.randn(2, 3),)))
    module = quantized(captured)
    lines = [line.split(";")[0].strip() for line in module.code.strip().splitlines()]
    assert lines == [
        "def forward(self, input):",
        "input, = fx_pytree.tree_flatten_spec(([input], {}), self._in_spec)",
        '_0_weight = getattr(self, "0").weight',
        '_0_bias = getattr(self, "0").bias',
        '_2_weight = getattr(self, "2").weight',
        '_2_bias = getattr(self, "2").bias',
        "input_1 = input",
        "cgmq_quantizers_input_1 = self.cgmq_quantizers.input_1(input_1)",
        'cgmq_quantizers_0_weight = getattr(self.cgmq_quantizers, "0_weight")(_0_weight)',
        "cgmq_quantizers_input_1_log_range = self.cgmq_quantizers.input_1.log_range",
        "cgmq_quantizers_input_1_bits = self.cgmq_quantizers.input_1.bits",
        'cgmq_quantizers_0_weight_log_range = getattr(self.cgmq_quantizers, "0_weight").log_range',
        'cgmq_quantizers_0_weight_bits = getattr(self.cgmq_quantizers, "0_weight").bits',
        "cgmq_biases_linear = self.cgmq_biases.linear(_0_bias, "
        "cgmq_quantizers_input_1_log_range, cgmq_quantizers_input_1_bits, "
        "cgmq_quantizers_0_weight_log_range, cgmq_quantizers_0_weight_bits)",
        "linear = torch.ops.aten.linear.default("
        "cgmq_quantizers_input_1, cgmq_quantizers_0_weight, cgmq_biases_linear)",
        "relu = torch.ops.aten.relu.default(linear)",
        "cgmq_quantizers_relu = self.cgmq_quantizers.relu(relu)",
        'cgmq_quantizers_2_weight = getattr(self.cgmq_quantizers, "2_weight")(_2_weight)',
        "cgmq_quantizers_relu_log_range = self.cgmq_quantizers.relu.log_range",
        "cgmq_quantizers_relu_bits = self.cgmq_quantizers.relu.bits",
        'cgmq_quantizers_2_weight_log_range = getattr(self.cgmq_quantizers, "2_weight").log_range',
        'cgmq_quantizers_2_weight_bits = getattr(self.cgmq_quantizers, "2_weight").bits',
        "cgmq_biases_linear_1 = self.cgmq_biases.linear_1(_2_bias, "
        "cgmq_quantizers_relu_log_range, cgmq_quantizers_relu_bits, "
        "cgmq_quantizers_2_weight_log_range, cgmq_quantizers_2_weight_bits)",
        "linear_1 = torch.ops.aten.linear.default("
        "cgmq_quantizers_relu, cgmq_quantizers_2_weight, cgmq_biases_linear_1)",
        "return pytree.tree_unflatten((linear_1,), self._out_spec)",
    ]


class Between(nn.Module):
    """A ReLU that one convolution reads directly and another through an op."""

    def __init__(self, op: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.op = op
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x).relu()
        z: Tensor = self.op(y)
        return self.b(y), F.conv2d(z, torch.ones(1, z.shape[1], 1, 1))


PASSES_THE_GRID: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool": lambda y: F.max_pool2d(y, 2),
    "view": lambda y: y.view(y.shape[0], 2, 12, 6),
    "flatten": lambda y: y.flatten(2).unsqueeze(-1),
    "transpose": lambda y: y.transpose(1, 2),
    "slice": lambda y: y[:, 1:, ::2],
    "chunk": lambda y: y.chunk(2, 1)[1],
    "unbind": lambda y: y.unsqueeze(1).unbind(1)[0],
    "pixel shuffle": lambda y: F.pixel_shuffle(y, 2),
    "nearest": lambda y: F.interpolate(y, scale_factor=2.0),
    "relu": lambda y: y.relu(),
}
ENDS_THE_GRID: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "average": (lambda y: F.avg_pool2d(y, 2), "avg_pool2d"),
    "sum": (lambda y: y + 1.0, "add"),
    "joined": (lambda y: torch.cat([y, y * 2.0], 1), "cat"),
    "sigmoid": (lambda y: y.sigmoid(), "sigmoid"),
}


def activations(op: Callable[[Tensor], Tensor]) -> set[str]:
    captured = float_graph(Between(op), ExampleInputs((torch.randn(2, 3, 6, 6),)))
    found = quantizers(quantized(captured))
    return {name for name, q in found.items() if q.spec.role is Role.ACTIVATION}


@pytest.mark.parametrize("op", PASSES_THE_GRID.values(), ids=PASSES_THE_GRID)
def test_a_tensor_has_one_quantizer_however_it_is_read(op: Callable[[Tensor], Tensor]) -> None:
    assert activations(op) == {"x", "relu"}


@pytest.mark.parametrize(("op", "name"), ENDS_THE_GRID.values(), ids=ENDS_THE_GRID)
def test_new_values_have_a_quantizer_of_their_own(
    op: Callable[[Tensor], Tensor], name: str
) -> None:
    assert activations(op) == {"x", "relu", name}


class Written(nn.Module):
    """Writes into a part of a tensor that a linear layer reads, past autograd: it stays so."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        y.detach()[:, 1:3] -= 1.0
        z: Tensor = self.b(y)
        return z


class Assembled(nn.Module):
    """Fills a new tensor with parts of its input, likewise."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(x.shape[0], 4)
        y.detach()[:, 1:3] = x[:, :2]
        z: Tensor = self.a(y)
        return z


@pytest.mark.parametrize(
    ("model", "name", "write", "layer"),
    [(Written(), "relu", "sub_", "linear_1"), (Assembled(), "zeros", "copy_", "linear")],
)
def test_what_is_written_in_place_is_quantized_when_it_is_complete(
    model: nn.Module, name: str, write: str, layer: str
) -> None:
    module = quantized(float_graph(model, ExampleInputs((torch.randn(2, 4),))))
    nodes = {n.name: n for n in module.graph.nodes}
    quantizer = nodes[f"{QUANTIZERS}_{name}"]
    assert nodes[layer].args[0] is quantizer
    assert nodes[write] < quantizer
    assert quantizers(module)[name].spec == SIGNED


class Product(nn.Module):
    """A product with a parameter, features first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Flattened(nn.Module):
    """A linear layer on a flattened image of 4 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.sin().flatten(1))
        return y


Shape = tuple[int, ...]
GATES: dict[str, tuple[nn.Module, Shape, Shape, Shape, Shape]] = {
    # shape of the input | gates of the weight per channel, per element | of the input per channel
    "conv": (nn.Conv2d(3, 4, 2), (3, 6, 6), (4, 1, 1, 1), (4, 3, 2, 2), (1, 3, 1, 1)),
    "conv1d": (nn.Conv1d(3, 4, 2), (3, 6), (4, 1, 1), (4, 3, 2), (1, 3, 1)),
    "grouped": (nn.Conv2d(4, 6, 2, groups=2), (4, 6, 6), (6, 1, 1, 1), (6, 2, 2, 2), (1, 4, 1, 1)),
    "depthwise": (
        nn.Conv2d(3, 3, 2, groups=3),
        (3, 6, 6),
        (3, 1, 1, 1),
        (3, 1, 2, 2),
        (1, 3, 1, 1),
    ),
    "transposed": (
        nn.ConvTranspose2d(3, 4, 2),
        (3, 6, 6),
        (1, 4, 1, 1),
        (3, 4, 2, 2),
        (1, 3, 1, 1),
    ),
    "transposed groups": (
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        (4, 6, 6),
        (),
        (4, 3, 2, 2),
        (1, 4, 1, 1),
    ),
    "linear": (nn.Linear(6, 3), (6,), (3, 1), (3, 6), (1, 6)),
    "tokens": (nn.Linear(6, 3), (5, 6), (3, 1), (3, 6), (1, 1, 6)),
    "flattened": (Flattened(), (4, 3, 3), (5, 1), (5, 36), (1, 4, 1, 1)),
    "matmul": (Product(), (5, 6), (1, 3), (6, 3), (1, 1, 6)),
}


def gate_shapes(model: nn.Module, shape: Shape, scheme: Scheme) -> dict[Role, tuple[Shape, Shape]]:
    module = quantized(float_graph(model, tensors(shape)(2)), scheme)
    specs = [q.spec for q in quantizers(module).values()]
    return {spec.role: (spec.gate_shape, spec.range_shape) for spec in specs}


@pytest.mark.parametrize(
    ("model", "shape", "channel", "element", "features"), GATES.values(), ids=GATES
)
def test_gates_and_ranges_have_the_shape_of_their_granularity(
    model: nn.Module, shape: Shape, channel: Shape, element: Shape, features: Shape
) -> None:
    fine = gate_shapes(model, shape, Scheme(weights="channel", activations="channel"))
    assert fine == {Role.WEIGHT: (channel, channel), Role.ACTIVATION: (features, ())}
    finest = gate_shapes(model, shape, Scheme(weights="element", weight_ranges="tensor"))
    assert finest == {Role.WEIGHT: (element, ()), Role.ACTIVATION: ((), ())}


@pytest.mark.parametrize("bits", [2, 8, 32])
def test_the_input_can_be_fixed(bits: int) -> None:
    found = quantizers(NETS["residual"].quantized(Scheme(input_bits=bits)))
    assert found["x"].spec.bit_widths == (bits,)
    assert found["relu_"].spec.bit_widths == DEFAULT_BIT_WIDTHS


def test_an_input_that_is_only_added_can_be_fixed_too() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            z: Tensor = self.last(torch.relu(self.first(x) + y))
            return z

    inputs = (torch.rand(2, 4), torch.rand(2, 4))
    found = cgmq_fx.prepare(Adds(), "bops <= 90%", inputs, scheme=Scheme(input_bits=8))
    widths = {n: q.bit_widths for n, q in found.facts.quantizers.items()}
    assert widths["x"] == widths["y"] == (8,)


@pytest.mark.parametrize(
    ("widths", "links"), [((3, 5, 32), (3, 5)), ((0, 8), (8,)), ((16, 32), (8,))]
)
def test_links_take_the_bit_widths_that_integer_sums_can(
    widths: tuple[int, ...], links: tuple[int, ...]
) -> None:
    found = quantizers(NETS["residual"].quantized(Scheme(bit_widths=widths)))
    assert found["conv2d_2"].spec.bit_widths == links
    assert found["x"].spec.bit_widths == widths


def test_a_model_without_products_is_refused() -> None:
    captured = float_graph(nn.Sequential(nn.ReLU(), nn.MaxPool1d(2)), tensors((3, 4))(2))
    with pytest.raises(UnsupportedModelError, match="there is nothing to quantize"):
        quantized(captured)


def test_a_factor_without_a_quantizer_is_noticed() -> None:
    module, step = NETS["cnn"].quantized(), InsertQuantizers(Scheme())
    step.check(module)
    node = next(n for n in module.graph.nodes if n.target == f"{QUANTIZERS}.max_pool2d")
    node.replace_all_uses_with(node.args[0])
    with pytest.raises(PassError, match=r"flatten of linear \(5, .*\) has no quantizer"):
        step.check(module)
