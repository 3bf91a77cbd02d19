"""The command line: what a person sees, and the exit statuses."""

import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from cgmq_fx.cli import main
from cgmq_fx.cost_models import model as registry
from cgmq_fx.cost_models.target import target_names
from cgmq_fx.presets import PRESETS

LENET = ["explain", "benchmarks.lenet5:LeNet5", "--input", "2x1x28x28"]


TOKENS = "tests.nets:Tied"
OWN_COSTS = """
import cgmq_fx

@cgmq_fx.register_cost_model
class Products(cgmq_fx.CostModel):
    name, unit = "products", "piece"

    def node_cost(self, node, bits):
        return float(node.macs)
"""


def broken() -> nn.Module:
    raise KeyError("weights")


def noisy() -> nn.Module:
    logging.getLogger("cgmq_fx").warning("take care")
    warnings.warn("take more care", stacklevel=1)
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), env={"COLUMNS": "140"})


def test_targets_are_listed_with_their_source() -> None:
    result = run("targets")
    assert result.exit_code == 0
    assert all(name in result.output for name in target_names())
    assert "arXiv" in result.output


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        ((*LENET, "--budget", "bops <= 1%"), 0, "feasible: the smallest bit-widths satisfy"),
        ((*LENET, "--budget", "bops <= 0.3%"), 1, "infeasible: bops cannot be met"),
        ((*LENET, "--budget", "bops <= 0.4%", "--input-bits", "8"), 1, "0.517%"),
        ((*LENET, "--budget", "latency <= 9 s", "--target", "cortex-m7"), 0, "latency <= 9 second"),
        ((*LENET, "--budget", "bops <= 9%", "--target", "fpga"), 0, "6.250%"),
        (
            (*LENET, "--budget", "latency<=9s", "--target", "fpga", "--target", "mpic"),
            0,
            "feasible",
        ),
        (
            (*LENET, "--budget", "bops <= 9%", "--target", "fpga", "--weights", "channel"),
            2,
            "the target fpga cannot execute weights='channel'",
        ),
        ((*LENET, "--budget", "bops <= 9%", "--bit-widths", "4,8"), 0, "1.562%"),
        ((*LENET, "--budget", "latency <= 9 s"), 2, "pass --target"),
        ((*LENET, "--budget", "bops 3"), 2, "cannot read 'bops 3'"),
        ((*LENET, "--budget", "bops <= 1%", "--target", "z80"), 2, "there is no target 'z80'"),
        ((*LENET, "--budget", "bops <= 1%", "--bit-widths", "a"), 2, "must be whole numbers"),
        (("explain", "nothing", "--budget", "bops <= 1%"), 2, "neither package.module:factory"),
        (("explain", "nothing.x:Y", "--budget", "bops <= 1%"), 2, "No module named"),
        (("explain", "math:pi", "--budget", "bops <= 1%"), 2, "not callable"),
        (("explain", "math:sqrt:x", "--budget", "bops <= 1%"), 2, "has no attribute 'sqrt:x'"),
        (("explain", "builtins:next", "--budget", "bops <= 1%"), 2, "TypeError"),
        (("explain", "tests.test_cli:broken", "--budget", "bops <= 1%"), 2, "KeyError: 'weights'"),
        (("explain", "builtins:dict", "--budget", "bops <= 1%"), 2, "gives a dict"),
        (("explain", "gone.pt2", "--budget", "bops <= 1%"), 2, "there is no file gone.pt2"),
        (("explain", TOKENS, "--budget", "bops <= 9%", "--input", "2x3:int64"), 0, "feasible"),
        (("explain", TOKENS, "--budget", "bops <= 9%", "--input", "2x-3"), 2, "is no input"),
        (("explain", TOKENS, "--budget", "bops <= 9%", "--input", "2x3:int7"), 2, "is no input"),
        (LENET, 2, "Missing option '--budget'"),
    ],
)
def test_explain(arguments: tuple[str, ...], status: int, text: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, "Traceback" in result.output) == (status, False)
    assert text in result.output


@pytest.mark.parametrize(
    ("budget", "status", "floor"), [("bops <= 1%", 0, 0.390625), ("bops <= 0.3%", 1, 0.390625)]
)
def test_scripts_get_json_or_nothing(budget: str, status: int, floor: float) -> None:
    result = run(*LENET, "--budget", budget, "--json")
    assert result.exit_code == status
    found = json.loads(result.stdout)
    assert found["feasible"] is (status == 0)
    (entry,) = found["constraints"]
    assert entry["floor"] / entry["ceiling"] * 100 == pytest.approx(floor)  # 2 x 2 of 32 x 32 bits
    quiet = run(*LENET, "--budget", budget, "--quiet")
    assert (quiet.exit_code, quiet.output) == (status, "")


@pytest.mark.parametrize("command", ["quantize", "sweep", "explain"])
def test_quiet_commands_warn_of_nothing(
    command: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    arguments = [command, "tests.test_cli:noisy", "--budget", "bops <= 20%", "--input", "2x3"]
    if command != "explain":
        arguments += ["--epochs", "0", "--out", str(tmp_path / "out")]
    with pytest.warns(UserWarning, match="take more care"):
        assert run(*arguments).exit_code == 0
    assert "take care" in caplog.text
    caplog.clear()
    result = run(*arguments, "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]
    assert logging.root.manager.disable == logging.NOTSET


def test_targets_for_scripts() -> None:
    found = {row["name"]: row for row in json.loads(run("targets", "--json").stdout)}
    assert found.keys() == {*PRESETS, *target_names()}
    assert found["cortex-m7"]["knows"] == ["latency"]
    assert "8x8" in found["cortex-m7"]["runs"]
    assert "onnx" in found["onnxruntime"]["formats"]


@pytest.mark.parametrize("command", [(), *((name,) for name in main.commands)])
def test_help_has_an_example(command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    _, _, examples = result.output.partition("Example")
    words = "completion bash" if command == ("completion",) else (command or ("quantize",))[0]
    assert f"cgmq-fx {words}" in examples


@pytest.mark.parametrize("good", [True, False])
def test_a_file_of_torch_export(good: bool, tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    if good:
        torch.export.save(torch.export.export(nn.Linear(3, 2), (torch.ones(2, 3),)), file)
    else:
        file.write_bytes(b"PK but no model")
    result = run("explain", str(file), "--budget", "bops <= 1%")
    assert result.exit_code == (0 if good else 2)
    assert ("feasible" if good else "as a model of torch.export") in result.output


def test_the_entry_point_is_installed() -> None:
    script = Path(sys.executable).parent / "cgmq-fx"
    if not script.exists():
        pytest.skip("cgmq_fx is not installed in this environment, only on the path")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert "explain" in done.stdout


@pytest.mark.parametrize(
    ("words", "offered"),
    [("ex", {"explain", "export"}), ("explain m:f --target cortex", {"cortex-m7", "cortex"})],
)
def test_completion(
    words: str,
    offered: set[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shell = {
        "_CGMQ_FX_COMPLETE": "bash_complete",
        "COMP_WORDS": f"cgmq-fx {words}",
        "COMP_CWORD": str(len(words.split())),
    }
    for name, value in shell.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main(prog_name="cgmq-fx")
    assert {line.partition(",")[2] for line in capsys.readouterr().out.splitlines()} == offered


def test_a_module_with_cost_models_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_costs.py").write_text(OWN_COSTS)
    net = "tests.nets:small_classifier"
    asked = ("cost", net, "--input", "1x3", "--costs", "products", "--json")
    assert run(*asked).exit_code == 2
    found = run("--import", "own_costs", *asked)
    assert found.exit_code == 0, found.output
    (counted,) = json.loads(found.output)["costs"]
    assert counted["name"] == "products"
    assert counted["totals"]["8"] == 20


def test_a_module_that_cannot_be_imported() -> None:
    found = run("--import", "no_such_module", "targets")
    assert found.exit_code == 2
    assert found.output.startswith("error: cannot import 'no_such_module': ModuleNotFoundError")


def test_a_sweep_that_measures_nothing_is_json_for_every_program(tmp_path: Path) -> None:
    words = ("sweep", "tests.test_cli:noisy", "--budget", "bops <= 20%", "--input", "2x3")
    with pytest.warns(UserWarning, match="take more care"):
        found = run(*words, "--epochs", "0", "--json", "--out", str(tmp_path / "out"))
    (row,) = json.loads(found.stdout, parse_constant=pytest.fail)
    assert row["training loss"] is None


TAKEN: list[bool] = []


def fails(output: Tensor, target: Tensor) -> Tensor:
    """A loss that cannot be computed after some steps."""
    TAKEN.append(output.requires_grad)
    return output.mean() * (float("nan") if sum(TAKEN) > 3 else 1.0)


def pairs() -> list[tuple[Tensor, Tensor]]:
    return [(torch.rand(2, 3), torch.rand(2, 2)) for _ in range(4)]


@pytest.mark.parametrize(
    ("blocked", "epochs", "status", "text"),
    [
        ("report.json", 0, 2, "error: the model is in {out}/model.safetensors, but {out}/report.j"),
        ("report.html", 0, 2, "error: the model is in {out}/model.safetensors, but {out}/report.h"),
        ("report.json", 2, 3, "within the budget: the model is in {out}/model.safetensors, but"),
        ("model.safetensors", 2, 3, "within the budget: {out}/model.safetensors cannot be written"),
    ],
)
def test_a_report_that_cannot_be_written_loses_nothing(
    blocked: str, epochs: int, status: int, text: str, tmp_path: Path
) -> None:
    (tmp_path / blocked).mkdir()
    TAKEN.clear()
    words = ("quantize", "tests.test_cli:noisy", "--budget", "bops <= 20%", "--quiet")
    data = ("--data", "tests.test_cli:pairs", "--loss", "tests.test_cli:fails")
    found = run(*words, *data, "--epochs", str(epochs), "--out", str(tmp_path))
    assert (found.exit_code, isinstance(found.exception, SystemExit)) == (status, True)
    assert text.format(out=tmp_path) in found.stderr
    assert ("error: step 4 of 8" in found.stderr) is (status == 3)
    assert (tmp_path / "model.safetensors").is_file() is (blocked != "model.safetensors")
