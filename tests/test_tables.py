"""Tables that are looked up: quantized like weights, within the bounds of weight memory."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import cgmq_fx
from cgmq_fx.passes.insert import QUANTIZERS
from cgmq_fx.passes.optable import argument
from cgmq_fx.passes.quantizer import Quantizer
from tests.cost_helpers import quantized

WORDS, WIDTH = 300, 8
TOKENS = torch.arange(24).reshape(4, 6) * 12
DATA = [(TOKENS, TOKENS.sum(1) % 5)] * 8


class Words(nn.Module):
    """The mean of the rows of a table, then a layer; almost all of its weights are the table."""

    def __init__(self, sparse: bool = False, max_norm: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(WORDS, WIDTH, padding_idx=0, sparse=sparse, max_norm=max_norm)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.table(tokens).mean(1)))


class Twice(nn.Module):
    """Two embeddings with one table."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Embedding(WORDS, WIDTH), nn.Embedding(WORDS, WIDTH)
        self.right.weight = self.left.weight
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.head((self.left(tokens) - self.right(tokens + 1)).mean(1)))


def table_of(model: nn.Module, scheme: cgmq_fx.Scheme | None = None) -> list[Quantizer]:
    module, _ = quantized(model, TOKENS, scheme or cgmq_fx.Scheme())
    found = module.get_submodule(QUANTIZERS).named_children()
    return [cast(Quantizer, q) for name, q in found if name in ("table_weight", "left_weight")]


def words_in_few_bits(ranges: Any) -> cgmq_fx.Result:
    """For runtimes that keep bytes: a table of fewer than 8 bits, all else of at most 8."""
    scheme = cgmq_fx.Scheme(bit_widths=(2, 4, 8), output_bits=8, weight_ranges=ranges)
    prepared = cgmq_fx.prepare(Words(), "weights <= 20%", TOKENS, scheme=scheme)
    prepared.calibrate(DATA)
    result = prepared.finalize()
    assert result.cost.assignment["table_weight"] < 8
    return result


def test_a_table_has_one_gate_and_a_range_for_every_row() -> None:
    (table,) = table_of(Words())
    assert (table.spec.gate_shape, table.spec.range_shape) == ((), (WORDS, 1))
    (whole,) = table_of(Words(), cgmq_fx.Scheme(weight_ranges="tensor", weights="channel"))
    assert (whole.spec.gate_shape, whole.spec.range_shape) == ((), ())


def test_a_table_of_two_has_one_quantizer() -> None:
    assert len(table_of(Twice())) == 1


def test_patterns_select_tables() -> None:
    assert not table_of(Words(), cgmq_fx.Scheme(skip="table"))
    assert not table_of(Words(), cgmq_fx.Scheme(skip="Embedding"))
    (table,) = table_of(Words(), cgmq_fx.Scheme(layers={"table": (2, 5)}))
    assert table.spec.bit_widths == (2, 5)


def test_a_table_that_the_model_writes_into_stays_as_it_is() -> None:
    assert not table_of(Words(max_norm=1.0))


@pytest.mark.parametrize("sparse", [False, True])
def test_bounds_on_memory_hold_for_tables(sparse: bool, tmp_path: Path) -> None:
    result = cgmq_fx.quantize(
        Words(sparse), "weights <= 10%", DATA, loss=cross_entropy, epochs=2, progress=False
    )
    assert result.cost.satisfied
    assert result.cost.assignment["table_weight"] == 2
    table = next(n for n in result.cost.nodes if n.module == "table")
    assert table.stored[0].quantizer == "table_weight"
    lookup = next(n for n in result.model.graph.nodes if n.name == table.name)
    assert argument(lookup, "padding_idx", -1) == 0
    for name in ("net.onnx", "net.pt2", "net.safetensors"):
        certificate = result.export(tmp_path / name).certificate
        assert certificate.satisfied
        assert cgmq_fx.verify(tmp_path / name, "weights <= 10%").satisfied
        assert certificate.states[0].value == result.cost.states[0].value


def test_the_gradient_of_a_table_is_dense() -> None:
    prepared = cgmq_fx.prepare(Words(sparse=True), "weights <= 20%", TOKENS, search_steps=4)
    prepared.calibrate(DATA)
    prepared.model(TOKENS).square().sum().backward()
    gradients = [p.grad for p in prepared.model.parameters() if p.shape == (WORDS, WIDTH)]
    assert len(gradients) == 1
    assert gradients[0] is not None
    assert not gradients[0].is_sparse


def test_reports_show_tables_with_their_share() -> None:
    result = cgmq_fx.prepare(Words(), "weights <= 10%", TOKENS).finalize()
    row = next(line for line in str(result).splitlines() if " table " in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[:2] == ["table", "embedding"]
    assert cells[-1].endswith("%")
    assert float(cells[-1].rstrip("%")) > 70
    frame = {node["module"]: node for node in result.report()["nodes"]}
    assert frame["table"]["weight_bits"] == 2
    assert frame["table"]["activation_bits"] is None
    assert "embedding" in result._repr_html_()


@pytest.mark.parametrize("ranges", ["channel", "tensor"])
@pytest.mark.parametrize("name", ["onnx", "onnx-compact", "onnx-signed", "qonnx", "pt2"])
def test_files_of_every_format_hold_tables(name: str, ranges: Any, tmp_path: Path) -> None:
    if name == "qonnx":
        pytest.importorskip("qonnx")
    result = words_in_few_bits(ranges)
    exported = result.export(tmp_path / f"net.{'pt2' if name == 'pt2' else 'onnx'}", name)
    assert exported.certificate.states[0].value == result.cost.states[0].value
