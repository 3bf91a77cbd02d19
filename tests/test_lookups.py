"""What is looked up other than by an embedding: in bags, by indices, by gathering elements."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cgmq_fx
from cgmq_fx.passes.insert import QUANTIZERS
from cgmq_fx.passes.optable import argument
from cgmq_fx.passes.quantizer import Quantizer
from tests.cost_helpers import quantized

ROWS, WIDTH = 200, 8
TOKENS = torch.arange(20).reshape(4, 5)
Look = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Something is looked up, and a layer reads it."""

    def __init__(self, look: Look, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.look = look
        self.bag = nn.EmbeddingBag(ROWS, WIDTH, mode="mean", sparse=sparse)
        self.rows = nn.Parameter(torch.randn(ROWS, WIDTH))
        self.columns = nn.Parameter(torch.randn(WIDTH, ROWS))
        self.cube = nn.Parameter(torch.randn(ROWS, 2, WIDTH))
        self.vector = nn.Parameter(torch.randn(ROWS))
        self.register_buffer("waves", torch.randn(ROWS, WIDTH))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.look(self, tokens)))


def gathered(net: Net, tokens: Tensor) -> Tensor:
    return torch.gather(net.rows, 0, tokens[:, :1].expand(-1, WIDTH))


def weighted(net: Net, tokens: Tensor) -> Tensor:
    weights = (tokens + 1) / 20.0
    return F.embedding_bag(tokens, net.rows, mode="sum", per_sample_weights=weights)


LOOKS: dict[str, Look] = {
    "bag": lambda net, tokens: net.bag(tokens),
    "most": lambda net, tokens: F.embedding_bag(tokens, net.rows, mode="max"),
    "weighted": weighted,
    "index": lambda net, tokens: net.rows[tokens].mean(1),
    "columns": lambda net, tokens: net.columns[:, tokens[:, 0]].t(),
    "cube": lambda net, tokens: net.cube[tokens[:, 0]].sum(1),
    "elements": lambda net, tokens: net.cube[tokens[:, 0], tokens[:, 1] % 2],
    "select": lambda net, tokens: torch.index_select(net.rows, 0, tokens[:, 0]),
    "gather": gathered,
    "vector": lambda net, tokens: net.vector[tokens[:, :1]].expand(-1, WIDTH),
    "twice": lambda net, tokens: net.rows[tokens[:, 0]] + gathered(net, tokens),
}
TABLES = {"bag": "bag_weight", "columns": "columns", "cube": "cube", "elements": "cube"}
PER_ROW = {"bag", "most", "weighted", "index", "cube", "select"}


def quantizers_of(model: nn.Module, **options: Any) -> dict[str, Quantizer]:
    module, _ = quantized(model, TOKENS, cgmq_fx.Scheme(**options))
    found = module.get_submodule(QUANTIZERS).named_children()
    return {name: cast(Quantizer, q) for name, q in found}


def result_of(look: str, budget: str = "weights <= 20%") -> cgmq_fx.Result:
    scheme = cgmq_fx.Scheme(bit_widths=(2, 4, 8), output_bits=8)
    prepared = cgmq_fx.prepare(Net(LOOKS[look]), budget, TOKENS, scheme=scheme)
    prepared.calibrate([TOKENS])
    return prepared.finalize()


@pytest.mark.parametrize("look", LOOKS)
def test_a_table_has_one_gate_and_ranges_where_rows_are_looked_up(look: str) -> None:
    model = Net(LOOKS[look])
    name = TABLES.get(look, "vector" if look == "vector" else "rows")
    spec = quantizers_of(model, weights="channel")[name].spec
    shape = model.get_parameter(name.replace("bag_", "bag.")).shape
    assert spec.gate_shape == ()
    assert spec.range_shape == ((ROWS, *[1] * (len(shape) - 1)) if look in PER_ROW else ())


@pytest.mark.parametrize(
    ("look", "name"),
    [
        (lambda net, tokens: net.waves[tokens].mean(1), "waves"),  # a buffer
        (lambda net, tokens: net.rows[[3, 1, 2, 0]] + tokens[:, :1], "rows"),  # always the same
    ],
)
def test_what_is_no_table_stays_as_it_is(look: Look, name: str) -> None:
    assert name not in quantizers_of(Net(look))


def test_patterns_select_what_is_looked_up() -> None:
    assert "bag_weight" not in quantizers_of(Net(LOOKS["bag"]), skip="EmbeddingBag")
    quantizer = quantizers_of(Net(LOOKS["bag"]), layers={"bag": (2, 5)})["bag_weight"]
    assert quantizer.spec.bit_widths == (2, 5)


def test_readers_of_one_table_agree_on_its_bits() -> None:
    options = {"layers": {"index": (2, 5), "gather": (5, 8)}}
    assert quantizers_of(Net(LOOKS["twice"]), **options)["rows"].spec.bit_widths == (5,)


def test_a_layer_with_the_table_as_its_weight_shares_the_quantizer() -> None:
    def tied(net: Net, tokens: Tensor) -> Tensor:
        return F.linear(net.rows[tokens[:, 0]], net.rows)[:, :WIDTH]

    found = quantizers_of(Net(tied))
    assert found["rows"].spec.range_shape == (ROWS, 1)
    assert not [name for name in found if name.startswith("rows_")]


def test_bags_of_few_bits_are_trained_with_dense_gradients() -> None:
    data = [(TOKENS, TOKENS.sum(1) % 3)] * 4
    net = Net(LOOKS["bag"], sparse=True)
    options: dict[str, Any] = {"loss": F.cross_entropy, "epochs": 1, "progress": False}
    result = cgmq_fx.quantize(net, "weights <= 10%", data, **options)
    assert result.cost.assignment["bag_weight"] == 2
    (bag,) = [n for n in result.model.graph.nodes if "embedding_bag" in str(n.target)]
    assert argument(bag, "sparse") is False
    assert " bag " in str(result)


@pytest.mark.parametrize(
    ("name", "look"),
    [
        *(("onnx", look) for look in ("index", "columns", "elements", "select", "twice")),
        *(("pt2", look) for look in ("bag", "weighted", "index", "twice")),
        *(("qonnx", look) for look in ("cube", "vector")),
        ("onnx-compact", "cube"),
        ("onnx-signed", "select"),
    ],
)
def test_files_hold_what_is_looked_up(look: str, name: str, tmp_path: Path) -> None:
    if name == "qonnx":
        pytest.importorskip("qonnx")
    result = result_of(look, "weights <= 20%, activations <= 100%")
    exported = result.export(tmp_path / f"net.{'pt2' if name == 'pt2' else 'onnx'}", name)
    values = [state.value for state in result.cost.states]
    assert [state.value for state in exported.certificate.states] == values
    table = next(n for n in result.cost.facts.nodes if n.stored and not n.operands).stored[0]
    assert result.cost.assignment[table.quantizer or ""] < 8


@pytest.mark.parametrize("look", ["index", "select"])
def test_onnxruntime_takes_what_is_looked_up_by_indices(look: str) -> None:
    net = Net(LOOKS[look])
    prepared = cgmq_fx.prepare(net, "weights <= 20%", TOKENS, target="onnxruntime")
    assert "rows" in prepared.controller.assignment


def test_what_stays_in_float_is_named_where_it_breaks_a_bound() -> None:
    scheme = cgmq_fx.Scheme(skip="bag")
    message = (
        r"most of it in bag \(100%\).*; bag has no quantizer and stays as it is\. What has no "
        r"quantizer breaks the bound alone: raise it, or make that smaller"
    )
    with pytest.raises(cgmq_fx.InfeasibleBudgetError, match=message):
        cgmq_fx.prepare(Net(LOOKS["bag"]), "weights <= 20%", TOKENS, scheme=scheme)
    # 6400 bytes of 6508 in float, and 6 + 12 bytes of the layer at 2 bits
    with pytest.raises(cgmq_fx.InfeasibleBudgetError, match=r"stays as it is\. Allow smaller"):
        cgmq_fx.prepare(Net(LOOKS["bag"]), "weights <= 6410", TOKENS, scheme=scheme)
