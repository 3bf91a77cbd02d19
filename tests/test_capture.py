from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from cgmq_fx import CaptureError
from cgmq_fx.graphs import float_graph
from cgmq_fx.passes.capture import ExampleInputs
from tests.nets import NETS, Net, call, distance, ops, small_classifier

TOLERANCE = 1e-5


class HardBatch(nn.Module):
    """Works for one batch size only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(3, 4) + 1


class InPlaceFirst(nn.Module):
    """Writes into its own input."""

    def forward(self, x: Tensor) -> Tensor:
        x -= 1.0
        return x.relu_()


class LeavesTorch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + float(x.detach().numpy().max())


class Uncopyable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kept = iter([1.0])
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class KeepsResult(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.ones(1, requires_grad=True) * 2

    def forward(self, x: Tensor) -> Tensor:
        return x * self.kept


def differs(net: Net, module: nn.Module, batch: int) -> float:
    """How far `module` is from the model of `net` on a batch."""
    inputs = net.inputs(batch)
    return distance(call(module.eval(), inputs), call(net.build().eval(), inputs))


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_the_graph_computes_what_the_model_does_for_any_batch(net: Net) -> None:
    captured = net.float_graph()
    assert captured.dynamic
    assert max(differs(net, captured.module, batch) for batch in (1, 2, 5)) < TOLERANCE


@pytest.mark.parametrize("name", ["cnn", "attention", "keywords", "nested"])
def test_an_example_of_one_row_still_gives_a_dynamic_batch(name: str) -> None:
    captured = NETS[name].float_graph(batch=1)
    assert captured.dynamic
    assert captured.inputs.batch == 2
    assert differs(NETS[name], captured.module, 3) < TOLERANCE


@pytest.mark.parametrize("name", ["keywords", "nested"])
def test_outputs_keep_their_structure(name: str) -> None:
    net, inputs = NETS[name], NETS[name].inputs(2)
    found = net.float_graph().module(*inputs.args, **inputs.kwargs)
    expected = net.build()(*inputs.args, **inputs.kwargs)
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)


class PassesOn(nn.Module):
    """Passes on whatever it is given to a net that reshapes by the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self._rows(*args, **kwargs)

    def _rows(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        rows: Tensor = self.inner(x).view(x.shape[0], 2, 3).sum(1)
        return rows if scale is None else rows * scale


@pytest.mark.parametrize(("positional", "keywords"), [(1, ()), (2, ()), (1, (1,)), (0, (0, 1))])
def test_the_batch_is_free_behind_arguments_of_any_number(
    positional: int, keywords: tuple[int, ...]
) -> None:
    def inputs(batch: int) -> ExampleInputs:
        given = {"x": torch.ones(batch, 4), "scale": torch.ones(batch, 3)}
        named = {name: given[name] for name in [[*given][i] for i in keywords]}
        return ExampleInputs(tuple(given.values())[:positional], named)

    model = PassesOn()
    captured = float_graph(model, inputs(4))
    assert captured.dynamic
    assert not captured.steps
    assert distance(call(captured.module, inputs(3)), call(model, inputs(3))) == 0


def test_a_batch_size_that_the_model_insists_on_is_kept() -> None:
    captured = float_graph(HardBatch(), ExampleInputs((torch.zeros(3, 2, 2),)))
    assert captured.module(torch.zeros(3, 2, 2)).shape == (3, 4)
    assert not captured.dynamic


@pytest.mark.parametrize("name", ["cnn", "mlp", "residual"])
def test_a_model_in_training_mode_is_captured_in_evaluation_mode(name: str) -> None:
    net = NETS[name]
    captured = float_graph(net.build().train(), net.inputs(2))
    assert differs(net, captured.module, 4) < TOLERANCE


def exported(net: Net) -> ExportedProgram:
    inputs = net.inputs(2)
    return torch.export.export(
        net.build().eval(), inputs.args, dynamic_shapes=({0: Dim("batch")},), strict=False
    )


@pytest.mark.parametrize("name", ["cnn", "residual", "mlp"])
def test_an_exported_program_is_taken(name: str) -> None:
    net = NETS[name]
    captured = float_graph(exported(net), net.inputs(2))
    assert captured.dynamic
    assert differs(net, captured.module, 5) < TOLERANCE


@pytest.mark.parametrize("name", ["cnn", "residual", "concat"])
def test_a_traced_graph_module_is_taken(name: str) -> None:
    net = NETS[name]
    traced = torch.fx.symbolic_trace(net.build().eval())
    assert differs(net, float_graph(traced, net.inputs(2)).module, 5) < TOLERANCE


@pytest.mark.parametrize("name", ["cnn", "residual", "tied", "buffers"])
def test_the_users_model_is_not_touched(name: str) -> None:
    net, inputs = NETS[name], NETS[name].inputs(2)
    model, twin = net.build().train(), net.build()
    next(iter(model.children())).eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    flags = [m.training for m in model.modules()]
    graph = float_graph(model, inputs).module
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))
    assert [m.training for m in model.modules()] == flags
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in model.parameters())
    own = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
    assert own.isdisjoint(p.data_ptr() for p in (*graph.parameters(), *graph.buffers()))


def test_example_inputs_are_not_written_to() -> None:
    x = torch.tensor([[3.0, -2.0], [0.5, 4.0]])
    graph = float_graph(InPlaceFirst(), ExampleInputs((x,))).module
    found = graph(given := x.clone())
    assert torch.equal(x, torch.tensor([[3.0, -2.0], [0.5, 4.0]]))
    assert torch.equal(given, x)
    assert torch.equal(found, (x - 1).relu())


def test_the_global_random_state_is_not_used() -> None:
    model, inputs = NETS["mlp"].build(), NETS["mlp"].inputs(2)
    before = torch.get_rng_state()
    float_graph(model, inputs)
    assert torch.equal(torch.get_rng_state(), before)


def test_attention_is_not_hidden_in_one_op() -> None:
    assert ops(NETS["attention"].float_graph().module).count("linear") == 2


def test_the_fast_path_of_transformers_is_left_as_it_was() -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    NETS["attention"].float_graph()
    assert torch.backends.mha.get_fastpath_enabled() is before


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (
            small_classifier,
            (2, 5),
            r"Sequential fails on the example inputs \(\(2, 5\) torch.float32\): "
            r"RuntimeError: .*Pass example_inputs= that it accepts",
        ),
        (
            LeavesTorch,
            (2, 5),
            r"torch.export cannot capture LeavesTorch: .*test_capture.py, line \d+\). "
            r".* is then kept as it is, in float",
        ),
        (
            Uncopyable,
            (2, 5),
            r"Uncopyable cannot be copied .*Delete what cannot be copied from its attributes",
        ),
    ],
)
def test_what_cannot_be_captured_is_said(
    make: Callable[[], nn.Module], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(CaptureError, match=message):
        float_graph(make(), ExampleInputs((torch.randn(shape),)))


def test_results_that_a_module_keeps_are_copied() -> None:
    x = torch.randn(2, 5)
    torch.testing.assert_close(float_graph(KeepsResult(), ExampleInputs((x,))).module(x), 2 * x)


@pytest.mark.parametrize("training", [True, False])
def test_the_graph_is_in_the_mode_of_the_model(training: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5)).train(training)
    x = torch.ones(2, 5)
    graph = float_graph(model, ExampleInputs((x,))).module
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(graph(x), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's own decompositions
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("decomposed", [True, False])
def test_a_program_exported_in_either_mode_is_taken(training: bool, decomposed: bool) -> None:
    if training and decomposed:
        pytest.skip("its batch norm has become one that always uses the batch's statistics")
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5), nn.Dropout(0.5)
    )
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(model.train(training), (x,))
    program = program.run_decompositions() if decomposed else program
    found = float_graph(program, ExampleInputs((x,))).module
    torch.testing.assert_close(found.eval()(x), model.eval()(x), atol=1e-5, rtol=1e-4)
    assert "batch_norm" not in str(found.graph)  # folded
    assert not torch.equal(found.train()(x), found.train()(x)) or decomposed
