"""The code of the README and of the documentation runs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner

import cgmq_fx.api
from cgmq_fx import CgmqError
from cgmq_fx.cli import main
from tests.markdown import blocks_of, commands, python_code, run_python, write_files

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES.remove(ROOT / "docs" / "pypi.md")  # for people who have nothing installed
WITH_CODE = [p for p in PAGES if python_code(p.read_text()) or commands(p.read_text())]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_every_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First the Python blocks, in one module; then the commands, which see what these wrote."""
    if page.name == "tutorial.md":
        pytest.importorskip("onnxscript", reason="the tutorial exports to ONNX")
    if page.name == "loops.md":
        warnings.simplefilter("ignore")  # Lightning and Transformers warn of what is theirs
    monkeypatch.chdir(tmp_path)
    write_files(page.read_text(), tmp_path)
    run_python(page, monkeypatch)
    for words in commands(page.read_text()):
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, (words, result.output)


def test_the_pages_that_are_worth_running_are_found() -> None:
    assert ROOT / "README.md" in WITH_CODE
    assert python_code((ROOT / "docs" / "tutorial.md").read_text())
    assert len(commands((ROOT / "docs" / "howto" / "command-line.md").read_text())) >= 6


@pytest.mark.parametrize(
    ("markdown", "code"),
    [
        ("```python\nx = 1\n```\n", "\nx = 1\n"),
        ("# a\n```python\nx = 1\n```\nb\n```python\ny = x\n```\n", "\n\nx = 1\n\n\n\ny = x\n"),
        ("```sh\nmake\n```\n```python\nx = 1\n```\n", "\n\n\n\nx = 1\n"),
        ("<!-- no-run -->\n```python\nx\n```\n```python\ny\n```\n", "\n\n\n\n\ny\n"),
        ("<!-- no-run -->\n\n```python\nx\n```\n```python\ny\n```\n", "\n\n\n\n\n\ny\n"),
        ("<!-- file: a.py -->\n```python\nx\n```\n```python\ny\n```\n", "\n\n\n\n\ny\n"),
        ("```python\nx\n```\n<!-- requires: not_there -->\n```python\ny\n```\n", "\nx\n"),
        ("text", ""),
    ],
)
def test_blocks_keep_their_line_numbers(markdown: str, code: str) -> None:
    assert python_code(markdown) == code


def test_commands_are_found_over_several_lines() -> None:
    page = '```sh\nmake\ncgmq-fx explain a:b \\\n    --budget "bops <= 1%"\n```\n'
    assert commands(page) == [["explain", "a:b", "--budget", "bops <= 1%"]]
    assert commands(f"<!-- no-run -->\n{page}") == []


def test_an_unknown_comment_before_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown comment"):
        list(blocks_of("<!-- norun -->\n```python\nx\n```\n"))


def test_every_public_name_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    listed = set(re.findall(r"(?:autoclass|autofunction|data):: (\w+)", page))
    errors = {
        name
        for name in cgmq_fx.api.__all__
        if isinstance(found := getattr(cgmq_fx, name), type) and issubclass(found, CgmqError)
    }
    assert listed == set(cgmq_fx.api.__all__) - errors


def test_notebooks_follow_their_pages() -> None:
    pytest.importorskip("nbformat", reason="nbformat is not installed: notebooks not compared")
    from docs.make_notebooks import PAGES as SOURCES
    from docs.make_notebooks import notebook

    for name, page in SOURCES.items():
        made = notebook((ROOT / page).read_text())
        assert (ROOT / "notebooks" / f"{name}.ipynb").read_text() == made, (
            "run python docs/make_notebooks.py"
        )


def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("sphinx") is None:
        pytest.skip("Sphinx is not installed: the documentation was not built")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", tmp_path / "trees", ROOT / "docs", tmp_path / "pages"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
