"""The page of a result: complete, self-contained, safe, and alive in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cgmq_fx
from cgmq_fx import OptionError, Result
from cgmq_fx.drawing import draw
from cgmq_fx.exporters.agreement import Agreement
from cgmq_fx.exporters.certificate import Certificate
from cgmq_fx.history import EpochRecord, GateRecord, History, StepRecord
from cgmq_fx.html import page
from cgmq_fx.palette import PRUNED, STOPS, color_of
from tests.nets import NETS

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def result_of(name: str) -> Result:
    net = NETS[name]
    return cgmq_fx.prepare(net.build(), "bops <= 20%, weights <= 90%", net.inputs(2)).finalize()


@pytest.fixture(scope="module")
def residual() -> Result:
    result = result_of("residual")
    steps = [StepRecord(i, 8, "search" if i < 4 else "tune", (2 - i / 5, 1.0)) for i in range(8)]
    epochs = [EpochRecord(e, "tune", 1.0, {"accuracy": 0.5}, (0.9, 0.8), True) for e in (1, 2)]
    names = tuple(result.cost.facts.quantizers)
    gates = [GateRecord(i, (3.0 - i / 2,) * len(names), (8.0,) * len(names)) for i in range(3)]
    result.history = History(steps, epochs, gates, names)
    result.metrics = {"accuracy": 0.5}
    return result


class Tags(HTMLParser):
    """Collects the tags, and checks that they close in order."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", ["residual", "attention", "tied", "concat", "keywords"])
def test_the_page_is_whole_and_refers_to_nothing_outside(name: str, tmp_path: Path) -> None:
    result = result_of(name)
    text = result.to_html(tmp_path / "report.html").read_text()
    tags = Tags(text)
    assert tags.open == []
    assert all(link.startswith(("#", "data:")) for link in tags.links)
    assert "@import" not in text
    assert "url(http" not in text


def test_every_layer_constraint_and_plot_is_there(residual: Result) -> None:
    text = page(residual)
    table = text.partition("<h2>Layers</h2>")[2].partition("</table>")[0]
    layers = [n.module or n.name for n in residual.cost.nodes if n.operands]
    assert re.findall(r'<td data-value="\d+">([^<]*)</td><td class="left"', table) == layers
    for state in residual.cost.states:
        assert str(state).replace("<", "&lt;") in text
    assert text.count("<svg") == 1 + 4
    assert "matplotlib" not in text.partition("</script>")[0].partition("<h2>Plots")[2][:200]


def test_without_matplotlib_the_page_says_so(
    residual: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.startswith("cgmq_fx.plot_")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(cgmq_fx, name.rpartition(".")[2])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = page(residual)
    assert "Plots need matplotlib" in text
    assert text.count("<svg") == 1


class Hostile(nn.Module):
    """A layer whose name is markup."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("<script>alert(1)</script>", nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        layer: nn.Module = next(self.children())
        y: Tensor = layer(x)
        return y


def test_names_are_text_and_never_markup() -> None:
    result = cgmq_fx.prepare(Hostile(), "bops <= 20%", torch.rand(2, 3)).finalize()
    for text in (page(result), result._repr_html_()):
        assert "<script>alert" not in text
        assert "&lt;script&gt;alert" in text


def test_a_notebook_shows_the_constraints_and_the_table(residual: Result) -> None:
    text = residual._repr_html_()
    assert Tags(text).open == []
    assert "@scope (.cgmq-fx)" in text
    assert all(state.constraint.name in text for state in residual.cost.states)


def test_certificates_of_exported_files_are_shown(residual: Result) -> None:
    agreement = Agreement(exact=1.0, within=1.0, largest=0.0, argmax=1.0, values=10)
    states = residual.cost.states
    one = Certificate("net.onnx", "onnx", "ab" * 32, 1234, states, (), True, agreement)
    text = page(residual, [one])
    assert "Exported files" in text
    assert "net.onnx" in text
    assert "1,234" in text
    assert str(agreement).splitlines()[0] in text
    assert "Exported files" not in page(residual)


def test_a_file_that_cannot_be_written_is_said(residual: Result, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be written"):
        residual.to_html(tmp_path)


def test_layers_as_a_data_frame(residual: Result) -> None:
    pytest.importorskip("pandas")
    frame = residual.to_dataframe()
    nodes = [n for n in residual.cost.nodes if n.operands]
    assert list(frame["name"]) == [n.name for n in nodes]
    assert list(frame["macs"]) == [n.macs for n in nodes]
    assert frame["bops <= 20%"].sum() == pytest.approx(residual.cost["bops"].value)


@pytest.mark.parametrize("name", ["residual", "attention", "concat", "keywords", "tied"])
def test_every_layer_is_drawn_once_inside_the_picture(name: str) -> None:
    result = result_of(name)
    drawing = draw(result)
    layers = [n.name for n in drawing.nodes if n.kind == "layer"]
    assert sorted(layers) == sorted(n.name for n in result.cost.nodes if n.operands)
    assert all(0 < n.x < drawing.width and 0 < n.y < drawing.height for n in drawing.nodes)
    assert len({(n.x, n.y) for n in drawing.nodes}) == len(drawing.nodes)


def chain(length: int) -> Result:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(length)))
    return cgmq_fx.prepare(net, "bops <= 50%", torch.rand(2, 4)).finalize()


@pytest.mark.parametrize(("length", "lines"), [(3, 1), (60, 3)])
def test_long_networks_wrap_like_text(length: int, lines: int) -> None:
    drawing = draw(chain(length))
    assert len({node.y for node in drawing.nodes}) == lines
    assert drawing.width < 1300
    rows = {y: [n.x for n in drawing.nodes if n.y == y] for y in {n.y for n in drawing.nodes}}
    assert all(a < b for xs in rows.values() for a, b in pairwise(xs))
    joined = [path for path in drawing.edges if "C" in path]
    assert len(joined) == length + 1 - (lines - 1)


def test_circles_grow_with_the_cost() -> None:
    drawing = draw(result_of("residual"))
    radius = {n.name: n.radius for n in drawing.nodes if n.kind == "layer"}
    costs = {n.name: c for n, c in zip(*costs_of(), strict=True)}
    assert max(radius, key=lambda n: radius[n]) == max(radius, key=lambda n: costs[n])


def costs_of() -> tuple[tuple[cgmq_fx.NodeFacts, ...], tuple[float, ...]]:
    result = result_of("residual")
    return result.cost.nodes, result.cost.per_node[0]


@pytest.mark.parametrize(
    ("bits", "color"),
    [*STOPS.items(), (0, PRUNED), (1, STOPS[2]), (64, STOPS[32]), (None, "none")],
)
def test_colours_of_bits(bits: float | None, color: str) -> None:
    assert color_of(bits) == color


def test_colours_between_are_mixed_on_a_logarithmic_scale() -> None:
    low, middle, high = (int(color_of(b)[1:3], 16) for b in (8, 8 * 2**0.5, 16))
    assert middle == pytest.approx((low + high) / 2, abs=1)


PROBE = """
<script>
  const state = () => document.querySelector(".graph svg").getAttribute("viewBox");
  const first = () => document.querySelector("tbody tr td").textContent;
  const seen = [state(), first()];
  document.querySelector(".graph button").click();
  document.querySelectorAll("thead th button")[7].click();
  document.title = JSON.stringify([...seen, state(), first()]);
</script>
"""


@pytest.fixture
def browser(tmp_path: Path) -> list[str]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: the page was not opened in a browser")
    return [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]


def test_in_a_browser_it_zooms_and_sorts(
    residual: Result, browser: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "page.html"
    file.write_text(page(residual).replace("</body>", f"{PROBE}</body>"))
    done = subprocess.run(
        [*browser, file.as_uri()], capture_output=True, text=True, check=True, timeout=60
    )
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title is not None
    view, first, zoomed, top = json.loads(unescape(title[1]))
    assert float(zoomed.split()[2]) == pytest.approx(0.7 * float(view.split()[2]), rel=1e-6)
    assert first == "stem"
    assert top == "a"  # the most MACs
