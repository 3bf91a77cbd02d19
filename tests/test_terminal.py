"""What a person sees: every command in a pseudo-terminal of 80 columns, read off its screen.

The first quantizes as a person would start it. The others are forks of one process in such a
terminal that has imported PyTorch already, for that is what takes longest.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pexpect = pytest.importorskip("pexpect")
pyte = pytest.importorskip("pyte")

ROOT = Path(__file__).parent.parent
COLUMNS, LINES = 80, 200
USER_CODE = """
import torch

def make():
    torch.manual_seed(0)
    net = torch.nn
    return net.Sequential(net.Conv2d(1, 4, 3), net.ReLU(), net.Flatten(), net.Linear(144, 3))

def batches():
    torch.manual_seed(0)
    some = [(torch.rand(8, 1, 8, 8), torch.randint(3, (8,))) for _ in range(6)]
    return some, some[:1]

def broken():
    return {}["weights"]

def diverging(output, target):
    return output.sum() * float("nan")
"""
SHELL = """
import json, os, signal, sys
import torch
import cgmq_fx.cli

cgmq_fx.cost(torch.nn.Linear(2, 2), torch.rand(2, 2))  # what capture imports, once for all
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("@ready@", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["cgmq-fx", *json.loads(line)]
        cgmq_fx.cli.main()
    print(f"@{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}@", flush=True)
"""


def spawned(folder: Path, *arguments: str) -> Any:
    """Python in a pseudo-terminal, working in the folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    environment.pop("COLUMNS", None)
    return pexpect.spawn(
        sys.executable,
        list(arguments),
        cwd=str(folder),
        env=environment,
        dimensions=(LINES, COLUMNS),
        encoding="utf-8",
        timeout=100,
        echo=False,
    )


class Terminal:
    """A command in a terminal, and what stands on its screen."""

    def __init__(self, warm: Any) -> None:
        self._warm = warm
        self._screen = pyte.Screen(COLUMNS, LINES)
        self._stream = pyte.Stream(self._screen)
        self.seen = ""

    def run(self, *arguments: str, stop_at: str = "") -> int:
        """The exit status of the command; with `stop_at`, after Ctrl-C when that was seen."""
        self._warm.sendline(json.dumps(arguments))
        if stop_at:
            self._warm.expect(stop_at)
            self._warm.sendintr()
        self._warm.expect(r"@(-?\d+)@\r\n")
        self.show(self._warm.before)
        return int(self._warm.match[1])

    def show(self, seen: str) -> None:
        """Put on the empty screen what came from a command."""
        self._screen.reset()
        self.seen = seen
        self._stream.feed(seen)

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self._screen.display]

    @property
    def text(self) -> str:
        """The screen with its line breaks taken out."""
        return " ".join(" ".join(self.lines).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    (folder / "mynet.py").write_text(USER_CODE)
    return folder


@pytest.fixture(scope="module")
def warm(folder: Path) -> Iterator[Any]:
    child = spawned(folder, "-W", "ignore::DeprecationWarning", "-c", SHELL)
    child.expect("@ready@\r\n")
    yield child
    child.kill(signal.SIGKILL)
    child.wait()  # close() alone gives it a fifth of a second, however busy the machine is
    child.close()


@pytest.fixture
def terminal(warm: Any) -> Terminal:
    return Terminal(warm)


@pytest.fixture(scope="module")
def quantized(folder: Path) -> Terminal:
    """Started as a person does."""
    child = spawned(
        folder,
        *("-m", "cgmq_fx", "quantize", "mynet:make", "--data", "mynet:batches"),
        *("--loss", "cross_entropy", "--budget", "bops <= 2%, weights <= 600 B", "--epochs", "3"),
        *("--weights", "channel"),
    )
    child.expect(pexpect.EOF)
    child.close()
    terminal = Terminal(child)
    terminal.show(child.before)
    assert child.exitstatus == 0, terminal.text
    return terminal


def test_quantize_shows_epochs_and_then_the_result(quantized: Terminal, folder: Path) -> None:
    lines = quantized.lines
    epochs = [line for line in lines if line.startswith("epoch")]
    assert len(epochs) == 3
    assert "  search, tune  train loss" in epochs[0] or "  search        train" in epochs[0]
    assert "tune" in epochs[2]
    assert re.search(r"val loss \d\.\d{4}, accuracy \d\.\d{4}", quantized.text)
    assert "of bound, satisfied" in quantized.text
    assert any(line.startswith("bops ") and "<= 2.0000%" in line for line in lines)
    assert "quantized/report.json, quantized/report.html" in quantized.text
    assert (folder / "quantized" / "model.safetensors").is_file()


def test_while_quantize_runs_there_is_a_bar_with_every_constraint(quantized: Terminal) -> None:
    assert "left" in quantized.seen
    assert "search  epoch 1  train loss" in quantized.seen
    assert "600 byte" in quantized.seen
    assert "[green]" not in quantized.seen


def test_tables_fit_into_80_columns(quantized: Terminal) -> None:
    tops = [line for line in quantized.lines if line.startswith("┏")]
    bottoms = [line for line in quantized.lines if line.startswith("└")]
    assert tops
    assert all(line.endswith("┓") for line in tops)
    assert all(line.endswith("┘") for line in bottoms)


@pytest.mark.usefixtures("quantized")
def test_show_prints_the_same_table(terminal: Terminal) -> None:
    options = ("--html", "page.html", "--plots", "plots")
    assert terminal.run("show", "quantized/model.safetensors", *options) == 0
    assert "wrote page.html" in terminal.lines
    assert "wrote plots/gates.png" in terminal.lines
    assert "Quantized under bops <= 2%, weights <= 600 byte" in terminal.text


def test_sweep_shows_each_point_and_then_all_of_them(terminal: Terminal) -> None:
    points = ("--budget", "bops <= 2%", "--budget", "bops <= 1%", "--epochs", "1")
    assert terminal.run("sweep", "mynet:make", "--data", "mynet:batches", *points) == 0
    assert "point 2 of 2: bops <= 1%" in terminal.lines
    assert any(line.startswith("│ bops <= 1%") for line in terminal.lines)
    assert terminal.text.endswith("the points are in sweep")


def test_ctrl_c_is_no_traceback(terminal: Terminal) -> None:
    status = terminal.run(
        *("quantize", "mynet:make", "--data", "mynet:batches", "--epochs", "100000"),
        *("--budget", "bops <= 2%", "--out", "stopped"),
        stop_at="epoch   2",
    )
    assert status == 130
    assert "Traceback" not in terminal.text
    assert terminal.text.endswith("stopped")
    assert "what had been reached is within the budget: wrote stopped/model" in terminal.text


BUDGET = ("--budget", "bops <= 2%")
INPUT = ("--input", "2x1x8x8")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("explain", "mynet:make", *INPUT, *BUDGET), "feasible: the smallest bit-widths satisfy"),
        (("cost", "mynet:make", *INPUT), "1,296"),
        (("targets",), "cortex-m7 (chip)"),
        (("completion", "bash"), "_cgmq_fx_completion"),
        (("--version",), "cgmq-fx, version"),
    ],
)
def test_what_is_shown_fits(arguments: tuple[str, ...], text: str, terminal: Terminal) -> None:
    assert terminal.run(*arguments) == 0
    assert text in terminal.text
    assert all(line.endswith(("┓", "┘")) for line in terminal.lines if line.startswith(("┏", "└")))


def test_from_a_model_to_a_file_that_verifies(terminal: Terminal) -> None:
    pytest.importorskip("onnxscript", reason="nothing can be exported without it")
    options = ("--target", "onnxruntime", "--epochs", "0", "--quiet", "--out", "deployed")
    assert terminal.run("quantize", "mynet:make", *INPUT, *BUDGET, *options) == 0
    assert terminal.text == ""
    assert terminal.run("export", "deployed/model.safetensors", "net.onnx") == 0
    assert "outputs exact" in terminal.text
    assert terminal.run("verify", "net.onnx") == 0
    assert terminal.lines[0].startswith("bops ")
    assert terminal.lines[0].endswith("<= 2.0000%")
    assert terminal.run("verify", "net.onnx", "--budget", "bops <= 0.1%") == 1
    assert "VIOLATED" in terminal.text


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (("quantize", "mynet:make"), 2, "Missing option '--budget'"),
        (("quantize", "mynet:none", *BUDGET), 2, "has no attribute 'none'"),
        (("quantize", "mynet:broken", *BUDGET), 2, "'weights' (mynet.py, line 15"),
        (
            ("quantize", "mynet:make", "--budget", "bops <= 0.1%"),
            1,
            "with every gate at its smallest",
        ),
        (("quantize", "mynet:make", *BUDGET, "--loss", "mynet:diverging"), 3, "loss became nan"),
        (("cost", "mynet:make"), 2, "are not known; pass --input or --data"),
        (("sweep", "mynet:make", "--budget", "bops 3"), 2, "cannot read 'bops 3'"),
        (("show", "mynet.py"), 2, "cannot be read as a safetensors file"),
        (("verify", "gone.onnx"), 1, "gone.onnx cannot be read"),
    ],
)
def test_errors_are_one_short_paragraph(
    arguments: tuple[str, ...], status: int, text: str, terminal: Terminal
) -> None:
    needed = ("--data", "mynet:batches", "--quiet") if "--budget" in arguments else ()
    assert terminal.run(*arguments, *needed) == status
    assert text in terminal.text
    said = [line for line in terminal.lines if line]
    assert len(said) <= 8
    assert "Traceback" not in terminal.text
