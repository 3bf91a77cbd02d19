"""What `.pte` and `.tflite` files cost, without the runtimes that execute them.

The files in `data` are `mlp`, `separable`, `parts` (both per channel) and `transformer` of
`deploy_nets` under the schemes of the presets, as their exporters wrote them; to renew them, export
them again where the packages are installed. What they cost is what the graphs cost that they were
written from.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cgmq_fx import ArtifactError, ExportError
from cgmq_fx.cli import main
from cgmq_fx.cost_models import CONVENTION
from cgmq_fx.exporters.certificate import SUFFIX, verify
from cgmq_fx.exporters.float_codes import float_codes

pytest.importorskip("flatbuffers")

DATA = Path(__file__).parent / "data"
KINDS = ["pte", "tflite"]
EVERYTHING = (
    "bops <= 100%, bops <= 100% of 8 bits, macs <= 100%, weights <= 100%, activations <= 100%, "
    "arena <= 100%"
)
# 1400 MACs at 2 to 8 bits; 350 bytes of weights at their bits and 61 biases in int32, and so on.
COSTS: dict[str, tuple[float, ...]] = {
    "mlp": (28160, 28160, 1400, 1004, 40, 40),
    "separable": (540672, 540672, 26688, 425, 1280, 1280),
    "parts": (200192, 200192, 10104, 234, 1024, 1024),
    "transformer": (270336, 270336, 13488, 2492, 1440, 1440),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp", "separable", "parts"])
def test_a_file_costs_what_the_graph_costs(name: str, kind: str) -> None:
    found = verify(DATA / f"{name}.{kind}", EVERYTHING)
    assert tuple(state.value for state in found.states) == COSTS[name]
    assert found.unknown == ()
    assert found.from_file


@pytest.mark.parametrize("kind", KINDS)
def test_what_runs_in_float_counts_at_the_bits_of_its_grid(kind: str) -> None:
    """Linear layers without a rounded result keep float weights, which lie on their grids."""
    found = verify(DATA / f"transformer.{kind}", EVERYTHING)
    values = [state.value for state in found.states]
    assert tuple(values[:3]) == COSTS["transformer"][:3]
    assert all(v <= most for v, most in zip(values, COSTS["transformer"], strict=True))
    assert values[3] > 0.7 * COSTS["transformer"][3]


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["verify", *map(str, arguments)])
    return done.exit_code, done.output


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_says_whether_bounds_hold(kind: str) -> None:
    path = DATA / f"mlp.{kind}"
    status, text = run(path, "--budget", "bops <= 2%, weights <= 1 KiB")
    assert status == 0
    lines = text.splitlines()
    assert lines[0].startswith("bops 1.9643% <= 2.0000%")
    assert lines[1].startswith("weights 1004 <= 1024 byte")
    assert lines[2] == f"({CONVENTION})"
    assert run(path)[0] == 0  # what it states itself
    status, text = run(path, "--budget", "bops <= 2%, weights <= 1000 B")
    assert status == 1
    assert ["VIOLATED" in line for line in text.splitlines()] == [False, True, False]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flatbuffers.table", None)
    with pytest.raises(ExportError, match=r'needs flatbuffers.*pip install "cgmq-fx\[verify\]"'):
        verify(DATA / "mlp.pte")


def changed(kind: str, old: bytes, new: bytes, folder: Path, name: str = "mlp") -> Path:
    """A copy of a file in which some bytes are others."""
    content = (DATA / f"{name}.{kind}").read_bytes()
    assert old in content
    assert len(old) == len(new)
    path = folder / f"net.{kind}"
    path.write_bytes(content.replace(old, new))
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'{"format":1', b'{"format":2', "has format '2'.*upgrade cgmq_fx"),
        (b'{"format":1', b'{"format":[', "manifest of .* is no JSON"),
        (b'"format"', b'"tamrof"', "not a file that cgmq_fx exported"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    old: bytes, new: bytes, message: str, kind: str, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=message):
        verify(changed(kind, old, new, tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_that_a_file_states_is_not_believed(kind: str, tmp_path: Path) -> None:
    """A larger batch would make a sample seem cheaper."""
    path = changed(kind, b'"batch":4', b'"batch":9', tmp_path)
    assert verify(path, "macs <= 100%").states[0].value == COSTS["mlp"][2]


def wider_codes(content: bytes) -> bytes:
    """A long run of small codes, with one among them that needs 8 bits."""
    codes = np.frombuffer(content, np.int8).copy()
    small = (np.abs(codes) <= 7).astype(int)
    busy = small * (codes % 2 != 0)
    sums = [np.convolve(row, np.ones(256, int), "valid") for row in (small, busy)]
    start = int(np.flatnonzero((sums[0] == 256) & (sums[1] > 64))[0])
    codes[start + 128] = 101
    return codes.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_file_costs_is_read_from_its_codes(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"net.{kind}"
    path.write_bytes(wider_codes((DATA / f"mlp.{kind}").read_bytes()))
    before = verify(DATA / f"mlp.{kind}", "weights <= 100%").states[0].value
    assert verify(path, "weights <= 100%").states[0].value > before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "content", [b"", b"text", b"\0" * 40, b"\x10\0\0\0ET12" + b"\xff" * 400, b"\x10\0\0\0TFL3" * 9]
)
def test_files_that_are_not_ours_are_refused(content: bytes, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"net.{kind}"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"net\.(pte|tflite)"):
        verify(path)
    assert run(path)[0] == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [0.2, 0.6, 0.99])
def test_truncated_files_are_refused(kept: float, kind: str, tmp_path: Path) -> None:
    content = (DATA / f"separable.{kind}").read_bytes()
    path = tmp_path / f"net.{kind}"
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ArtifactError, match=r"cannot be counted|is damaged"):
        verify(path)


def flipped(content: bytes, chance: random.Random) -> bytes:
    """A byte changed, a pointer changed, or a part moved."""
    found = bytearray(content)
    place = chance.randrange(len(found) - 64)
    if chance.random() < 0.5:
        found[place] = chance.randrange(256)
    elif chance.random() < 0.7:
        number = chance.choice([0, 1, (1 << 31) - 1, (1 << 32) - 1, len(found) - 8])
        found[place // 4 * 4 : place // 4 * 4 + 4] = number.to_bytes(4, "little")
    else:
        found[place : place + 32] = found[:32]
    return bytes(found)


def cost_or_error(path: Path) -> float | None:
    """The cost of a file, or None where it is refused in the way that it should be."""
    try:
        return verify(path, "bops <= 100%").states[0].value
    except ArtifactError:
        return None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COSTS)
def test_damage_is_counted_or_refused(name: str, kind: str, tmp_path: Path) -> None:
    content, chance = (DATA / f"{name}.{kind}").read_bytes(), random.Random(0)
    path = tmp_path / f"net.{kind}"
    for _ in range(12):
        path.write_bytes(flipped(content, chance))
        value = cost_or_error(path)
        assert value is None or value >= 0


def test_a_changed_file_is_not_the_certified_one(tmp_path: Path) -> None:
    path = tmp_path / "net.pte"
    path.write_bytes((DATA / "mlp.pte").read_bytes())
    beside = path.with_name(path.name + SUFFIX)
    beside.write_text(json.dumps({"sha256": "0" * 64}))
    with pytest.raises(ArtifactError, match="its hash is another one"):
        verify(path)


def grid_of(rows: list[list[float]]) -> tuple[list[list[int]], list[float]] | None:
    found = float_codes(np.array(rows, np.float32))
    return None if found is None else (found[0].tolist(), found[1].round(6).tolist())


CODES: list[tuple[list[list[float]], tuple[list[list[int]], list[float]] | None]] = [
    ([[0.5, -0.5, 0.0]], ([[1, -1, 0]], [0.5])),
    ([[0.3, -0.1, 0.2], [4.0, 6.0, 2.0]], ([[3, -1, 2], [2, 3, 1]], [0.1, 2.0])),
    ([[0.0, 0.0]], ([[0, 0]], [1.0])),
    ([[1.0, 1 / 127]], ([[127, 1]], [0.007874])),
    ([[1.0, 1 / 128]], None),
    ([[1.0, 0.5], [1.0, 0.7071]], None),
    ([[1.0, float("nan")]], None),
]


@pytest.mark.parametrize(("rows", "expected"), CODES)
def test_float_numbers_on_a_grid_are_codes(
    rows: list[list[float]], expected: tuple[list[list[int]], list[float]] | None
) -> None:
    assert grid_of(rows) == expected


def test_random_numbers_are_on_no_grid() -> None:
    values = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    assert float_codes(values) is None
    for bits in (1, 3, 5):
        rounded = np.round(values * 2**bits).clip(-127, 127) / 2**bits
        assert float_codes(rounded) is not None
