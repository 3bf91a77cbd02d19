"""The one data set that the command line knows by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import cgmq_fx
from cgmq_fx.cost_models.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import DataLoader

_CHECKOUT = Path(cgmq_fx.__file__).parent.parent / "benchmarks" / "data" / "mnist.npz"
_CACHE = Path.home() / ".cache" / "cgmq_fx"
_BATCH = 128


def mnist() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training and test batches: images of shape (N, 1, 28, 28) from 0 to 1, and labels.

    They come from the file that a checkout of the library has, else from torchvision.

    Raises:
        OptionError: If there is neither.
    """
    from torch.utils.data import DataLoader, TensorDataset

    splits = _from_checkout() if _CHECKOUT.is_file() else _from_torchvision()
    train, test = (TensorDataset(x[:, None].float() / 255, y.long()) for x, y in splits)
    return DataLoader(train, _BATCH, shuffle=True), DataLoader(test, 8 * _BATCH)


def _from_checkout() -> list[tuple[Tensor, Tensor]]:
    import numpy as np
    from torch import from_numpy

    with np.load(_CHECKOUT, allow_pickle=False) as arrays:
        found = {name: from_numpy(arrays[name]) for name in arrays.files}
    return [(found[f"{part}_images"], found[f"{part}_labels"]) for part in ("train", "test")]


def _from_torchvision() -> list[tuple[Tensor, Tensor]]:
    try:
        from torchvision.datasets import MNIST
    except ImportError as error:
        raise OptionError(
            "mnist is part of a checkout of cgmq_fx, or of torchvision, which is not installed: "
            "pip install torchvision, or give --data package.module:loader"
        ) from error
    try:
        parts = [MNIST(_CACHE, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise OptionError(f"MNIST cannot be downloaded to {_CACHE}: {error}") from error
    return [(part.data, part.targets) for part in parts]
