"""What the words of a command line name."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import mse_loss

from cgmq_fx import InfeasibleBudgetError, OptionError, StoppedError, TrainingError
from cgmq_fx.cli import mnist as mnist_module
from cgmq_fx.cli.common import reported
from cgmq_fx.cli.loading import load_data, load_loss, load_model
from cgmq_fx.cli.output import folder_for_results
from tests.nets import small_classifier

BATCHES = [(torch.zeros(2, 3), torch.zeros(2))]


def pair() -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    return BATCHES, BATCHES[:1]


def broken() -> None:
    raise ValueError("no disk")


def own_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().mean()


HERE = "tests.test_cli_loading"


@pytest.mark.parametrize(
    ("train", "validation", "found"),
    [
        (None, None, (None, None)),
        (f"{HERE}:BATCHES", None, (BATCHES, None)),
        (f"{HERE}:pair", None, (BATCHES, BATCHES[:1])),
        (f"{HERE}:pair", f"{HERE}:BATCHES", (BATCHES, BATCHES)),
        (None, f"{HERE}:BATCHES", (None, BATCHES)),
    ],
)
def test_data(train: str | None, validation: str | None, found: object) -> None:
    module = sys.modules[__name__]
    sys.modules[HERE] = module  # whatever pytest calls it
    assert load_data(train, validation) == found


def test_mnist_of_the_checkout() -> None:
    data = load_data("mnist")
    assert data.train is not None
    images, labels = next(iter(data.train))
    assert (images.shape, images.dtype, labels.dtype) == (
        (128, 1, 28, 28),
        torch.float32,
        torch.int64,
    )
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    assert data.validation is not None


def test_mnist_that_is_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mnist_module, "_CHECKOUT", tmp_path / "none.npz")
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(OptionError, match="part of a checkout"):
        load_data("mnist")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cifar", "neither package.module:loader nor mnist"),
        (f"{HERE}:none", "has no attribute 'none'"),
        (f"{HERE}:broken", r"ValueError: no disk \(test_cli_loading.py, line \d+\)"),
        (f"{HERE}:own_loss", "missing 2 required positional arguments: 'output' and 'target'$"),
        ("not_there:loader", "No module named 'not_there'"),
    ],
)
def test_data_that_cannot_be_had(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(OptionError, match=text):
        load_data(name)


def test_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])
    assert load_loss("teacher") is None
    assert load_loss("mse_loss") is mse_loss
    assert load_loss(f"{HERE}:own_loss") is own_loss
    for name in ("nothing", f"{HERE}:BATCHES"):
        with pytest.raises(OptionError, match="there is no loss"):
            load_loss(name)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_from_a_file(suffix: str, tmp_path: Path) -> None:
    state = {name: torch.ones_like(t) for name, t in small_classifier().state_dict().items()}
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(state, file)
    else:
        save_file(state, file)
    model = load_model("tests.nets:small_classifier", file)
    assert all(bool((t == 1).all()) for t in model.state_dict().values())


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(2)}, file)
    with pytest.raises(OptionError, match=re.escape(f"{file} does not fit tests.nets:small")):
        load_model("tests.nets:small_classifier", file)
    (tmp_path / "net.pt2").touch()
    with pytest.raises(OptionError, match="leave out --state"):
        load_model(str(tmp_path / "net.pt2"), file)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(OptionError, match="cannot be made"),
        folder_for_results(tmp_path / "file" / "folder"),
    ):
        pytest.fail("went on without the folder")


def test_a_folder_is_kept_if_it_was_there_or_holds_something(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for folder in (tmp_path / "old", tmp_path / "used", tmp_path / "new"):

        def write(folder: Path = folder) -> None:
            with folder_for_results(folder):
                if folder.name == "used":
                    (folder / "point.json").touch()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write()
    assert {path.name for path in tmp_path.iterdir()} == {"old", "used"}


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (OptionError("a\n  b"), 2, "error: a b"),
        (InfeasibleBudgetError("x" * 2000), 1, "x ..."),
        (TrainingError("nan"), 3, "error: nan"),
        (StoppedError("at step 3"), 130, "stopped"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_errors_end_in_one_line_and_a_status(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @reported
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        command()
    printed = capsys.readouterr().err
    assert ended.value.code == status
    assert said in printed
    assert printed.count("\n") == 1
    assert len(printed) < 1000
