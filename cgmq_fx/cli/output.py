"""Where commands write."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cgmq_fx.cost_models.errors import OptionError
from cgmq_fx.plain import json_text

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
    """Write a result's model, and then its reports.

    Returns:
        The files.

    Raises:
        ArtifactError: If the model cannot be written.
        OptionError: If the model was written, and a report cannot be.
    """
    model, report = result.save(folder / "model.safetensors"), folder / "report.json"
    try:
        try:
            report.write_text(json_text(result.report()))
        except OSError as error:
            raise OptionError(f"{report} cannot be written: {error}") from error
        return [model, report, result.to_html(folder / "report.html")]
    except OptionError as error:
        raise OptionError(f"the model is in {model}, but {error}") from error
