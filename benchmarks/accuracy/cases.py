"""What is measured: a network, its data, its float training, and the bounds it is put under."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import cgmq_fx
from benchmarks.accuracy.vgg7 import VGG7
from benchmarks.cifar10 import Cifar10, load_cifar10, test_batches, train_batches
from benchmarks.lenet5 import LeNet5, accuracy, train_float
from benchmarks.mnist import Batches, Mnist, load_mnist
from benchmarks.resnet20 import ResNet20, load_resnet20

Data = Iterable[tuple[Tensor, Tensor]]

_BATCH = 128


@dataclass(frozen=True)
class Files:
    """What does not ship with the repository.

    Attributes:
        cifar: CIFAR-10 as an npz file of JPEG images.
        resnet20: Weights of a trained ResNet-20.
        out: Folder for the float networks and the results.
        device: Where to train.
    """

    out: Path
    cifar: Path | None = None
    resnet20: Path | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Case:
    """A network under bounds.

    Attributes:
        name: What the command line calls it.
        make: Makes the float network to train, given the files.
        bounds: The budgets.
        baselines: The budgets that other methods are measured under as well.
        float_epochs: Epochs of training, or fine-tuning, in float.
        rate: Peak learning rate of that.
        epochs: Epochs of quantization.
        scheme: How it is quantized.
        data: Of the same network: the case that trains it in float.
    """

    name: str
    make: Callable[[Files], nn.Module]
    bounds: tuple[str, ...]
    baselines: tuple[str, ...]
    float_epochs: int
    rate: float
    epochs: int
    scheme: cgmq_fx.Scheme = field(default_factory=cgmq_fx.Scheme)
    net: str = ""

    def train_data(self, files: Files, seed: int) -> Batches:
        """Shuffled, augmented where that is usual."""
        if self._mnist:
            mnist = _mnist(files.device)
            return Batches(mnist.train_images, mnist.train_labels, _BATCH, shuffle=True, seed=seed)
        return train_batches(_cifar(files.cifar, files.device), _BATCH, seed=seed)

    def test_data(self, files: Files) -> Batches:
        """In order."""
        if self._mnist:
            mnist = _mnist(files.device)
            return Batches(mnist.test_images, mnist.test_labels, 1000)
        return test_batches(_cifar(files.cifar, files.device), 500)

    def float_net(self, files: Files, say: Callable[[str], None]) -> tuple[nn.Module, float]:
        """The float network and its test accuracy, trained at the first call and kept in a file."""
        torch.manual_seed(0)
        model = self.make(files).to(files.device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster here
        path = files.out / f"float-{self.net or self.name}.safetensors"
        record = path.with_suffix(".json")
        if record.exists():
            model.load_state_dict(load_file(path, device=files.device))
            return model.eval(), float(json.loads(record.read_text())["accuracy"])
        before = accuracy(model.eval(), self.test_data(files))
        train_float(model, self.train_data(files, 0), self.float_epochs, max_lr=self.rate)
        found = accuracy(model, self.test_data(files))
        save_file({n: t.contiguous() for n, t in model.state_dict().items()}, path)
        row = {"accuracy": found, "before": before, "epochs": self.float_epochs}
        record.write_text(json.dumps(row))
        say(f"{self.name} in float: {before:.2%} before, {found:.2%} after {self.float_epochs}")
        return model, found

    @property
    def _mnist(self) -> bool:
        return (self.net or self.name).startswith("lenet5")


@cache
def _mnist(device: str) -> Mnist:
    return load_mnist(device)


@cache
def _cifar(path: Path | None, device: str) -> Cifar10:
    if path is None:
        raise SystemExit("this case needs CIFAR-10: --cifar FILE (see benchmarks/cifar10.py)")
    return load_cifar10(path, device)


def _resnet20(files: Files) -> nn.Module:
    if files.resnet20 is None:
        return ResNet20()
    return load_resnet20(files.resnet20)


CASES = {
    case.name: case
    for case in (
        Case(
            "lenet5",
            lambda _: LeNet5(),
            tuple(f"bops <= {p}%" for p in ("0.40", "0.90", "1.40", "2.00", "5.00")),
            tuple(f"bops <= {p}%" for p in ("0.90", "2.00", "5.00")),
            float_epochs=8,
            rate=3e-3,
            epochs=10,
        ),
        Case(
            "lenet5-pruned",
            lambda _: LeNet5(),
            ("bops <= 0.36%", "bops <= 0.20%"),
            (),
            float_epochs=8,
            rate=3e-3,
            epochs=10,
            scheme=cgmq_fx.Scheme(bit_widths=(0, 2, 4, 8, 16, 32), weights="channel"),
            net="lenet5",
        ),
        Case(
            "lenet5-channels",
            lambda _: LeNet5(),
            tuple(f"bops <= {p}%" for p in ("0.40", "0.90", "2.00")),
            (),
            float_epochs=8,
            rate=3e-3,
            epochs=10,
            scheme=cgmq_fx.Scheme(weights="channel", activations="channel"),
            net="lenet5",
        ),
        Case(
            "resnet20",
            _resnet20,
            (
                *(f"bops <= {p}%" for p in ("0.6", "1.0", "1.6", "3.2")),
                "weights <= 96 KiB",
                "bops <= 1.6%, weights <= 96 KiB",
            ),
            ("bops <= 1.6%",),
            float_epochs=5,
            rate=1e-3,
            epochs=10,
        ),
        Case(
            "vgg7",
            lambda _: VGG7(),
            tuple(f"bops <= {p}%" for p in ("0.6", "1.0", "1.6", "3.2")),
            ("bops <= 1.6%",),
            float_epochs=60,
            rate=2e-3,
            epochs=20,
        ),
    )
}
