"""Which dimension of the inputs is the batch: costs are per sample, whatever the example is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import cgmq_fx
from cgmq_fx.graphs import float_graph
from cgmq_fx.passes.inputs import ExampleInputs
from tests.test_artifact import read, write


class Fixed(nn.Module):
    """Insists on a batch of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(144, 5)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.conv(x).reshape(4, -1)))


class OneImage(nn.Module):
    """Takes one image, and makes a batch of it itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.conv(x[None]).flatten(1))[0])


class Mixed(nn.Module):
    """Attention of a sequence of fixed length, without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.rand(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.place
        return (x @ x.T).softmax(-1) @ x


class PerSample(nn.Module):
    """A convolution with a filter for every sample, for a batch of 4 only."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Linear(5, 27)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        filters = self.make(style).reshape(4, 3, 3, 3)
        return nn.functional.conv2d(x.reshape(1, 12, 8, 8), filters, groups=4)


class Scaled(nn.Module):
    """A scale per channel, which has no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = self.inner(x)
        return cast(Tensor, self.head(x if scale is None else x * scale))


class Pooled(nn.Module):
    """Sequences first, and queries that have the batch first: sizes do not agree."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        return cast(Tensor, (self.inner(x) * query).sum(0))


class Placed(nn.Module):
    """Adds what a small network makes of the positions, the same for all samples."""

    def __init__(self, places: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.places = nn.Linear(8, 8), places
        self.outer = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.inner(x) + self.outer(self.places(x)))


def counted(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device).float()[:, None]


def summed(x: Tensor) -> Tensor:
    return torch.ones_like(x[0, :, :1]).cumsum(0)


class Causal(nn.Module):
    """Attention to what was before."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


class TimeFirst(nn.Module):
    """Takes the last step of what has its steps first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.outer(self.inner(x).relu().permute(1, 0, 2)[-1]))


class Heads(nn.Module):
    """Attention that picks queries, keys and values from one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.inner(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        heads = (parts[0] @ parts[1].mT).softmax(-1) @ parts[2]
        return cast(Tensor, self.outer(heads.transpose(1, 2).reshape(x.shape)))


class Centred(nn.Module):
    """Takes away what a small network makes of the mean of all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.mean = nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return cast(Tensor, x - self.mean(x.mean(0)))


class Tabled(nn.Module):
    """Compares with a table that is computed from parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.rand(4, 5))
        self.inner, self.rows = nn.Linear(6, 8), nn.Linear(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.inner(x) @ self.rows(self.table).T)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.GRU(6, 4, batch_first=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.outer(self.inner(x)[0][:, -1]))


class Folded(nn.Module):
    """Takes every step for a sample, and then none."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        steps = self.inner(x.flatten(0, 1)).unflatten(0, (x.shape[0], -1))
        return cast(Tensor, self.outer(steps.mean(1)))


class Pairs(nn.Module):
    """Compares every sample with the one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.inner(x).unflatten(0, (-1, 2)).unbind(1)
        return cast(Tensor, first - second)


class Squeezed(nn.Module):
    """Squeezes whatever has one element: with one sample, the batch as well."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv1d(4, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool1d(self.inner(x), 1).squeeze()
        return cast(Tensor, self.outer(x).softmax(1))


def macs(model: Any, inputs: Any) -> float:
    return cgmq_fx.cost(model, inputs, "macs")["macs"].totals[32]


CONV = 4 * 27 * 36  # outputs of 4 x 6 x 6, each of 27 products
UNROLLED = 16 * (5 * 8 + 4 * 4)  # 4 gates of 4; 8 inputs in 5 steps, 4 states in all but the first


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        pytest.param(nn.Conv2d(3, 4, 3), (3, 8, 8), CONV, id="an image"),
        pytest.param(nn.Conv2d(1, 4, 3), (1, 8, 8), CONV / 3, id="an image of one channel"),
        pytest.param(nn.Conv2d(3, 4, 3), (1, 3, 8, 8), CONV, id="a batch of one image"),
        pytest.param(nn.ConvTranspose1d(3, 2, 2), (3, 5), 3 * 5 * 2 * 2, id="transposed"),
        pytest.param(nn.Linear(8, 4), (8,), 32, id="a vector"),
        pytest.param(nn.Linear(8, 4), (3, 8), 32, id="vectors"),
        pytest.param(nn.Sequential(nn.Flatten(0), nn.Linear(12, 2)), (3, 4), 24, id="flattened"),
        pytest.param(OneImage(), (3, 8, 8), CONV + 144 * 3, id="batched inside"),
        pytest.param(Mixed(), (8, 6), 2 * 8 * 8 * 6, id="attention over dimension 0"),
        pytest.param(nn.LSTM(8, 4), (5, 8), UNROLLED, id="a sequence, unrolled"),
        pytest.param(Fixed(), (4, 3, 8, 8), CONV + 144 * 5, id="a batch that is fixed inside"),
    ],
)
def test_dimension_0_is_the_batch_only_where_the_model_treats_it_as_one(
    model: nn.Module, shape: tuple[int, ...], expected: float
) -> None:
    assert macs(model, torch.rand(shape)) == expected


def test_a_fixed_batch_of_filters_is_a_batch() -> None:
    found = macs(PerSample(), (torch.rand(4, 3, 8, 8), torch.rand(4, 5)))
    assert found == 5 * 27 + 3 * 9 * 36 * 3 // 3  # 27 weights; one filter bank of 3 in, 1 out


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_a_scale_without_a_batch_leaves_costs_per_sample(batch: int) -> None:
    given = {"x": torch.rand(batch, 8), "scale": torch.ones(8)}
    captured = float_graph(Scaled(), ExampleInputs((), given))
    assert captured.dynamic
    assert captured.inputs.batched == (True, False)
    assert macs(Scaled(), given) == 88  # 8 * 8 + 8 * 3
    assert macs(Scaled(), dict(reversed(given.items()))) == 88


@pytest.mark.parametrize("batch", [2, 6, 16])
@pytest.mark.parametrize("places", [counted, summed])
def test_what_is_there_once_for_all_samples_costs_every_sample(
    places: Callable[[Tensor], Tensor], batch: int, tmp_path: Path
) -> None:
    x = torch.rand(batch, 6, 8)
    sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2, max=50)},)
    program = torch.export.export(Placed(places), (x,), dynamic_shapes=sizes)
    whole = 6 * (8 * 8 + 16 + 16 * 8)
    assert macs(program, x) == whole
    result = cgmq_fx.prepare(program, "bops <= 12 kbop", x).finalize()
    assert result.cost.states[0].value <= 12_000
    exported = result.export(tmp_path / "net.pt2")
    assert exported.certificate.states[0].value == result.cost.states[0].value


AS_LARGE = [  # MACs per sample; some other size is 3, some is 4
    pytest.param(TimeFirst(), (4, 6), 4 * 6 * 8 + 8 * 5, id="time first"),
    pytest.param(TimeFirst(), (3, 6), 3 * 6 * 8 + 8 * 5, id="time first, of 3 steps"),
    pytest.param(Heads(), (4, 8), 4 * 8 * 24 + 2 * 2 * 4 * 4 * 4 + 4 * 8 * 8, id="picked heads"),
    pytest.param(Centred(), (6,), 6 * 4 + 4 * 4, id="a mean of all samples"),
    pytest.param(Placed(counted), (4, 8), 4 * 8 * 8, id="places, which are constant"),
    pytest.param(Placed(summed), (3, 8), 3 * (8 * 8 + 16 + 16 * 8), id="places of a sample"),
    pytest.param(Tabled(), (3, 6), 3 * 6 * 8 + 3 * 8 * 4, id="a table"),
    pytest.param(Recurrent(), (4, 6), 4 * 12 * 6 + 4 * 12 * 4 + 4 * 4, id="recurrent"),
    pytest.param(Folded(), (4, 6), 4 * 6 * 8 + 8 * 4, id="steps as samples"),
    pytest.param(Squeezed(), (4, 5), 3 * 8 * 12 + 8 * 3, id="squeezed"),
]


@pytest.mark.parametrize(("model", "shape", "expected"), AS_LARGE)
def test_no_size_is_taken_for_the_batch_because_it_is_as_large(
    model: nn.Module, shape: tuple[int, ...], expected: int
) -> None:
    model.eval()
    every = "bops, macs, weights, activations"
    found = [cgmq_fx.cost(model, torch.rand(n, *shape), every) for n in (1, 2, 3, 4, 5, 8)]
    assert found[0]["macs"].totals[32] == expected
    assert all(costs.rows == found[0].rows for costs in found)


@pytest.mark.parametrize("batch", [4, 6, 8])
def test_samples_that_are_compared_have_their_share(batch: int) -> None:
    assert macs(Pairs(), torch.rand(batch, 6)) == 6 * 4


@pytest.mark.parametrize("suffix", ["safetensors", "pt2", "onnx"])
@pytest.mark.parametrize("model", [TimeFirst(), Centred()])
def test_files_of_a_batch_as_large_as_other_sizes_cost_what_the_result_does(
    model: nn.Module, suffix: str, tmp_path: Path
) -> None:
    x = torch.rand(4, 4, 6)
    bound = "bops <= 30%, activations <= 99%, macs <= 1 Gmac"
    result = cgmq_fx.prepare(model, bound, x).finalize()
    assert result.cost["macs"].value == macs(model, torch.rand(7, 4, 6))
    exported = result.export(tmp_path / f"net.{suffix}")
    again = cgmq_fx.verify(exported.path)
    assert [s.value for s in again.states] == [s.value for s in result.cost.states]


def test_a_file_of_before_that_was_counted_by_sizes_is_refused_in_words(tmp_path: Path) -> None:
    result = cgmq_fx.prepare(TimeFirst(), "bops <= 30%", torch.rand(4, 4, 6)).finalize()
    header, tensors = read(result.save(tmp_path / "new"))
    del header["inputs"]["fixed"]
    old = cgmq_fx.load(write(tmp_path / "old", header, tensors))
    assert old.cost["bops"].value == result.cost["bops"].value
    header["budget"][0]["counted"] *= 0.9
    with pytest.raises(cgmq_fx.CgmqError, match="where a size is that of the batch: quantize"):
        cgmq_fx.load(write(tmp_path / "wrong", header, tensors))


def test_a_mask_is_there_once_for_all_samples() -> None:
    few, many = (
        [
            (t.elements, t.bits)
            for t in cgmq_fx.cost(Causal(), torch.rand(batch, 32, 4), "activations").facts.tensors
        ]
        for batch in (2, 16)
    )
    assert few == many
    assert (32 * 32, 8) in many


def test_a_length_that_is_gone_at_the_end_is_no_batch() -> None:
    assert macs(Pooled(), (torch.rand(7, 4, 6), torch.rand(4, 6))) == 7 * 4 * 36


def test_an_exported_program_of_one_size_has_its_batch_or_none() -> None:
    image, images = torch.rand(3, 8, 8), torch.rand(2, 3, 8, 8)
    for x in (image, images):
        program = torch.export.export(nn.Conv2d(3, 4, 3).eval(), (x,), strict=False)
        assert cgmq_fx.cost(program, x, "macs")["macs"].totals[32] == CONV


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 3, 8, 8)])
def test_a_file_has_the_batch_that_was_found(shape: tuple[int, ...], tmp_path: Path) -> None:
    data = [torch.rand(shape) for _ in range(4)]
    result = cgmq_fx.quantize(nn.Conv2d(3, 4, 3), "macs <= 100%, bops <= 30%", data, progress=False)
    result.save(path := tmp_path / "model.safetensors")
    loaded = cgmq_fx.load(path)
    assert result.cost["macs"].value == loaded.cost["macs"].value == CONV
    assert loaded.inputs.batched == (len(shape) == 4,)


@pytest.mark.parametrize(("scale", "batch"), [((2, 8), 2), ((8,), None)])
def test_a_file_of_before_has_a_batch_if_all_sizes_agree(
    scale: tuple[int, ...], batch: int | None, tmp_path: Path
) -> None:
    data = [{"x": torch.rand(2, 8), "scale": torch.rand(scale)} for _ in range(2)]
    result = cgmq_fx.quantize(Scaled(), "bops <= 30%", data, progress=False)
    header, tensors = read(result.save(tmp_path / "new"))
    del header["inputs"]["batched"]
    del header["budget"][0]["counted"]
    header["budget"][0]["value"] = 1.0  # without a batch, it is twice as much
    assert cgmq_fx.load(write(tmp_path / "old", header, tensors)).inputs.batch == batch
