"""Plots of results and sweeps, with matplotlib, which is optional."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from cgmq_fx.cost_models.errors import OptionError
from cgmq_fx.result import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cgmq_fx.sweep_result import Sweep

_DOTS = 120
_INK = "#1b1f24"
_MARKER = "#010203"
"""Stands for the colour of the page's text until the SVG is put into a page."""


def save_plots(result: Result, folder: Path) -> list[Path]:
    """Write every plot of a result that there is something to draw for, as PNG.

    Args:
        result: What to show.
        folder: Where to; made if it does not exist.

    Returns:
        The files.

    Raises:
        OptionError: If matplotlib is not installed, or the folder cannot be written to.
    """
    drawings = _drawings(result)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"plots cannot be written to {folder}: {error}") from error
    return [_write(draw, folder / f"{name}.png") for name, draw in drawings.items()]


def save_sweep(sweep: Sweep, path: Path) -> Path:
    """Write the plot of a sweep; the ending of the file says in which format.

    Raises:
        OptionError: If matplotlib is not installed, or the file cannot be written.
    """
    from cgmq_fx.plot_layers import sweep_figure

    return _write(lambda: sweep_figure(sweep), path)


def svg_plots(result: Result) -> dict[str, str]:
    """The plots that go into a page, as SVG in the colour of the page's text.

    Raises:
        OptionError: If matplotlib is not installed.
    """
    drawings = _drawings(result)
    drawings.pop("bits")  # the page has a table of them; the profile is for many layers
    return {name: _svg(draw) for name, draw in drawings.items()}


def _drawings(result: Result) -> dict[str, Callable[[], Figure]]:
    try:
        from cgmq_fx import plot_history, plot_layers
    except ImportError as error:
        raise OptionError(
            'plots need matplotlib, which is not installed: pip install "cgmq-fx[plot]"'
        ) from error
    drawings: dict[str, Callable[[], Figure]] = {
        "bits": lambda: plot_layers.bits_figure(result),
        "profile": lambda: plot_layers.profile_figure(result),
        "ranges": lambda: plot_layers.ranges_figure(result),
    }
    if result.history.steps:
        drawings["history"] = lambda: plot_history.history_figure(result)
    if result.history.gates:
        drawings["gates"] = lambda: plot_history.gates_figure(result)
    return drawings


def _write(draw: Callable[[], Figure], path: Path) -> Path:
    try:
        with _ink(_INK):
            draw().savefig(path, dpi=_DOTS)
    except ImportError as error:
        raise OptionError(
            'plots need matplotlib, which is not installed: pip install "cgmq-fx[plot]"'
        ) from error
    except (OSError, ValueError) as error:
        raise OptionError(f"plots cannot be written to {path}: {error}") from error
    return path


def _svg(draw: Callable[[], Figure]) -> str:
    buffer = StringIO()
    with _ink(_MARKER):
        draw().savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(_MARKER, "currentColor")


@contextmanager
def _ink(color: str) -> Iterator[None]:
    """Draw text and lines in a colour, and text as text."""
    from matplotlib import rc_context

    with rc_context(
        {
            "text.color": color,
            "axes.edgecolor": color,
            "axes.labelcolor": color,
            "xtick.color": color,
            "ytick.color": color,
            "svg.fonttype": "none",
            "font.size": 9,
        }
    ):
        yield
