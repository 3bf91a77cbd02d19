"""Every command, used wrongly in every way: one short paragraph, the exit status, no traceback."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from cgmq_fx.cli import main
from cgmq_fx.cli.common import _with_options
from tests.nets import small_classifier
from tests.test_opaque import Block, Numbers

HERE = "tests.test_cli_errors"
NET = f"{HERE}:net"
BUDGET = ("--budget", "bops <= 20%")
DATA = ("--data", f"{HERE}:BATCHES")
MOST_LINES = 8
"""Of 80 columns: a paragraph that can be read at a glance."""

BATCHES = [(torch.zeros(4, 3), torch.arange(4) % 2)] * 3
WRONG_SHAPE = [(torch.zeros(4, 5), torch.arange(4) % 2)] * 3
NO_TARGETS = [torch.zeros(4, 3)] * 3
NUMBERS = [(1, 2), (3, 4)]


class Refusing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("not today")


def net() -> nn.Module:
    torch.manual_seed(0)
    return small_classifier()


def opaque() -> nn.Module:
    """A model with a module that no file can hold."""
    return Block(Numbers())


def failing() -> None:
    raise RuntimeError("no such\nfolder\n  on this machine")


def vector(output: Tensor, target: Tensor) -> Tensor:
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model, and files that are none."""
    folder = tmp_path_factory.mktemp("errors")
    for name in ("junk.bin", "junk.onnx", "junk.pt2", "junk.safetensors"):
        (folder / name).write_bytes(b"\x00junk" * 50)
    (folder / "cut.json").write_text('{"name":')
    (folder / "empty.json").write_text("{}")
    (folder / "sub").mkdir()
    done = run(
        "quantize", NET, *BUDGET, "--input", "2x3", "--epochs=0", "--quiet", f"--out={folder}"
    )
    assert (done.exit_code, done.output) == (0, "")
    return folder


def run(*arguments: str) -> Result:
    sys.modules[HERE] = sys.modules[__name__]  # whatever pytest calls it
    return CliRunner().invoke(main, list(arguments), env={"COLUMNS": "80"})


QUANTIZE: list[tuple[tuple[str, ...], int, str]] = [
    ((), 2, "Missing argument 'MODEL'"),
    ((NET,), 2, "Missing option '--budget'"),
    (("net", *BUDGET, *DATA), 2, "neither package.module:factory nor a .pt2 file"),
    (("no.module:make", *BUDGET, *DATA), 2, "No module named 'no'"),
    ((f"{HERE}:vector", *BUDGET, *DATA), 2, "missing 2 required positional arguments"),
    ((f"{HERE}:failing", *BUDGET, *DATA), 2, "RuntimeError: no such folder on this machine"),
    (
        (f"{HERE}:Refusing", *BUDGET, *DATA),
        2,
        "ValueError: not today. Pass --input that it accepts",
    ),
    (("torch.nn:ReLU", *BUDGET, *DATA), 2, "there is nothing to quantize"),
    ((NET, *BUDGET), 2, "are not known; pass --input or --data"),
    ((f"{HERE}:opaque", "--budget", "bops <= 60%", "--input=4x8"), 2, "inner.0"),
    ((NET, *BUDGET, "--data", f"{HERE}:WRONG_SHAPE"), 2, "fails on the example inputs ((4, 5)"),
    ((NET, *BUDGET, "--data", f"{HERE}:NUMBERS"), 2, "fails on the example inputs ()"),
    ((NET, *BUDGET, "--data", f"{HERE}:failing"), 2, "cannot get data from"),
    ((NET, *BUDGET, "--data", "math:pi"), 2, "must be an iterable of batches, not a float"),
    ((NET, *BUDGET, "--data", "builtins:list"), 2, "the data is empty"),
    ((NET, *BUDGET, "--data", "nowhere"), 2, "neither package.module:loader nor mnist"),
    (
        (NET, *BUDGET, "--data", f"{HERE}:NO_TARGETS", "--loss", "cross_entropy"),
        2,
        "or leave out --loss so that",
    ),
    ((NET, *BUDGET, *DATA, "--loss", "nope"), 2, "there is no loss 'nope'"),
    ((NET, *BUDGET, *DATA, "--loss", f"{HERE}:vector"), 2, "must return one number"),
    ((NET, *BUDGET, *DATA, "--loss", f"{HERE}:failing"), 2, "takes 0 positional arguments"),
    ((NET, *BUDGET, *DATA, "--epochs=-1"), 2, "-1 is not in the range"),
    ((NET, *BUDGET, *DATA, "--epochs=x"), 2, "'x' is not a valid integer"),
    ((NET, "--budget", "bops", *DATA), 2, "cannot read 'bops' in the budget"),
    ((NET, "--budget", "", *DATA), 2, "cannot read ''"),
    ((NET, "--budget", "bops <= -3", *DATA), 2, "must be a positive, finite number"),
    ((NET, "--budget", "flux <= 3", *DATA), 2, "there is no cost model named 'flux'"),
    ((NET, "--budget", "weights <= 3 parsec", *DATA), 2, "'parsec' does not fit 'weights'"),
    ((NET, "--budget", "bops[nothing] <= 3%", *DATA), 2, "no layer matches 'nothing'"),
    ((NET, "--budget", "bops <= 0.01%", *DATA), 1, "the budget cannot be met"),
    ((NET, *BUDGET, *DATA, "--target", "z80"), 2, "there is no target 'z80'"),
    ((NET, *BUDGET, *DATA, "--target", "{folder}/cut.json"), 2, "is no target file"),
    ((NET, *BUDGET, *DATA, "--target", "{folder}/empty.json"), 2, "is no target file"),
    ((NET, *BUDGET, *DATA, "--out", "{folder}/junk.bin"), 2, "is a file"),
    ((NET, *BUDGET, *DATA, "--out", "{folder}/junk.bin/sub"), 2, "cannot be made"),
    ((NET, *BUDGET, *DATA, "--state", "gone.safetensors"), 2, "does not exist"),
    ((NET, *BUDGET, *DATA, "--state", "{folder}/junk.safetensors"), 2, "does not fit"),
    ((NET, *BUDGET, *DATA, "--bit-widths=1,2"), 2, "1 is no bit-width"),
    ((NET, *BUDGET, *DATA, "--weights=row"), 2, "'row' is not one of"),
    ((NET, *BUDGET, *DATA, "--nope"), 2, "No such option"),
]

MODEL = "{folder}/model.safetensors"
OTHERS: list[tuple[tuple[str, ...], int, str]] = [
    (("cost",), 2, "Missing argument 'MODEL'"),
    (("cost", NET), 2, "are not known; pass --input or --data"),
    (("cost", NET, "--input=2x3", "--costs=flux"), 2, "there is no cost model named 'flux'"),
    (("cost", NET, "--input=2x3", "--costs=latency"), 2, "looked up for a chip; pass --target"),
    (("cost", NET, "--input=2x3", "--costs="), 2, "cannot read '' as a cost"),
    (("cost", NET, "--input=2x5"), 2, "fails on the example inputs"),
    (("cost", NET, "--input=axb"), 2, "must be whole numbers"),
    (("cost", "{folder}/junk.pt2"), 2, "as a model of torch.export"),
    (("explain", NET, "--input=2x3"), 2, "Missing option '--budget'"),
    (("explain", NET, *BUDGET), 2, "are not known; pass --input or --data"),
    (("targets", "z80"), 2, "unexpected extra argument"),
    (("export",), 2, "Missing argument 'FILE'"),
    (("export", MODEL), 2, "Missing argument 'OUT'"),
    (("export", "gone.safetensors", "net.onnx"), 2, "does not exist"),
    (
        ("export", "{folder}/junk.safetensors", "net.onnx"),
        2,
        "cannot be read as a safetensors file",
    ),
    (("export", MODEL, "net.xyz"), 2, "rename it or pass --format"),
    (("export", MODEL, "net.onnx", "--format=nope"), 2, "there is no format 'nope'"),
    (("export", MODEL, "{folder}/nowhere/net.pt2"), 2, "cannot be written"),
    (("verify",), 1, "Missing argument 'FILE'"),
    (("verify", "gone.onnx"), 1, "cannot be read"),
    (("verify", "{folder}/junk.pt2"), 1, "is not a .pt2 file"),
    (("verify", "{folder}/junk.safetensors"), 1, "cannot be read as a safetensors file"),
    (("verify", "{folder}/junk.bin"), 1, "cannot tell the format"),
    (("verify", "{folder}/sub"), 1, "cannot be read"),
    (("verify", MODEL, "--budget", "flux <= 3"), 2, "there is no cost model named 'flux'"),
    (("verify", MODEL, "--budget", "bops < 2%"), 2, 'write "<=" instead of "<"'),
    (("verify", MODEL, "--target", "z80"), 2, "there is no target 'z80'"),
    (("show",), 2, "Missing argument 'FILE'"),
    (("show", "gone"), 2, "does not exist"),
    (("show", "{folder}"), 2, "is a directory"),
    (("show", "{folder}/junk.bin"), 2, "cannot be read as a safetensors file"),
    (("show", MODEL, "--html", "{folder}/sub"), 2, "is a directory"),
    (("show", MODEL, "--plots", "{folder}/junk.bin"), 2, "is a file"),
    (("sweep", NET), 2, "Missing option '--budget'"),
    (("sweep", NET, *BUDGET), 2, "are not known; pass --input or --data"),
    (("sweep", NET, *BUDGET, *DATA, "--jobs=0"), 2, "0 is not in the range"),
    (("sweep", NET, "--budget", "bops 3", *DATA), 2, "cannot read 'bops 3'"),
    (("sweep", NET, *BUDGET, "--budget", "bops <= 0.01%", *DATA), 1, "the budget cannot be met"),
    (("sweep", NET, *BUDGET, *DATA, "--out", "{folder}/junk.bin"), 2, "is a file"),
    (("completion",), 2, "Missing argument"),
    (("completion", "tcsh"), 2, "'tcsh' is not one of"),
    (("nothing",), 2, "No such command 'nothing'"),
    (("--nope",), 2, "No such option"),
]
ROWS = [(("quantize", *words), status, text) for words, status, text in QUANTIZE] + OTHERS


@pytest.mark.parametrize(("words", "status", "text"), ROWS, ids=lambda value: str(value)[:60])
def test_mistakes_are_one_short_paragraph(
    words: tuple[str, ...], status: int, text: str, folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*(word.replace("{folder}", str(folder)) for word in words))
    assert isinstance(done.exception, SystemExit), done.exception
    usage = 2 if text.startswith("Missing argument") else status
    assert done.exit_code == usage
    said = done.output.replace(str(folder), "folder")
    assert text in " ".join(said.split())
    assert "Traceback" not in said
    paragraphs = [part for part in re.split(r"\n\n", said.strip()) if part]
    assert len(paragraphs[-1]) <= 80 * MOST_LINES
    assert said.startswith(("error: ", "Usage: "))
    assert len(paragraphs) == (1 if said.startswith("error: ") else 2)
    assert not [path for path in tmp_path.rglob("*") if path.is_dir()], "an empty folder is left"


def test_every_command_is_used_wrongly() -> None:
    assert {words[0] for words, _, _ in ROWS} >= set(main.commands)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("pass example_inputs= that fit", "pass --input that fit"),
        ("cannot execute weights='channel'", "cannot execute weights='channel'"),
        ("a target=, or format=", "a --target, or --format"),
        ("target='fpga'", "target='fpga'"),
        ("use jobs=1", "use --jobs 1"),
        ("(the scheme's bit_widths; 0 prunes)", "(--bit-widths; 0 prunes)"),
        ("`explain` shows what", "cgmq-fx explain shows what"),
    ],
)
def test_arguments_are_called_by_their_options(text: str, shown: str) -> None:
    assert _with_options(text) == shown
