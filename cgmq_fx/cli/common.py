"""What all commands share: how they fail, and how small values are read."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import click

INFEASIBLE = 1
"""Exit status when a budget cannot be met."""

MISUSED = 2
"""Exit status when a command was used wrongly."""

_P = ParamSpec("_P")


def reported(command: Callable[_P, None]) -> Callable[_P, None]:
    """Turn an error of the library into one short paragraph and an exit status."""

    @wraps(command)
    def run(*args: _P.args, **options: _P.kwargs) -> None:
        from cgmq_fx.cost_models.errors import CgmqError, InfeasibleBudgetError

        try:
            command(*args, **options)
        except CgmqError as error:
            click.echo(f"error: {error}", err=True)
            infeasible = isinstance(error, InfeasibleBudgetError)
            raise SystemExit(INFEASIBLE if infeasible else MISUSED) from None

    return run


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
