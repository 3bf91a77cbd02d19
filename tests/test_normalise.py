from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from cgmq_fx.graphs import float_graph
from cgmq_fx.passes.capture import ExampleInputs
from cgmq_fx.passes.functionalise import Functionalise
from cgmq_fx.passes.infra import Pass
from cgmq_fx.passes.normalise import (
    FoldBatchNorm,
    MergeState,
    RemoveNoOps,
    SwitchModes,
)
from tests.nets import NETS, Net, call, distance, ops, tensors

TOLERANCE = 1e-5


class OutputReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        z: Tensor = y + self.norm(y)
        return z


class WeightShared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.norm(self.conv(x)))
        return y


class WeightComputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(F.conv2d(x, self.conv.weight.tanh()))
        return y


def norm_first() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1))


def batch_statistics() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))


def check(net: Net, training: bool = False) -> GraphModule:
    """The normalised graph of a net, after comparing it with the model in the given mode."""
    model, inputs = net.build().train(training), net.inputs(3)
    graph = float_graph(model, net.inputs(2)).module.train(training)
    torch.manual_seed(1)
    expected = call(model, inputs)
    torch.manual_seed(1)
    assert distance(call(graph, inputs), expected) < TOLERANCE
    return graph


Layers = tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]
FOLDABLE: dict[str, Layers] = {
    "bias": (lambda: nn.Conv2d(4, 6, 3), lambda: nn.BatchNorm2d(6), (4, 5, 5)),
    "no bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), lambda: nn.BatchNorm2d(6), (4, 5, 5)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.BatchNorm2d(6), (4, 5, 5)),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), lambda: nn.BatchNorm2d(6), (4, 5, 5)),
    "plain": (lambda: nn.Conv2d(4, 6, 3), lambda: nn.BatchNorm2d(6, affine=False), (4, 5, 5)),
    "eps": (lambda: nn.Conv2d(4, 6, 3), lambda: nn.BatchNorm2d(6, eps=0.5), (4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), lambda: nn.BatchNorm2d(6), (4, 5, 5)),
    "transposed groups": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
        lambda: nn.BatchNorm2d(6),
        (4, 5, 5),
    ),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda: nn.BatchNorm1d(6), (4, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3), lambda: nn.BatchNorm3d(6), (4, 3, 4, 5)),
    "linear": (lambda: nn.Linear(4, 6), lambda: nn.BatchNorm1d(6), (4,)),
}


@pytest.mark.parametrize("layers", FOLDABLE.values(), ids=FOLDABLE)
def test_batch_norm_is_folded_where_it_can_be(layers: Layers) -> None:
    layer, norm, shape = layers
    graph = check(Net("", lambda: nn.Sequential(layer(), norm()), tensors(shape)))
    assert len(ops(graph)) == 1
    assert {name for name, _ in graph.named_parameters()} == {"0.weight", "0.bias"}
    assert not dict(graph.named_buffers())


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (OutputReadTwice, tensors((3, 5, 5))),
        (WeightShared, tensors((3, 5, 5))),
        (norm_first, tensors((3, 5, 5))),
        (batch_statistics, tensors((3, 5, 5))),
        (NETS["token_norm"].make, NETS["token_norm"].inputs),
    ],
)
def test_batch_norm_stays_where_it_cannot_be_folded(
    make: Callable[[], nn.Module], inputs: Callable[[int], ExampleInputs]
) -> None:
    assert ops(check(Net("", make, inputs))).count("batch_norm") == 1


def test_batch_norm_is_folded_into_a_weight_that_is_computed() -> None:
    assert ops(check(Net("", WeightComputed, tensors((3, 5, 5))))) == ["conv2d"]


class InPlace(nn.Module):
    """A linear layer whose output is edited by a function that writes in place."""

    def __init__(self, edit: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.edit, self.drop = edit, nn.Dropout(0.5)
        self.linear = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.edit(self, self.linear(x))


def chain(_: nn.Module, y: Tensor) -> Tensor:
    return y.relu_().mul_(2).add_(1)


def reader_before(_: nn.Module, y: Tensor) -> Tensor:
    before = y + 1
    y.mul_(2)
    return before * y


def same_name_after(_: nn.Module, y: Tensor) -> Tensor:
    z = y.relu_()
    return y * z


def view_written(_: nn.Module, y: Tensor) -> Tensor:
    y.view(-1).relu_().add_(1)
    return y


def view_read_after(_: nn.Module, y: Tensor) -> Tensor:
    flat = y.flatten()
    y.relu_()
    return flat * 2


def slice_written(_: nn.Module, y: Tensor) -> Tensor:
    y[:, 1:3] += 1.0
    return y * 2


def diagonal_written(_: nn.Module, y: Tensor) -> Tensor:
    y.diagonal().add_(1.0)
    return y * 2


def dropout_passes_its_input(module: nn.Module, y: Tensor) -> Tensor:
    z: Tensor = module.get_submodule("drop")(y)
    z.add_(1)
    return y * z


def dropout_alone(module: nn.Module, y: Tensor) -> Tensor:
    z: Tensor = module.get_submodule("drop")(y)
    return z.relu_()


def buffer_written(module: nn.Module, y: Tensor) -> Tensor:
    module.get_buffer("seen").add_(1)
    return y + module.get_buffer("seen")


def mask_written(_: nn.Module, y: Tensor) -> Tensor:
    y[y < 0] = 0.25
    return y


@pytest.mark.parametrize(
    ("edit", "left"),
    [
        (chain, []),
        (reader_before, []),
        (same_name_after, []),
        (dropout_alone, []),
        (mask_written, []),
        (view_written, []),
        (view_read_after, []),
        (slice_written, []),
        (diagonal_written, []),
        (dropout_passes_its_input, ["add_"] if torch.__version__ < "2.14" else []),
        (buffer_written, ["add_"]),
    ],
)
def test_writes_that_nobody_else_sees_become_functional(
    edit: Callable[[nn.Module, Tensor], Tensor], left: list[str]
) -> None:
    graph = check(Net("", lambda: InPlace(edit), lambda _: ExampleInputs((torch.randn(3, 4),))))
    assert [name for name in ops(graph) if name.endswith("_")] == left


class Idle(nn.Module):
    """Reads state that it does not need, and does much that changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        self.drop, self.identity = nn.Dropout(0.0), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        _ = self.unused(x)
        y: Tensor = self.identity(self.drop(self.linear(x.detach())))
        return y[:] * torch.tensor(2.0)


def test_what_does_nothing_is_removed_with_its_state() -> None:
    graph = check(Net("", Idle, tensors((4,))))
    assert ops(graph) == ["detach", "linear", "mul"]  # what the model detaches stays so
    assert {name for name, _ in graph.named_parameters()} == {"linear.weight", "linear.bias"}


def statistics_norm() -> nn.Module:
    return nn.InstanceNorm1d(4, eps=0.01, momentum=0.3, affine=True, track_running_stats=True)


MODAL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dropout": (lambda: nn.Dropout(0.3), (4, 6)),
    "dropout2d": (lambda: nn.Dropout2d(0.4), (4, 6, 2)),
    "alpha_dropout": (lambda: nn.AlphaDropout(0.2), (4, 6)),
    "feature_alpha_dropout": (lambda: nn.FeatureAlphaDropout(0.2), (4, 6)),
    "rrelu": (lambda: nn.RReLU(0.1, 0.9), (4, 6)),
    "batch_norm": (lambda: nn.BatchNorm1d(4, eps=0.01, momentum=0.3), (4, 6)),
    "instance_norm": (statistics_norm, (4, 6)),
}


def modal(name: str) -> Net:
    layer, shape = MODAL[name]
    return Net(name, lambda: nn.Sequential(nn.Sigmoid(), layer()), tensors(shape))


@pytest.mark.parametrize("name", MODAL)
def test_layers_follow_the_mode_of_the_graph(name: str) -> None:
    assert ops(check(modal(name), training=False)) == ops(check(modal(name), training=True))


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_running_statistics_move_as_in_the_model(name: str) -> None:
    net = modal(name)
    model, graph = net.build().train(), net.float_graph().module.train()
    for _ in range(3):
        inputs = net.inputs(5)
        assert distance(call(graph, inputs), call(model, inputs)) < TOLERANCE
    for buffer in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(graph.get_buffer(buffer), model.get_buffer(buffer))


def test_evaluation_after_training_is_deterministic_again() -> None:
    graph = float_graph(nn.Dropout(0.5), inputs := tensors((50,))(2)).module
    assert distance(call(graph.train(), inputs), call(graph, inputs)) > 0.1
    assert distance(call(graph.eval(), inputs), list(inputs.tensors)) == 0.0


class AlwaysOn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=True)


def test_dropout_that_is_always_on_stays_on() -> None:
    graph = float_graph(AlwaysOn(), inputs := tensors((50,))(2)).module.eval()
    assert distance(call(graph, inputs), list(inputs.tensors)) > 0.1


class Shared(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x).relu())
        return y


@pytest.mark.parametrize(
    ("net", "weights"),
    [(NETS["tied"], {"table.weight"}), (Net("", Shared, tensors((4,))), {"a.weight"})],
)
def test_a_tied_weight_is_read_by_one_node(net: Net, weights: set[str]) -> None:
    graph = float_graph(net.build(), net.inputs(2)).module
    reads = [str(n.target) for n in graph.graph.nodes if n.op == "get_attr"]
    assert [name for name in reads if name.endswith("weight")] == list(weights)
    assert {n for n, _ in graph.named_parameters() if n.endswith("weight")} == weights


PASSES: list[Pass] = [MergeState(), Functionalise(), RemoveNoOps(), FoldBatchNorm(), SwitchModes()]


@pytest.mark.parametrize("step", PASSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", ["residual", "mlp", "token_norm", "tied"])
def test_a_pass_changes_nothing_twice(name: str, step: Pass) -> None:
    module = NETS[name].float_graph().module
    before = module.code
    assert not step.run(module).modified
    module.recompile()
    assert module.code == before
