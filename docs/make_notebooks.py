"""Makes the notebooks from the pages that they are the same as: `python docs/make_notebooks.py`."""

import re
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).parent.parent
PAGES = {"tutorial": "docs/tutorial.md", "sweep": "docs/howto/sweep.md"}
_CODE = re.compile(r"^```python\n(.*?)\n```$", re.MULTILINE | re.DOTALL)


def notebook(markdown: str) -> str:
    """A notebook with a cell for every stretch of text and every Python block, without outputs."""
    parts = _CODE.split(re.sub(r"\]\((?!http)[^)]*\)", "]", markdown))
    cells = []
    for index, part in enumerate(parts):
        if part.strip():
            make = new_code_cell if index % 2 else new_markdown_cell
            cells.append(make(part.strip(), id=f"cell-{index}"))
    made = new_notebook(cells=cells)
    made.metadata["language_info"] = {"name": "python"}
    text: str = nbformat.writes(made)
    return f"{text}\n"


def main() -> None:
    """Write all of them."""
    for name, page in PAGES.items():
        path = ROOT / "notebooks" / f"{name}.ipynb"
        path.write_text(notebook((ROOT / page).read_text()))


if __name__ == "__main__":
    main()
