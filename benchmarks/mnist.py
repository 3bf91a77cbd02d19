"""MNIST as it ships with the repository, and re-iterable batches of tensors."""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATA_FOLDER = Path(__file__).parent / "data"
MNIST_FILE = DATA_FOLDER / "mnist.npz"


@dataclass(frozen=True)
class Mnist:
    """Images as float32 of shape (N, 1, 28, 28) in [0, 1], labels as int64 of shape (N,).

    Without the usual shift to zero mean, on purpose: a non-negative input is quantized unsigned,
    with twice the levels at the same bit-width.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def recorded_checksums() -> dict[str, str]:
    """Returns the checksums of `benchmarks/data/SHA256SUMS` by file name."""
    rows = (line.split() for line in (DATA_FOLDER / "SHA256SUMS").read_text().splitlines())
    return {name: checksum for checksum, name in rows}


def load_mnist(device: torch.device | str = "cpu", path: Path = MNIST_FILE) -> Mnist:
    """Loads MNIST onto `device`.

    Raises:
        ValueError: The file is not the one whose checksum is recorded beside it.
    """
    if sha256(path) != recorded_checksums()[MNIST_FILE.name]:
        raise ValueError(f"{path} is damaged: its SHA-256 differs from the one in SHA256SUMS")
    with np.load(path, allow_pickle=False) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]).to(device) for name in arrays.files}

    def images(name: str) -> Tensor:
        return tensors[name].unsqueeze(1).float().div_(255)

    return Mnist(
        train_images=images("train_images"),
        train_labels=tensors["train_labels"].long(),
        test_images=images("test_images"),
        test_labels=tensors["test_labels"].long(),
    )


class Batches:
    """Batches (images, labels) that can be iterated any number of times.

    With `shuffle`, each iteration draws a new permutation from a generator of its own, so the
    sequence of epochs depends on `seed` alone. The last batch may be smaller.

    Args:
        images: Shape (N, ...).
        labels: Shape (N, ...), on the device of `images`.
        batch_size: Of every batch but the last.
        shuffle: Whether each epoch has an order of its own.
        seed: Of the permutations.
        transform: Applied to the images of each batch, for instance an augmentation.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        *,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images, but {len(labels)} labels")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self._images = images
        self._labels = labels
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._transform = transform
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return math.ceil(len(self._images) / self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in self._order().split(self._batch_size):
            images = self._images[rows]
            yield self._transform(images) if self._transform else images, self._labels[rows]

    def _order(self) -> Tensor:
        count = len(self._images)
        if not self._shuffle:
            return torch.arange(count, device=self._images.device)
        return torch.randperm(count, generator=self._generator).to(self._images.device)
