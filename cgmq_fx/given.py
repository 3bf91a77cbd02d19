"""What users give as an option, checked where it enters."""

from __future__ import annotations

from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any

from cgmq_fx.cost_models.errors import OptionError


def whole_number(name: str, given: Any, least: int) -> int:
    """A whole number of at least `least`.

    Raises:
        OptionError: If it is none.
    """
    if not isinstance(given, Integral) or isinstance(given, bool) or given < least:
        raise OptionError(f"{name} must be a whole number, {least} or more, not {given!r}")
    return int(given)


def path_of(taker: str, given: Any) -> Path:
    """A path, as text or as an object.

    Args:
        taker: What takes it, as an error calls it.
        given: What was given.

    Raises:
        OptionError: If it is none.
    """
    if not isinstance(given, str | PathLike):
        raise OptionError(f"{taker} takes a path, not {_shown(given)}")
    return Path(given)


def _shown(given: Any) -> str:
    """A value as an error shows it: what is long by its type."""
    text = repr(given)
    return text if len(text) <= 80 else f"a {type(given).__name__}"
