"""Runs the code of Markdown pages as they stand.

A comment on the line before a block changes what happens with it: `<!-- no-run -->` leaves it out,
`<!-- file: NAME -->` writes it to a file, `<!-- requires: MODULE -->` leaves it out where that
package is not installed.
"""

from __future__ import annotations

import linecache
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

_BLOCK = re.compile(
    r"^(?:<!-- (?P<note>[a-z-]+)(?:: (?P<value>\S+))? -->\n\s*)?"
    r"^```(?P<language>python|sh)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of code, the line of its first line of code, and the comment before it."""

    language: str
    code: str
    line: int
    note: str | None
    value: str | None


def blocks_of(markdown: str) -> Iterator[Block]:
    """The Python and shell blocks of a page.

    Raises:
        ValueError: A comment before a block is none of the known ones.
    """
    for match in _BLOCK.finditer(markdown):
        if match["note"] not in (None, "no-run", "file", "requires"):
            raise ValueError(f"unknown comment before a block: {match['note']}")
        line = markdown.count("\n", 0, match.start("code"))
        yield Block(match["language"], match["code"], line, match["note"], match["value"])


def python_code(markdown: str) -> str:
    """The Python blocks that run, each line at its own line number."""
    code = ""
    for block in blocks_of(markdown):
        if block.language == "python" and _runs(block):
            code += "\n" * (block.line - code.count("\n")) + block.code
    return code


def commands(markdown: str) -> list[list[str]]:
    """The words of every `cgmq-fx` line in the shell blocks that run."""
    lines = [
        line
        for block in blocks_of(markdown)
        if block.language == "sh" and _runs(block)
        for line in block.code.replace("\\\n", " ").splitlines()
    ]
    return [shlex.split(line)[1:] for line in lines if line.startswith("cgmq-fx ")]


def _runs(block: Block) -> bool:
    if block.note == "requires":
        return find_spec(block.value or "") is not None
    return block.note is None


def write_files(markdown: str, folder: Path) -> None:
    """Write the blocks that are files."""
    for block in blocks_of(markdown):
        if block.note == "file":
            assert block.value is not None
            (folder / block.value).write_text(block.code)


def run_python(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the Python blocks of a page in one module, in the working directory."""
    code = python_code(page.read_text())
    # A real module whose source can be found, as dataclasses and torch.export expect.
    module = ModuleType(f"blocks_of_{page.stem}".replace("-", "_"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    lines = code.splitlines(keepends=True)
    monkeypatch.setitem(linecache.cache, str(page), (len(code), None, lines, str(page)))
    exec(compile(code, str(page), "exec"), module.__dict__)
