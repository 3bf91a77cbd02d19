"""What all commands share: how they fail, and how small values are read."""

from __future__ import annotations

import logging
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from shutil import get_terminal_size
from typing import ParamSpec

import click

INFEASIBLE = 1
"""Exit status when a budget is not, or cannot be, met."""

MISUSED = 2
"""Exit status when a command, a model, data or a file was not what is needed."""

FAILED = 3
"""Exit status when training went wrong."""

INTERRUPTED = 130
"""Exit status after Ctrl-C."""

_MOST = 900
_OPTIONS = (
    (r"example_inputs= \(a tensor, [^)]*\) or train_data", "--input or --data"),
    (r"\bexample_inputs=(?!\w)", "--input"),
    (r"\b(target|format|loss)=(?!\w|')", r"--\1"),
    (r"\bjobs=(?=\d)", "--jobs "),
    (r"the scheme's bit_widths;", "--bit-widths;"),
    (r"`explain` shows", "cgmq-fx explain shows"),
)
"""What errors of the library call arguments, and what they are called here."""

_P = ParamSpec("_P")


def reported(command: Callable[_P, None], unreadable: int = MISUSED) -> Callable[_P, None]:
    """Turn an error of the library into one short paragraph and an exit status.

    With the option `quiet`, warnings are not shown.

    Args:
        command: What may fail.
        unreadable: The exit status where a file is not what it should be.
    """

    @wraps(command)
    def run(*args: _P.args, **options: _P.kwargs) -> None:
        from cgmq_fx.cost_models.errors import CgmqError, StoppedError

        try:
            with _without_warnings() if options.get("quiet") else nullcontext():
                command(*args, **options)
        except StoppedError:
            click.echo("stopped", err=True)
            raise SystemExit(INTERRUPTED) from None
        except CgmqError as error:
            text = error.args[0] if error.args else error  # without the hint on `result`
            click.echo(_paragraph(f"error: {_with_options(str(text))}"), err=True)
            raise SystemExit(_status(error, unreadable)) from None
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            raise SystemExit(INTERRUPTED) from None

    return run


@contextmanager
def _without_warnings() -> Iterator[None]:
    """No warnings from here on, logged or not, also in processes that are started."""
    level, filters = logging.root.manager.disable, os.environ.get("PYTHONWARNINGS")
    logging.disable(max(level, logging.WARNING))
    os.environ["PYTHONWARNINGS"] = "ignore"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        del os.environ["PYTHONWARNINGS"]
        if filters is not None:
            os.environ["PYTHONWARNINGS"] = filters


def _status(error: Exception, unreadable: int) -> int:
    from cgmq_fx.cost_models.errors import (
        ArtifactError,
        BoundError,
        InfeasibleBudgetError,
        TrainingError,
    )

    if isinstance(error, ArtifactError):
        return unreadable
    if isinstance(error, InfeasibleBudgetError | BoundError):
        return INFEASIBLE
    return FAILED if isinstance(error, TrainingError) else MISUSED


def _with_options(text: str) -> str:
    for argument, option in _OPTIONS:
        text = re.sub(argument, option, text)
    return text


def _paragraph(text: str) -> str:
    """On one line, or wrapped for the terminal; other people's long messages are cut."""
    text = " ".join(text.split())
    if len(text) > _MOST:
        text = f"{text[:_MOST]} ..."
    if not sys.stderr.isatty():
        return text
    width = get_terminal_size().columns
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def numbers(text: str, separator: str) -> tuple[int, ...]:
    """Whole numbers with a separator between them.

    Raises:
        OptionError: If the text is anything else.
    """
    from cgmq_fx.cost_models.errors import OptionError

    try:
        return tuple(int(part) for part in text.split(separator))
    except ValueError as error:
        raise OptionError(f"{text!r} must be whole numbers with {separator!r} between") from error
