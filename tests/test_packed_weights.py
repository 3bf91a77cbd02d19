from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cgmq_fx import ArtifactError, load
from cgmq_fx.artifact import _deflate, _inflate
from cgmq_fx.cost_models import parse_budget
from cgmq_fx.packed_weights import _deflated, pack_bits, unpack_bits
from cgmq_fx.recount import count
from tests.deploy_nets import deployed, inputs_of
from tests.nets import call

CASES = [
    *(("lenet5", s) for s in ("w2", "channel")),
    *(("mlp", s) for s in ("both", "element", "w16", "float")),
    ("transformer", "tensor"),
]


@given(
    st.integers(1, 16).flatmap(lambda w: st.tuples(st.just(w), st.lists(st.integers(0, 2**w - 1))))
)
def test_bits_read_back(case: tuple[int, list[int]]) -> None:
    width, codes = case
    packed = pack_bits(np.array(codes, np.int64), width)
    assert packed.size == -(-len(codes) * width // 8)
    assert unpack_bits(packed, len(codes), width).tolist() == codes


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_a_packed_model_computes_the_same_to_the_last_bit(
    name: str, scheme: str, tmp_path: Path
) -> None:
    result, inputs = deployed(name, scheme), inputs_of(name, 5)
    loaded = load(result.export(tmp_path / "net.safetensors", verify=False).path)
    for found, expected in zip(call(loaded.model, inputs), call(result.model, inputs), strict=True):
        assert torch.equal(found, expected)
    assert [s.value for s in loaded.cost.states] == [s.value for s in result.cost.states]


@pytest.mark.parametrize("scheme", ["w2", "w2 tensor", "tensor", "channel", "element"])
def test_a_file_takes_what_the_budget_counts(scheme: str, tmp_path: Path) -> None:
    """LeNet-5: within 5 % of the weight memory that the budget was held to."""
    result = deployed("lenet5", scheme)
    counted = count(result.model, result.inputs, parse_budget("weights <= 100%")).states[0].value
    size = result.export(tmp_path / "net.safetensors", verify=False).path.stat().st_size
    assert abs(size / counted - 1) <= 0.05


def test_a_map_of_widths_takes_what_it_says() -> None:
    """Three widths at random say log2(3) = 1.58 bits per element, which nothing can save."""
    drawn = np.random.default_rng(0).integers(0, 3, 1 << 14)
    assert _deflated(pack_bits(drawn, 2)).size * 8 / drawn.size == pytest.approx(1.585, rel=0.03)
    assert _deflated(pack_bits(drawn * 0, 2)).size < 32


def test_exporting_again_gives_the_same_file(tmp_path: Path) -> None:
    first = deployed("mlp", "both").export(tmp_path / "a.safetensors", verify=False).path
    again = load(first).export(tmp_path / "b.safetensors", verify=False).path
    assert first.read_bytes() == again.read_bytes()


Content = tuple[dict[str, Any], dict[str, Tensor]]


def widened(content: Content) -> None:
    content[0]["packed"]["0.weight"]["shape"] = [1 << 30, 1 << 10]


def cut(content: Content) -> None:
    content[1]["0.weight"] = content[1]["0.weight"][:-1].clone()


def grown(content: Content) -> None:
    content[1]["0.weight"] = torch.cat([content[1]["0.weight"], torch.zeros(9, dtype=torch.uint8)])


def no_bytes(content: Content) -> None:
    content[1]["0.weight"] = content[1]["0.weight"].float()


def elsewhere(content: Content) -> None:
    content[0]["packed"]["0.weight"]["quantizer"] = "cgmq_quantizers.nowhere"


def more_gates(content: Content) -> None:
    content[0]["graph"]["modules"]["cgmq_quantizers.0_weight"]["gate_shape"] = [1 << 20, 1]


def strange_width(content: Content) -> None:
    content[1]["cgmq_quantizers.0_weight.bits"].fill_(255)


def not_deflated(content: Content) -> None:
    content[0]["packed"]["0.weight"]["deflated"].append("0.weight")
    content[1]["0.weight"].fill_(255)


DAMAGE: dict[Callable[[Content], None], str] = {
    widened: "too large for its bytes",
    cut: "fewer bytes",
    grown: "more bytes",
    no_bytes: "no row of bytes",
    elsewhere: "damaged",
    more_gates: "no room for gates",
    strange_width: "is damaged|no room",
    not_deflated: "is damaged",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_damage_is_a_clear_error(damage: Callable[[Content], None], tmp_path: Path) -> None:
    path = deployed("mlp", "both").export(tmp_path / "net.safetensors", verify=False).path
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(_inflate(file.metadata()["cgmq_fx"]))
    damage((header, tensors))
    save_file(tensors, path, {"cgmq_fx": _deflate(json.dumps(header))})
    with pytest.raises(ArtifactError, match=DAMAGE[damage]):
        load(path)


@pytest.mark.parametrize(
    "text", ["deflated:", "deflated:@@@", "deflated:" + "é", _deflate("{}")[:-2]]
)
def test_a_damaged_header_is_refused(text: str, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x", {"cgmq_fx": text})
    with pytest.raises(ArtifactError, match="header"):
        load(tmp_path / "x")


def test_a_header_that_inflates_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cgmq_fx.artifact._MOST_TEXT", 1000)
    save_file({"x": torch.zeros(1)}, tmp_path / "x", {"cgmq_fx": _deflate(" " * 100_000)})
    with pytest.raises(ArtifactError, match="too large"):
        load(tmp_path / "x")
