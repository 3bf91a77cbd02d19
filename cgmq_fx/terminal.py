"""Tables as text, as wide as the terminal and never with a number cut off.

Other modules get their tables here: rich takes longer to import than all of the rest that is needed
to quantize, and is imported when there is something to show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from io import StringIO
from shutil import get_terminal_size
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH = 110
"""Columns where there is no terminal to ask."""

_MIN_WIDTH = 80
_MAX_WIDTH = 1000


def columns(without_terminal: int = _WIDTH) -> int:
    """The width to write for, 80 or more."""
    return max(_MIN_WIDTH, get_terminal_size((without_terminal, 24)).columns)


def titled(title: str) -> Table:
    """An empty table under a title, which is taken as it is."""
    from rich.table import Table

    return Table(title=escape(title), title_justify="left")


def escape(text: str) -> str:
    """A cell that shows the text as it is: its brackets are no markup."""
    from rich.markup import escape as escaped

    return escaped(text)


def fitting(build: Callable[[Sequence[str]], Table], details: Sequence[str]) -> Table:
    """The table with as many details as fit into the terminal; with all where there is none.

    Args:
        build: Makes the table, given the details to show.
        details: What a narrow terminal does without, the last first.
    """
    width = columns(_MAX_WIDTH)
    table = build(details)
    for kept in range(len(details) - 1, -1, -1):
        if _needed(table) <= width:
            break
        table = build(details[:kept])
    return table


def text_of(parts: Iterable[Table | str], width: int) -> str:
    """Tables and lines as plain text; a table that needs more than `width` columns gets them."""
    from rich.console import Console
    from rich.table import Table

    buffer = StringIO()
    console = Console(file=buffer, width=width, color_system=None)
    for part in parts:
        if isinstance(part, Table):
            console.width = max(width, _needed(part))
            console.print(part)
            console.width = width
        else:
            console.print(part, markup=False, highlight=False)
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().splitlines())


def note(line: str) -> None:
    """Tell the person who waits something, on standard error."""
    from rich.console import Console

    Console(stderr=True).print(line, highlight=False, markup=False)


def _needed(table: Table) -> int:
    """The columns that a table takes without a number being cut off."""
    from rich.console import Console

    return Console(width=_MAX_WIDTH).measure(table).maximum
