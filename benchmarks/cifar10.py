"""CIFAR-10 from an archive of JPEG images, with the usual augmentation as tensor operations.

The archive is an npz file with `{train,test}_bytes`, `_offsets` and `_labels`: image i of a split
is `bytes[offsets[i]:offsets[i + 1]]`. It does not ship with the repository: its path is the
caller's.
"""

import io
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.mnist import Batches

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Cifar10:
    """Images as uint8 RGB of shape (N, 3, 32, 32), labels as int64 of shape (N,).

    In the order of the archive, which may be sorted by class: shuffle, also before taking a part.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_cifar10(path: Path, device: torch.device | str = "cpu") -> Cifar10:
    """Decodes the archive at `path`, in seconds on one core, and moves it to `device`."""
    with np.load(path, allow_pickle=False) as arrays:
        return Cifar10(
            train_images=_decode(arrays, "train").to(device),
            train_labels=torch.from_numpy(arrays["train_labels"]).long().to(device),
            test_images=_decode(arrays, "test").to(device),
            test_labels=torch.from_numpy(arrays["test_labels"]).long().to(device),
        )


def _decode(arrays: Mapping[str, npt.NDArray[np.generic]], split: str) -> Tensor:
    content = arrays[f"{split}_bytes"].tobytes()
    offsets = arrays[f"{split}_offsets"].tolist()
    images = np.empty((len(offsets) - 1, 32, 32, 3), dtype=np.uint8)
    for i, (start, end) in enumerate(itertools.pairwise(offsets)):
        with Image.open(io.BytesIO(content[start:end])) as image:
            images[i] = np.asarray(image.convert("RGB"))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def normalise(images: Tensor) -> Tensor:
    """Maps uint8 images (N, 3, H, W) to float32 with about zero mean and unit variance."""
    mean = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(1, 3, 1, 1)
    return (images.float() / 255 - mean) / std


class CropAndFlip:
    """Moves each image by up to `padding` pixels over black and mirrors every second, at random.

    The random numbers come from a generator of its own: the same seed, the same sequence.
    """

    def __init__(self, seed: int = 0, padding: int = 4) -> None:
        self._padding = padding
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, images: Tensor) -> Tensor:
        """Returns an augmented copy of images of shape (N, C, H, W), of the same shape."""
        count, _, height, width = images.shape
        rows = self._shifts(count, images.device) + torch.arange(height, device=images.device)
        columns = self._shifts(count, images.device) + torch.arange(width, device=images.device)
        mirrored = torch.randint(2, (count, 1), generator=self._generator).to(images.device) == 1
        columns = torch.where(mirrored, columns.flip(1), columns)
        padded = F.pad(images, (self._padding,) * 4)
        sample = torch.arange(count, device=images.device).view(-1, 1, 1)
        # Index arrays around the channel axis put it last.
        return padded[sample, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)

    def _shifts(self, count: int, device: torch.device) -> Tensor:
        high = 2 * self._padding + 1
        return torch.randint(high, (count, 1), generator=self._generator).to(device)


def train_batches(data: Cifar10, batch_size: int, seed: int = 0) -> Batches:
    """Returns shuffled, augmented, normalised batches of the training split."""
    augment = CropAndFlip(seed)
    return Batches(
        data.train_images,
        data.train_labels,
        batch_size,
        shuffle=True,
        seed=seed,
        transform=lambda images: normalise(augment(images)),
    )


def test_batches(data: Cifar10, batch_size: int) -> Batches:
    """Returns normalised batches of the test split, in order."""
    return Batches(data.test_images, data.test_labels, batch_size, transform=normalise)
