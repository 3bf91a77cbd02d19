from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cgmq_fx import ArtifactError
from cgmq_fx.exporters.certificate import verify
from tests.deploy_nets import deployed

Files = dict[str, bytes]
GRAPH = "net/models/model.json"
WEIGHTS = "net/data/weights/model_weights_config.json"
MANIFEST = "net/extra/cgmq_fx.json"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    deployed("mlp", "tensor").export(path, verify=False)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def written(files: Files, folder: Path) -> Path:
    path = folder / "net.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def edit(files: Files, name: str, change: Callable[[Any], object]) -> None:
    data = json.loads(files[name])
    change(data)
    files[name] = json.dumps(data).encode()


def node(data: Any, target: str) -> Any:
    nodes = data["graph_module"]["graph"]["nodes"]
    return next(n for n in nodes if n["target"] == f"torch.ops.aten.{target}")


def test_what_is_written_again_reads_the_same(files: Files, tmp_path: Path) -> None:
    found = verify(written(files, tmp_path))
    assert found.satisfied
    assert found.from_file


def test_weights_are_read_not_believed(files: Files, tmp_path: Path) -> None:
    before = verify(written(files, tmp_path), "bops <= 100%").states[0].value
    changed = dict(files)
    entry = json.loads(files[WEIGHTS])["config"]["0_weight_codes"]
    name = f"net/data/weights/{entry['path_name']}"
    codes = np.arange(len(files[name])) % 255 - 127
    changed[name] = codes.astype(np.int8).tobytes()
    assert verify(written(changed, tmp_path), "bops <= 100%").states[0].value > before


def test_clamps_are_read_not_believed(files: Files, tmp_path: Path) -> None:
    before = verify(written(files, tmp_path), "bops <= 100%").states[0].value
    changed = dict(files)

    def widen(data: Any) -> None:
        for row in data["graph_module"]["graph"]["nodes"]:
            if row["target"].endswith("clamp.default"):
                row["inputs"][1]["arg"], row["inputs"][2]["arg"] = {"as_int": -127}, {"as_int": 127}

    edit(changed, GRAPH, widen)
    assert verify(written(changed, tmp_path), "bops <= 100%").states[0].value > before


def test_sizes_that_the_file_states_are_not_believed(files: Files, tmp_path: Path) -> None:
    before = verify(written(files, tmp_path), "macs <= 100%").states[0].value
    changed = dict(files)

    def shrink(data: Any) -> None:
        values = data["graph_module"]["graph"]["tensor_values"]
        for name in values:
            if name.startswith(("linear", "relu")):
                values[name]["sizes"] = [{"as_int": 1}, {"as_int": 1}]

    edit(changed, GRAPH, shrink)
    assert verify(written(changed, tmp_path), "macs <= 100%").states[0].value == before


def evil_op(data: Any) -> None:
    node(data, "linear.default")["target"] = "torch.ops.aten.from_file.default"


def evil_function(data: Any) -> None:
    node(data, "linear.default")["target"] = "os.system"


def evil_name(data: Any) -> None:
    node(data, "linear.default")["outputs"][0]["as_tensor"]["name"] = "x = __import__('os')"


def evil_size(data: Any) -> None:
    data["graph_module"]["graph"]["inputs"][-1] = {"as_custom_obj": {"name": "x"}}


def no_graph(data: Any) -> None:
    del data["graph_module"]["graph"]["nodes"]


def odd_argument(data: Any) -> None:
    node(data, "linear.default")["inputs"][0]["arg"] = {"as_operator": "x"}


EDITS: dict[Callable[[Any], None], str] = {
    evil_op: "not allowed",
    evil_function: "not allowed",
    evil_name: "no name",
    evil_size: "is no tensor|not known",
    no_graph: "damaged",
    odd_argument: "'as_operator' is not known",
}


@pytest.mark.parametrize("change", EDITS, ids=lambda f: f.__name__)
def test_hostile_graphs_are_refused(
    change: Callable[[Any], None], files: Files, tmp_path: Path
) -> None:
    changed = dict(files)
    edit(changed, GRAPH, change)
    with pytest.raises(ArtifactError, match=EDITS[change]):
        verify(written(changed, tmp_path))


def test_pickled_tensors_are_refused(files: Files, tmp_path: Path) -> None:
    changed = dict(files)
    edit(changed, WEIGHTS, lambda d: d["config"]["0_weight_codes"].update(use_pickle=True))
    with pytest.raises(ArtifactError, match="will not be unpickled"):
        verify(written(changed, tmp_path))


def test_tensors_that_reach_beyond_their_bytes_are_refused(files: Files, tmp_path: Path) -> None:
    changed = dict(files)

    def grow(data: Any) -> None:
        data["config"]["0_weight_codes"]["tensor_meta"]["sizes"][0]["as_int"] = 1 << 20

    edit(changed, WEIGHTS, grow)
    with pytest.raises(ArtifactError, match="damaged"):
        verify(written(changed, tmp_path))


def test_a_newer_format_is_refused(files: Files, tmp_path: Path) -> None:
    changed = dict(files)
    edit(changed, MANIFEST, lambda d: d.update(format=2))
    with pytest.raises(ArtifactError, match="upgrade cgmq_fx"):
        verify(written(changed, tmp_path))


@pytest.mark.parametrize("name", [GRAPH, MANIFEST, WEIGHTS])
def test_missing_parts_are_named(name: str, files: Files, tmp_path: Path) -> None:
    changed = {key: content for key, content in files.items() if key != name}
    with pytest.raises(ArtifactError, match=r"has no .*not a file that cgmq_fx exported"):
        verify(written(changed, tmp_path))


def test_a_pt2_of_someone_else_is_refused(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "net.pt2")
    with pytest.raises(ArtifactError, match="not a file that cgmq_fx exported"):
        verify(tmp_path / "net.pt2")


def test_truncated_files_are_refused(files: Files, tmp_path: Path) -> None:
    path = written(files, tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"not a .pt2 file"):
        verify(path)
