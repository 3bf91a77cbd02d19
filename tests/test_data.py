"""Batches in the forms that people have them in, and what is said about forms that cannot be."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import cgmq_fx
from cgmq_fx.data import (
    Signature,
    SyntheticBatches,
    as_inputs,
    batch_count,
    example_inputs_of,
    first_batch,
    split_batch,
)
from cgmq_fx.passes.capture import ExampleInputs
from tests.random_nets import TinyCNN, TwoInputs

X, Y, Z, T = (torch.full((2, 3), float(i)) for i in range(4))
ONE = Signature(1, 1, ("x",))
TWO = Signature(2, 2, ("x", "y"))
OPTIONAL = Signature(1, 2, ("x", "mask"))
MANY = Signature(1, 99, ("inputs",))

# batch, signature, whether a target is needed -> positional, by name, target
Split = tuple[Any, Signature, bool, tuple[Any, ...], dict[str, Any], Any]
FORMS: dict[str, Split] = {
    "tensor": (X, ONE, False, (X,), {}, None),
    "pair": ((X, T), ONE, True, (X,), {}, T),
    "pair, no loss": ((X, T), ONE, False, (X,), {}, T),
    "list": ([X, T], ONE, True, (X,), {}, T),
    "single": ((X,), ONE, False, (X,), {}, None),
    "two inputs": ((X, Y), TWO, False, (X, Y), {}, None),
    "three in a row": ((X, Y, T), TWO, True, (X, Y), {}, T),
    "three in a row, no loss": ((X, Y, T), TWO, False, (X, Y), {}, T),
    "nested": (((X, Y), T), TWO, True, (X, Y), {}, T),
    "list as the one input": (([X, Y], T), ONE, True, ([X, Y],), {}, T),
    "optional left out": ((X, T), OPTIONAL, True, (X,), {}, T),
    "optional given": ((X, Y, T), OPTIONAL, True, (X, Y), {}, T),
    "any number": ((X, Y, Z, T), MANY, True, (X, Y, Z), {}, T),
    "dict": ({"x": X, "y": Y}, TWO, False, (), {"x": X, "y": Y}, None),
    "dict with target": ({"x": X, "label": T}, ONE, True, (), {"x": X}, T),
    "dict with targets": ({"x": X, "a": T, "b": Z}, ONE, True, (), {"x": X}, {"a": T, "b": Z}),
    "dict and target": (({"x": X, "y": Y}, T), TWO, True, (), {"x": X, "y": Y}, T),
    "target of any structure": ((X, {"boxes": T}), ONE, True, (X,), {}, {"boxes": T}),
    "inputs": (ExampleInputs((X,), {"y": Y}), TWO, False, (X,), {"y": Y}, None),
}


@pytest.mark.parametrize(
    ("batch", "signature", "supervised", "args", "kwargs", "target"), FORMS.values(), ids=FORMS
)
def test_forms_of_batches(
    batch: Any,
    signature: Signature,
    supervised: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    target: Any,
) -> None:
    found = split_batch(batch, signature, supervised)
    assert same(found.inputs.args, args)
    assert same(dict(found.inputs.kwargs), kwargs)
    assert same(found.target, target)


def test_arrays_become_tensors() -> None:
    images, labels = np.ones((2, 3), dtype=np.float32), np.arange(2)
    found = split_batch((images, labels), ONE, True)
    assert torch.equal(found.inputs.args[0], torch.ones(2, 3))
    assert torch.equal(found.target, torch.arange(2))


VALUES = np.arange(12, dtype=np.float32).reshape(3, 4)
ARRAYS = {
    "reversed": VALUES[:, ::-1],
    "other order of bytes": VALUES.astype(VALUES.dtype.newbyteorder()),
    "both": VALUES.astype(VALUES.dtype.newbyteorder())[::-1, ::2],
    "packed": np.ones((3, 4), [("value", np.float32), ("flag", np.bool_)])["value"],
    "one number": np.array(3.0, dtype=">f4"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_in_any_order_become_tensors(name: str) -> None:
    (found,) = split_batch(ARRAYS[name], ONE, False).inputs.args
    assert found.dtype == torch.float32
    assert found.tolist() == ARRAYS[name].tolist()


def same(found: Any, expected: Any) -> bool:
    """Whether two structures hold the very same tensors."""
    (left, one), (right, other) = map(torch.utils._pytree.tree_flatten, (found, expected))
    return one == other and [id(x) for x in left] == [id(x) for x in right]


@pytest.mark.parametrize(
    ("batch", "signature", "supervised", "message"),
    [
        ("abc", ONE, False, "cannot read a batch of type str"),
        ((), ONE, False, "cannot read a batch of type tuple"),
        (7, ONE, False, r"of type int; give tensors, \(inputs, target\)"),
        ((X, Y, T), ONE, True, r"3 parts \(\(2, 3\), .*but the model takes 1 to 1 inputs"),
        ((X,), TWO, False, "has 1 parts .* takes 2 to 2 inputs"),
        ({"pixels": X}, ONE, False, r"none of the batch's keys \(pixels\) is a parameter .*\(x\)"),
        (X, ONE, True, r"a loss was given, but the batch \(\(2, 3\)\) has no target"),
        ((X,), ONE, True, "has no target"),
        ({"x": X}, ONE, True, "leave out loss= so that the float model is the teacher"),
        ({"x": X}, ONE, True, "no target, as every key of it is a parameter of the model; make"),
        ((np.array(["a"]), T), ONE, True, "a batch holds an array that is no tensor: can't"),
    ],
)
def test_forms_that_cannot_be_read(
    batch: Any, signature: Signature, supervised: bool, message: str
) -> None:
    with pytest.raises(cgmq_fx.DataError, match=message):
        split_batch(batch, signature, supervised)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (TinyCNN(), Signature(1, 1, ("images",))),
        (TwoInputs(), Signature(2, 2, ("a", "b"))),
        (nn.MultiheadAttention(4, 1), (3, 8)),
        (nn.Sequential(nn.ReLU()), Signature(1, 1, ("input",))),
    ],
)
def test_signature_of_a_model(model: nn.Module, expected: Signature | tuple[int, int]) -> None:
    found = Signature.of(model)
    assert expected in (found, (found.required, found.most))


def once() -> Iterator[Tensor]:
    yield X


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "val_data is empty: it has no batches"),
        (once(), r"val_data can be iterated only once \(it is a generator\).* give a list"),
        (iter([X]), "it is a list_iterator"),
        (7, "val_data must be an iterable of batches, not a int"),
    ],
)
def test_data_that_cannot_be_iterated(data: Any, message: str) -> None:
    with pytest.raises(cgmq_fx.DataError, match=message):
        first_batch(data, "val_data")


class Unsized:
    def __iter__(self) -> Iterator[Tensor]:
        yield from (X, Y, Z)


@pytest.mark.parametrize(("data", "count"), [([X, Y], 2), (Unsized(), 3)])
def test_batches_are_counted(data: Any, count: int) -> None:
    assert batch_count(data) == count
    assert first_batch(data, "data") is X


@pytest.mark.parametrize(
    ("given", "args", "kwargs"),
    [
        (X, (X,), {}),
        ((X, Y), (X, Y), {}),
        ([X, Y], (X, Y), {}),
        ({"x": X}, (), {"x": X}),
        (ExampleInputs((X,)), (X,), {}),
    ],
)
def test_forms_of_example_inputs(given: Any, args: tuple[Any, ...], kwargs: Any) -> None:
    found = as_inputs(given)
    assert same((found.args, dict(found.kwargs)), (args, kwargs))


def test_given_inputs_come_before_data_and_data_before_the_models_own() -> None:
    model = nn.Linear(3, 3)
    model.example_input_array = Z
    assert example_inputs_of(model, X, [(Y, T)], True).args[0] is X
    assert example_inputs_of(model, None, [(Y, T)], True).args[0] is Y
    assert example_inputs_of(model, None, None, False).args[0] is Z


def test_synthetic_batches_are_like_the_example_and_repeat_by_seed() -> None:
    tokens = torch.tensor([[3, 7], [7, 3]])
    inputs = ExampleInputs((torch.zeros(2, 5), tokens), {"scale": 2.0, "flags": tokens > 4})
    first, again = (list(SyntheticBatches(inputs, 1, 4)) for _ in range(2))
    other = next(iter(SyntheticBatches(inputs, 2, 4)))
    assert len(first) == len(SyntheticBatches(inputs, 1, 4)) == 4
    assert all(torch.equal(a.args[0], b.args[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].args[0], first[1].args[0])
    assert not torch.equal(first[0].args[0], other.args[0])
    drawn = torch.stack([batch.args[1] for batch in first])
    assert set(drawn.unique().tolist()) == {3, 7}
    assert drawn.dtype == torch.int64
    assert first[0].kwargs["scale"] == 2.0
    assert first[0].kwargs["flags"].dtype == torch.bool


def images(channels: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.rand(4, channels, 8, 8).to(dtype), torch.arange(4) % 3


GOOD = images()
LATE = [GOOD] * 9  # beyond the batches that ranges are calibrated on
MISFITS: dict[str, tuple[Callable[[], dict[str, Any]], type[cgmq_fx.CgmqError], str]] = {
    "channels of the second batch": (
        lambda: {"train_data": [GOOD, images(2)]},
        cgmq_fx.DataError,
        r"fails on a calibration batch of \(4, 2, 8, 8\)",
    ),
    "channels of the tenth batch": (
        lambda: {"train_data": [*LATE, images(2)]},
        cgmq_fx.DataError,
        r"\(4, 2, 8, 8\) float32 does not fit .* captured with \(4, 1, 8, 8\) float32",
    ),
    "integers for floats": (
        lambda: {"train_data": [*LATE, images(dtype=torch.int64)]},
        cgmq_fx.DataError,
        r"\(4, 1, 8, 8\) int64 does not fit .*kinds of dtypes, any batch size",
    ),
    "double for single precision": (
        lambda: {"train_data": [*LATE, images(dtype=torch.float64)]},
        cgmq_fx.DataError,
        r"the model fails on a batch of \(4, 1, 8, 8\) float64",
    ),
    "dtype of the first batch": (
        lambda: {"train_data": [images(dtype=torch.int64)]},
        cgmq_fx.CaptureError,
        r"example inputs \(\(4, 1, 8, 8\) torch.int64\)",
    ),
    "count": (
        lambda: {"train_data": [GOOD, (*GOOD, T)]},
        cgmq_fx.DataError,
        "3 parts .* takes 1 to 1 inputs",
    ),
    "nan": (
        lambda: {"train_data": [(GOOD[0] * torch.nan, GOOD[1])]},
        cgmq_fx.DataError,
        "all calibration values at images are infinite or not a number",
    ),
    "no batches of validation": (
        lambda: {"train_data": [GOOD], "val_data": []},
        cgmq_fx.DataError,
        "val_data is empty",
    ),
    "validation only once": (
        lambda: {"train_data": [GOOD], "val_data": iter([GOOD])},
        cgmq_fx.DataError,
        "val_data can be iterated only once",
    ),
    "loss without data": (
        lambda: {"train_data": None, "example_inputs": GOOD[0]},
        cgmq_fx.DataError,
        "a loss was given, but no train_data",
    ),
    "loss without gradient": (
        lambda: {"train_data": [GOOD], "loss": lambda output, target: output.detach().sum()},
        cgmq_fx.DataError,
        "has no gradient with respect to the output",
    ),
    "metric raises": (
        lambda: {"train_data": [GOOD], "val_data": [GOOD], "metric": lambda output, target: 1 / 0},
        cgmq_fx.DataError,
        r"metric\(output, target\) failed: ZeroDivisionError.*output is \(4, 3\) float32",
    ),
    "metric is a vector": (
        lambda: {"train_data": [GOOD], "val_data": [GOOD], "metric": lambda output, target: output},
        cgmq_fx.DataError,
        r"metric\(output, target\) must return one number, not \(4, 3\)",
    ),
}


@pytest.mark.parametrize(("options", "kind", "message"), MISFITS.values(), ids=MISFITS)
def test_data_that_does_not_fit(
    options: Callable[[], dict[str, Any]], kind: type[cgmq_fx.CgmqError], message: str
) -> None:
    given: dict[str, Any] = {"loss": cross_entropy, "epochs": 1, "progress": False} | options()
    with pytest.raises(kind, match=f"(?s){message}"):
        cgmq_fx.quantize(TinyCNN(), "bops <= 5%", **given)


def test_what_is_no_model_is_said() -> None:
    with pytest.raises(cgmq_fx.DataError, match=r"must be a torch\.nn\.Module .* not int"):
        cgmq_fx.prepare(7, "bops <= 5%", X)  # type: ignore[arg-type]


class Sides(nn.Module):
    """Two inputs of other shapes, and a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, left: Tensor, right: Tensor, more: dict[str, Tensor]) -> Tensor:
        found: Tensor = self.left(left) + self.right(right) * more["a"] + more["b"]
        return found


ORDERS = {
    "forward": ("left", "right", "more", "y"),
    "backward": ("y", "more", "right", "left"),
    "mixed": ("right", "y", "left", "more"),
}


def sides(order: str) -> Any:
    """A batch in that order."""
    generator = torch.Generator().manual_seed(0)
    keys = ("b", "a") if order == "backward" else ("a", "b")
    more = {"a": torch.rand(4, 4, generator=generator), "b": torch.rand(4, 1, generator=generator)}
    given: dict[str, Any] = {
        "left": torch.rand(4, 3, generator=generator),
        "right": torch.rand(4, 2, generator=generator),
        "more": {key: more[key] for key in keys},
        "y": torch.tensor([0, 1, 2, 3]),
    }
    return {key: given[key] for key in ORDERS[order]}


def validated(train: str, val: str) -> Any:
    """What training in one form, and validation in another, ends with."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"val_data": [sides(val)], "epochs": 1, "progress": False}
    return cgmq_fx.quantize(
        Sides(), "bops <= 50%", [sides(train)] * 2, loss=cross_entropy, **options
    ).metrics


@pytest.mark.parametrize("train", ["forward", "backward"])
def test_batches_of_dicts_are_read_by_name(train: str) -> None:
    expected = validated(train, train)
    assert all(validated(train, order) == expected for order in ORDERS)


class TwoSides(nn.Module):
    """Two inputs of other shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        found: Tensor = self.left(left) + self.right(right)
        return found


def test_a_model_that_is_trained_by_position_is_called_by_name() -> None:
    left, right, y = torch.rand(4, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 3])
    by_name = [{"y": y, "right": right, "left": left}]
    options: dict[str, Any] = {"val_data": by_name, "epochs": 1, "progress": False}
    result = cgmq_fx.quantize(
        TwoSides(), "bops <= 50%", [(left, right, y)] * 2, loss=cross_entropy, **options
    )
    output = result.model(left, right).detach()
    assert result.metrics["loss"] == pytest.approx(float(cross_entropy(output, y)))
    found = cgmq_fx.simulate(result, {"right": right, "left": left})
    assert torch.equal(found.outputs[0], cgmq_fx.simulate(result, (left, right)).outputs[0])


def test_what_is_called_by_position_and_by_name_is_read_by_name() -> None:
    form = ExampleInputs((X,), {"scale": Y})
    batch = split_batch({"t": T, "scale": Y, "x": X}, Signature.like(form, ("x", "scale")), True)
    assert batch.inputs.args == (X,)
    assert list(batch.inputs.kwargs) == ["scale"]
    assert batch.target is T
