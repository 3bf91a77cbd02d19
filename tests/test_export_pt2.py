from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cgmq_fx.exporters import exporters
from cgmq_fx.exporters.agreement import compare
from cgmq_fx.passes.lower import lower
from tests.deploy_nets import deployed, inputs_of
from tests.nets import call

CASES = [
    ("lenet5", "tensor"),
    ("mlp", "both"),
    ("resnet20", "channel"),
    ("parts", "channel"),
    ("separable", "tensor"),
    ("transformer", "tensor"),
]
ALONE = """
import sys, torch
from safetensors.torch import load_file, save_file
module = torch.export.load(sys.argv[1]).module()
save_file({"y": module(load_file(sys.argv[2])["x"])}, sys.argv[3])
assert not any(name.startswith("cgmq_fx") for name in sys.modules)
"""


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_it_computes_what_the_model_computes_for_any_batch(
    name: str, scheme: str, tmp_path: Path
) -> None:
    result = deployed(name, scheme)
    path = result.export(tmp_path / "net.pt2").path
    inputs = [inputs_of(name, batch) for batch in (1, 2, 5)]
    found = exporters()["pt2"].run(path, inputs)
    agreement = compare(lower(result.model, result.inputs), found, inputs)
    assert agreement.largest <= 1.0, agreement


def test_a_process_that_has_only_torch_can_run_it(tmp_path: Path) -> None:
    result, inputs = deployed("lenet5", "channel"), inputs_of("lenet5", 3)
    result.export(tmp_path / "net.pt2")
    save_file({"x": inputs.args[0]}, tmp_path / "x")
    names = [str(tmp_path / name) for name in ("net.pt2", "x", "y")]
    command = [sys.executable, "-W", "ignore", "-c", ALONE, *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(load_file(tmp_path / "y")["y"], call(result.model, inputs)[0])


def test_the_file_holds_integers_and_nothing_of_the_user_s_machine(tmp_path: Path) -> None:
    path = deployed("lenet5", "tensor").export(tmp_path / "net.pt2").path
    with zipfile.ZipFile(path) as archive:
        sizes = {i.filename: i.file_size for i in archive.infolist()}
        graph = archive.read("net/models/model.json")
    assert max(size for name, size in sizes.items() if "weight" in name) == 512 * 1024  # int8
    assert b"lenet5.py" not in graph
    assert b"cgmq_fx" not in graph
