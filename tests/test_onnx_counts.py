"""ONNX files of nets whose ops torch.onnx writes as several cost what the nets cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cgmq_fx import Result, Scheme, quantize
from cgmq_fx.cost_models.errors import UnsupportedModelError
from cgmq_fx.exporters.certificate import verify
from cgmq_fx.exporters.onnx_reader import read_onnx
from cgmq_fx.graphs import float_graph
from cgmq_fx.passes.capture import ExampleInputs

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def quantized(net: nn.Module, x: torch.Tensor, budget: str, **options: Any) -> Result:
    """The net with random numbers everywhere, so that no tensor is equal to another."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return quantize(net.eval(), budget, example_inputs=x, epochs=0, progress=False, **options)


def assert_counted_alike(result: Result, path: Path) -> None:
    """The file is written, computes the same, and costs the same."""
    certificate = result.export(path).certificate
    assert certificate.from_file
    assert not certificate.unknown
    assert [s.value for s in certificate.states] == [s.value for s in result.cost.states]


@pytest.mark.parametrize("dimensions", [2, 3])
def test_global_pools_of_images_with_channels_last(dimensions: int, tmp_path: Path) -> None:
    conv, pool = [(nn.Conv2d, nn.AdaptiveAvgPool2d), (nn.Conv3d, nn.AdaptiveAvgPool3d)][
        dimensions - 2
    ]
    net = nn.Sequential(conv(3, 8, 3), nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(8, 4))
    x = torch.rand(2, 3, *[6] * dimensions).movedim(1, -1).contiguous().movedim(-1, 1)
    budget = "bops <= 20%, weights <= 90%, activations <= 90%"
    result = quantized(net, x, budget, target="onnxruntime")
    assert_counted_alike(result, tmp_path / "net.onnx")


class Applies(nn.Module):
    """Layers by name, and what is done with them."""

    def __init__(
        self, forward: Callable[[Any, torch.Tensor], torch.Tensor], **layers: nn.Module
    ) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._forward = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward(self, x)


def two_readers(m: Any, x: torch.Tensor) -> Any:
    parts = m.first(x).view(-1, 2, 8)
    return m.left(parts[:, 0]) + m.right(parts[:, 1])


def clamped_twice(m: Any, x: torch.Tensor) -> Any:
    x = m.first(x).view(-1, 2, 8).sum(1)
    return m.left(x.clamp(-1, 1).clamp(max=0.5)) + m.right(x.clamp(-2, 2).clamp(max=0.25))


@pytest.mark.parametrize("forward", [two_readers, clamped_twice])
def test_limits_of_one_tensor_keep_apart(forward: Any, tmp_path: Path) -> None:
    linear = nn.Linear
    net = Applies(forward, first=linear(8, 16), left=linear(8, 4), right=linear(8, 4))
    result = quantized(net, torch.rand(2, 8), "bops <= 25%", scheme=Scheme((16,)))
    assert_counted_alike(result, tmp_path / "net.onnx")


def sampled(m: Any, x: torch.Tensor) -> Any:
    grid = m.first(x).permute(0, 2, 3, 1)
    return m.last(nn.functional.grid_sample(x, grid, align_corners=False))


def joined_first(m: Any, x: torch.Tensor) -> Any:
    wide, narrow = m.first(x).relu(), m.second(x).relu()
    joined = m.third(torch.cat([wide, narrow], 1))
    return joined.mean((2, 3)) + wide.sigmoid().mean((2, 3))


def joined_last(m: Any, x: torch.Tensor) -> Any:
    wide, narrow = m.first(x).relu(), m.second(x).relu()
    means = wide.sigmoid().mean((2, 3))
    return m.third(torch.cat([wide, narrow], 1)).mean((2, 3)) + means


@pytest.mark.parametrize("forward", [joined_first, joined_last])
@pytest.mark.parametrize(("wide", "narrow"), [(8, 2), (4, 4), (2, 8)])
def test_what_is_joined_and_read_in_float_is_kept_once(
    forward: Any, wide: int, narrow: int, tmp_path: Path
) -> None:
    sizes = {"first": (3, wide), "second": (3, narrow), "third": (wide + narrow, wide)}
    layers = {name: nn.Conv2d(*size, 3, padding=1) for name, size in sizes.items()}
    budget = "bops <= 20%, activations <= 100%, arena <= 100%"
    result = quantized(
        Applies(forward, **layers), torch.randn(4, 3, 8, 8), budget, target="onnxruntime"
    )
    assert_counted_alike(result, tmp_path / "net.onnx")


def test_samples_on_a_computed_grid(tmp_path: Path) -> None:
    net = Applies(sampled, first=nn.Conv2d(3, 2, 1), last=nn.Conv2d(3, 4, 1))
    budget = "bops <= 20%, activations <= 90%"
    result = quantized(net, torch.rand(2, 3, 6, 6), budget, target="onnxruntime")
    assert_counted_alike(result, tmp_path / "net.onnx")


def rotated(m: Any, x: torch.Tensor) -> Any:
    steps = torch.arange(x.shape[1]).float()
    angles = torch.outer(steps, 100 ** (torch.arange(0, 8, 2) / -8)).repeat(1, 2)
    x = m.first(x)
    left, right = x.chunk(2, -1)
    turned = torch.cat([-right, left], -1)
    return m.last(x * angles.cos() + turned * angles.sin())


def on_a_mesh(m: Any, x: torch.Tensor) -> Any:
    line = torch.linspace(-1, 1, x.shape[1])
    mesh = torch.stack(torch.meshgrid(line, line, indexing="ij"))[:, :, :4].flatten(1)[:, :8]
    return m.last(m.first(x) + mesh.sum(0))


def added_by_index(m: Any, x: torch.Tensor) -> Any:
    x = m.first(x)
    moved = torch.zeros_like(x).index_add(1, torch.tensor([0, 2, 1]), x[:, :3])
    return m.last(moved * torch.ones(8))


def normed(m: Any, x: torch.Tensor) -> Any:
    x = m.first(x)
    return m.last(nn.functional.normalize(x, dim=-1) + x)


def sorted_and_best(m: Any, x: torch.Tensor) -> Any:
    x = m.first(x)
    return m.last(torch.cat([x.topk(3, -1)[0], x.sort(-1)[0][..., :5]], -1))


def with_a_token(m: Any, x: torch.Tensor) -> Any:
    return m.last(torch.cat([m.first.bias.repeat(x.shape[0], 1, 1), m.first(x)], 1))


TABLES = [rotated, on_a_mesh, added_by_index, normed, sorted_and_best, with_a_token]
ALL = "bops <= 100%, weights <= 100%, activations <= 100%"


@pytest.mark.parametrize("forward", TABLES)
def test_tables_that_are_computed_are_not_kept(forward: Any, tmp_path: Path) -> None:
    net = Applies(forward, first=nn.Linear(4, 8), last=nn.Linear(8, 4))
    assert_counted_alike(quantized(net, torch.rand(2, 5, 4), ALL), tmp_path / "net.onnx")


def in_instances(m: Any, x: torch.Tensor) -> Any:
    return m.last(
        nn.functional.instance_norm(m.first(x)).flatten(2).transpose(1, 2)[..., :2].repeat(1, 1, 4)
    )


def unpooled(m: Any, x: torch.Tensor) -> Any:
    pooled, places = nn.functional.max_pool2d(m.first(x), 2, return_indices=True)
    return m.last(nn.functional.max_unpool2d(pooled, places, (2, 2)).flatten(2)[..., :8])


@pytest.mark.parametrize("forward", [in_instances, unpooled])
def test_parts_of_images_are_counted(forward: Any, tmp_path: Path) -> None:
    net = Applies(forward, first=nn.Conv2d(3, 2, 3), last=nn.Linear(8, 4))
    assert_counted_alike(quantized(net, torch.rand(2, 3, 10, 10), ALL), tmp_path / "net.onnx")


def gated(m: Any, x: torch.Tensor) -> Any:
    return m.last(nn.functional.glu(m.first(x), 1).repeat(1, 2, 1, 1))


def pooled(m: Any, x: torch.Tensor) -> Any:
    return m.last(nn.functional.adaptive_avg_pool2d(m.first(x), (3, 7)))


def shrunk(m: Any, x: torch.Tensor) -> Any:
    return m.last(nn.functional.interpolate(m.first(x), size=(3, 3), mode="area"))


def wrapped(m: Any, x: torch.Tensor) -> Any:
    return m.last(nn.functional.pad(m.first(x), (1, 1, 1, 1), mode="circular"))


def normed_in_groups(m: Any, x: torch.Tensor) -> Any:
    return m.last(nn.functional.group_norm(m.first(x), 2))


def normed_over_the_batch(m: Any, x: torch.Tensor) -> Any:
    return m.last(nn.functional.batch_norm(m.first(x), None, None, training=True))


def spread(m: Any, x: torch.Tensor) -> Any:
    x = nn.functional.silu(m.first(x))
    return m.last(x - x.std(1, keepdim=True) + nn.functional.softsign(x))


def in_patches(m: Any, x: torch.Tensor) -> Any:
    return m.last(nn.functional.unfold(m.first(x), 1).unflatten(2, (8, 8)))


def alike(m: Any, x: torch.Tensor) -> Any:
    x = m.first(x)
    return m.last(x * nn.functional.cosine_similarity(x, x.flip(1), 1).unsqueeze(1))


SEVERAL = [
    *(gated, pooled, shrunk, wrapped, normed_in_groups, normed_over_the_batch),
    *(spread, in_patches, alike),
]


@pytest.mark.parametrize("forward", SEVERAL)
def test_ops_that_are_written_as_several_count_as_one(forward: Any, tmp_path: Path) -> None:
    net = Applies(forward, first=nn.Conv2d(3, 4, 3), last=nn.Conv2d(4, 2, 1))
    assert_counted_alike(quantized(net, torch.rand(2, 3, 10, 10), ALL), tmp_path / "net.onnx")


def chained(m: Any, x: torch.Tensor) -> Any:
    return m.last(m.middle(m.first(x).tile(1, 1, 1, 8)).amax(-1, keepdim=True) * m.scale(x))


@pytest.mark.parametrize("named", ["aten.silu.default", "aten.glu.default", "aten.view.default"])
def test_what_a_file_says_about_its_ops_is_not_believed(named: str, tmp_path: Path) -> None:
    layers = {name: nn.Conv2d(3, 3, 1) for name in ("first", "middle", "last", "scale")}
    result = quantized(Applies(chained, **layers), torch.rand(2, 3, 4, 4), ALL)
    path = result.export(tmp_path / "net.onnx").path
    model = onnx.load(path)
    for node in model.graph.node:
        del node.metadata_props[:]
        node.metadata_props.add(key="cgmq_fx.op", value=f"{named} all")
    onnx.save(model, path)
    found = [s.value for s in read_onnx(path).count(result.budget)[0]]
    assert found == [s.value for s in result.cost.states]


def in_bags(m: Any, x: torch.Tensor) -> Any:
    table = m.first.weight
    return m.last(nn.functional.embedding_bag(x.abs().long().clamp(max=3), table)[:, :4])


def noisy(m: Any, x: torch.Tensor) -> Any:
    x = m.first(x)
    return m.last(x + 0.1 * torch.randn_like(x))


def always_dropped(m: Any, x: torch.Tensor) -> Any:
    return m.last(nn.functional.dropout(m.first(x), 0.5, training=True))


def unevenly_pooled(m: Any, x: torch.Tensor) -> Any:
    return m.last(nn.functional.adaptive_max_pool1d(m.first(x), 3).repeat(1, 4)[:, :4])


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (in_bags, r"execute embedding_bag .*cannot be counted: .* holds a graph of its own"),
        (noisy, r"execute randn_like .*randn_like draws random numbers"),
        (always_dropped, r"execute dropout in evaluation mode, too"),
        (unevenly_pooled, r"execute adaptive_max_pool1d of \[4\] to \[3\], which is uneven"),
    ],
)
def test_what_has_no_file_is_refused_before_training(forward: Any, message: str) -> None:
    net = Applies(forward, first=nn.Linear(4, 4), last=nn.Linear(4, 2))
    with pytest.raises(UnsupportedModelError, match=message):
        quantized(net, torch.rand(3, 4), "bops <= 90%", target="onnxruntime")


def test_dropout_that_training_switches_is_taken(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 2))
    result = quantized(net, torch.rand(3, 4), "bops <= 90%", target="onnxruntime")
    assert_counted_alike(result, tmp_path / "net.onnx")


def compared(m: Any, x: torch.Tensor) -> Any:
    return m.last((m.first(x) - m.first(x.flip(1))).abs()).mean(1)


def test_channels_keep_their_widths_where_values_only_move(tmp_path: Path) -> None:
    net = Applies(compared, first=nn.Linear(8, 8), last=nn.Linear(8, 4))
    scheme = Scheme(activations="channel")
    result = quantized(net, torch.randn(4, 2, 8), "bops <= 3%", scheme=scheme)
    assert_counted_alike(result, tmp_path / "net.onnx")


def twice(m: Any, x: torch.Tensor) -> Any:
    return m.last(m.first(x).relu() + m.first(x).sigmoid())


def again_at_the_end(m: Any, x: torch.Tensor) -> Any:
    narrow = m.last(m.first(x).relu())
    wide = m.third(m.second(narrow).relu())
    return wide + m.last(m.first(x).relu())


@pytest.mark.parametrize("forward", [twice, again_at_the_end])
def test_what_is_computed_twice_is_computed_twice(forward: Any, tmp_path: Path) -> None:
    linear = nn.Linear
    layers = {"first": linear(4, 32), "last": linear(32, 2), "second": linear(2, 32)}
    net = Applies(forward, **layers, third=linear(32, 2))
    result = quantized(net, torch.rand(2, 4), "bops <= 2%, activations <= 40%")
    assert_counted_alike(result, tmp_path / "net.onnx")
    states = verify(tmp_path / "net.onnx").states
    assert [s.reference for s in states] == [s.reference for s in result.cost]


def shifted(m: Any, x: torch.Tensor) -> Any:
    y = m.first(x)
    z = torch.zeros_like(y)
    z[:, :, 1:] = y[:, :, :-1]
    return m.last(y.relu() + z)


def scaled_input(m: Any, x: torch.Tensor) -> Any:
    x = x.clone()
    x[:, 0] = x[:, 0] * 0.458 + 0.1
    return m.last(m.first(x).relu())


def overwritten(m: Any, x: torch.Tensor) -> Any:
    y = m.first(x)
    z = m.last(y)
    y[:, 0] *= 50
    y[:, 1, ::2].zero_()
    y.view(-1, 2, 2, 6)[:, 1].mul_(0.5)
    return m.last(y.relu()) + z


@pytest.mark.parametrize(
    ("forward", "suffix"),
    [(shifted, "onnx"), (scaled_input, "onnx"), (overwritten, "onnx"), (overwritten, "pt2")],
)
def test_what_is_written_into_slices(forward: Any, suffix: str, tmp_path: Path) -> None:
    net = Applies(forward, first=nn.Conv1d(3, 4, 3, padding=1), last=nn.Conv1d(4, 2, 1))
    budget = "bops <= 90%, weights <= 90%, activations <= 99%"
    result = quantized(net, torch.randn(4, 3, 6), budget, target="onnxruntime")
    assert_counted_alike(result, tmp_path / f"net.{suffix}")


def written_over(m: Any, x: torch.Tensor) -> Any:
    return m.last(m.first(x).baddbmm_(x, x, alpha=0.5))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.last(torch.baddbmm(m.first(x), x, x, beta=0.5, alpha=0.1)),
        lambda m, x: m.last(torch.baddbmm(m.first(x), x, x)),
        lambda m, x: m.last(torch.baddbmm(m.first.bias, x, x, alpha=2)),
        lambda m, x: m.last(torch.addmm(m.first.bias, x[:, 0], m.first.weight, alpha=2)),
        written_over,
    ],
    ids=["scaled", "added", "bias", "addmm", "in place"],
)
def test_products_that_are_added_to_something(forward: Any, tmp_path: Path) -> None:
    net = Applies(forward, first=nn.Linear(8, 8), last=nn.Linear(8, 2))
    x, budget = torch.rand(4, 8, 8), "activations <= 99%, weights <= 90%"
    result = quantized(net, x, budget, target="onnxruntime")
    assert_counted_alike(result, tmp_path / "net.onnx")
    states = verify(tmp_path / "net.onnx").states
    assert [s.reference for s in states] == [s.reference for s in result.cost]


@pytest.mark.parametrize("beta", [0, 1, 0.5])
@pytest.mark.parametrize("alpha", [1, 2])
def test_sums_with_products_stay_what_they_are(alpha: float, beta: float) -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = torch.baddbmm(x, x, x, alpha=alpha, beta=beta)
        return m.first(torch.addmv(y[:, 0, 0], y[:, 0], y[0, 0], alpha=alpha, beta=beta)[:, None])

    net, x = Applies(forward, first=nn.Linear(1, 2)), torch.rand(3, 4, 4)
    found = float_graph(net, ExampleInputs((x,))).module(x)
    torch.testing.assert_close(found, net(x))
