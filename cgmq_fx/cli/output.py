"""Where commands write."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cgmq_fx.cost_models.errors import OptionError

if TYPE_CHECKING:
    from cgmq_fx.result import Result


@contextmanager
def folder_for_results(folder: Path) -> Iterator[None]:
    """Make a folder that can be written to, before hours of training.

    If what follows fails, a folder that was not there before is gone again, unless it holds
    something.

    Raises:
        OptionError: If that is not possible.
    """
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"the folder {folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OptionError(f"the folder {folder} cannot be written to")
    try:
        yield
    except BaseException:
        if new:
            with suppress(OSError):  # not empty
                folder.rmdir()
        raise


def write_result(result: Result, folder: Path) -> list[Path]:
    """Write a result's model and reports.

    Returns:
        The files.
    """
    model, report = folder / "model.safetensors", folder / "report.json"
    result.save(model)
    report.write_text(json.dumps(result.report(), indent=1))
    return [model, report, result.to_html(folder / "report.html")]
