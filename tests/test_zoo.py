"""Models of other packages through every stage, where those packages are installed.

`benchmarks/zoo.py` does the same for any number of models.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import cgmq_fx
from cgmq_fx.graphs import float_graph
from cgmq_fx.passes.inputs import ExampleInputs

pytestmark = pytest.mark.filterwarnings("ignore")

_LIBRARIES: list[torch.library.Library] = []
Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def image(size: int, batch: int = 2) -> tuple[Tensor]:
    return (torch.randn(batch, 3, size, size),)


def torchvision() -> Any:
    """The package; next to a CPU build of torch its own operators are missing, models are not."""
    if find_spec("torchvision") is None:
        pytest.skip("could not find torchvision")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _LIBRARIES.append(library)
    return import_module("torchvision")


def vision(name: str, size: int, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        return (
            torchvision().models.get_model(name, weights=None, num_classes=5, **options),
            image(size),
            {},
        )

    return make


def timm(name: str, size: int, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        torchvision()
        package = pytest.importorskip("timm")
        return package.create_model(name, num_classes=5, **options), image(size), {}

    return make


def transformer(model: str, config: str, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        torchvision()
        package = pytest.importorskip("transformers")
        made = getattr(package, model)(getattr(package, config)(**options))
        return made, (), {"input_ids": torch.randint(64, (2, 8)), "use_cache": False}

    return make


def encoder() -> Made:
    torchvision()
    package = pytest.importorskip("transformers")
    config = package.BertConfig(**TEXT, intermediate_size=64)
    ids = torch.randint(64, (2, 8))
    return package.BertModel(config), (), {"input_ids": ids, "attention_mask": ids > 5}


def unet() -> Made:
    torchvision()
    package = pytest.importorskip("segmentation_models_pytorch")
    return package.Unet("resnet18", encoder_weights=None, classes=3), image(64), {}


def graph_net() -> Made:
    package = pytest.importorskip("torch_geometric.nn")
    edges = torch.randint(10, (2, 30))
    return package.GCN(8, 16, 2, 4), (torch.randn(10, 8), edges), {}


ZOO: dict[str, Callable[[], Made]] = {
    "resnet18": vision("resnet18", 64),
    "mobilenet_v3_small": vision("mobilenet_v3_small", 64),
    "shufflenet_v2": vision("shufflenet_v2_x0_5", 64),
    "squeezenet": vision("squeezenet1_1", 64),
    "googlenet": vision("googlenet", 96, aux_logits=False, init_weights=False),
    "vit": timm("vit_tiny_patch16_224", 64, img_size=64, depth=2),
    "mixer": timm("mixer_s32_224", 64, img_size=64),
    "convnext": timm("convnext_atto", 64, depths=(1, 1, 1, 1)),
    "bert": encoder,
    "gpt2": transformer(
        "GPT2LMHeadModel", "GPT2Config", vocab_size=64, n_embd=32, n_layer=2, n_head=2
    ),
    "llama": transformer(
        "LlamaForCausalLM", "LlamaConfig", **TEXT, num_key_value_heads=1, intermediate_size=64
    ),
    "unet": unet,
    "gcn": graph_net,
}


def floats(value: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(value)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


@pytest.mark.parametrize("make", ZOO.values(), ids=ZOO)
def test_models_of_other_packages(make: Callable[[], Made], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, args, kwargs = make()
    model.eval()
    with torch.no_grad():
        graph = float_graph(model, ExampleInputs(args, kwargs)).module
        pairs = zip(floats(graph(*args, **kwargs)), floats(model(*args, **kwargs)), strict=True)
        assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-3) for a, b in pairs)
    prepared = cgmq_fx.prepare(model, "bops <= 25%", ExampleInputs(args, kwargs))
    quantized = [
        n.macs for n in prepared.facts.nodes if n.operands and all(o.quantizer for o in n.operands)
    ]
    assert sum(quantized) >= 0.95 * prepared.facts.macs > 0
    optimizer = torch.optim.Adam(prepared.model.parameters(), lr=1e-4)
    losses = []
    for _ in range(4):
        torch.manual_seed(1)  # the same dropout in every step
        loss = sum((x - 1).square().mean() for x in floats(prepared.model(*args, **kwargs)))
        assert isinstance(loss, Tensor)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        prepared.step()
    assert losses[-1] < losses[0]
    result = prepared.finalize()
    assert result.cost.satisfied
    loaded = cgmq_fx.load(result.save(tmp_path / "model.safetensors"))
    with torch.no_grad():
        pairs = zip(
            floats(loaded.model(*args, **kwargs)),
            floats(result.model(*args, **kwargs)),
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in pairs)
