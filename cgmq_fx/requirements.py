"""What is installed, looked up before it is loaded: an old PyTorch fails in odd ways."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

OLDEST_TORCH = (2, 11)


def own_version() -> str:
    """The version of this package, or that it is not installed."""
    try:
        return version("cgmq-fx")
    except PackageNotFoundError:
        return "from a checkout"


def check_torch() -> None:
    """Check the version of PyTorch, without loading it.

    Raises:
        ImportError: If it is too old.
    """
    try:
        found = version("torch")
    except PackageNotFoundError:
        return  # a build without metadata, or none: importing it tells
    parts = found.split(".")[:2]
    if all(part.isdigit() for part in parts) and tuple(map(int, parts)) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(
            f"cgmq_fx needs PyTorch {oldest} or newer, and {found} is installed; "
            f"run: python -m pip install 'torch>={oldest}'"
        )
