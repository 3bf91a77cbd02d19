import linecache
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

README = Path(__file__).parent.parent / "README.md"
NO_RUN = "<!-- no-run -->"
BLOCK = re.compile(
    r"^(?P<skip><!-- no-run -->\n\s*)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


def runnable_code(markdown: str) -> str:
    """Returns the Python blocks of `markdown`, each line at its own line number.

    Blocks after an HTML comment `<!-- no-run -->` are left out.

    Raises:
        ValueError: No block is left.
    """
    blocks = [match for match in BLOCK.finditer(markdown) if match["skip"] is None]
    if not blocks:
        raise ValueError("no Python block to run")
    code = ""
    for block in blocks:
        first_line = markdown.count("\n", 0, block.start("code"))
        code += "\n" * (first_line - code.count("\n")) + block["code"]
    return code


def test_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = runnable_code(README.read_text())
    monkeypatch.chdir(tmp_path)
    # A real module whose source can be found, as dataclasses and torch.export expect.
    module = ModuleType("readme_blocks")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    lines = code.splitlines(keepends=True)
    monkeypatch.setitem(linecache.cache, str(README), (len(code), None, lines, str(README)))
    exec(compile(code, str(README), "exec"), module.__dict__)


@pytest.mark.parametrize(
    ("markdown", "code"),
    [
        ("```python\nx = 1\n```\n", "\nx = 1\n"),
        ("# a\n```python\nx = 1\n```\nb\n```python\ny = x\n```\n", "\n\nx = 1\n\n\n\ny = x\n"),
        ("```sh\nmake\n```\n```python\nx = 1\n```\n", "\n\n\n\nx = 1\n"),
        (f"{NO_RUN}\n```python\nx\n```\n```python\ny\n```\n", "\n\n\n\n\ny\n"),
        (f"{NO_RUN}\n\n```python\nx\n```\n```python\ny\n```\n", "\n\n\n\n\n\ny\n"),
    ],
)
def test_blocks_keep_their_line_numbers(markdown: str, code: str) -> None:
    assert runnable_code(markdown) == code


@pytest.mark.parametrize(
    "markdown", ["", "text", "```sh\nmake\n```", f"{NO_RUN}\n```python\nx\n```\n"]
)
def test_readme_without_blocks_is_refused(markdown: str) -> None:
    with pytest.raises(ValueError, match="no Python block"):
        runnable_code(markdown)
