from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from cgmq_fx import requirements
from cgmq_fx.requirements import OLDEST_TORCH, check_torch, own_version

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "found", ["2.11.0", "2.13.0+cpu", "2.12.0a0+git123", "3.0", "10.1.2", "odd"]
)
def test_new_enough_is_accepted(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "version", lambda _: found)
    check_torch()


@pytest.mark.parametrize("found", ["1.13.1", "2.4.0", "2.10.9+cu128"])
def test_too_old_is_one_clear_sentence(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "version", lambda _: found)
    with pytest.raises(
        ImportError, match=f"needs PyTorch 2.11 or newer, and {re.escape(found)} is"
    ):
        check_torch()


def test_the_check_comes_with_the_import(tmp_path: Path) -> None:
    fake = tmp_path / "torch-2.4.0.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.4.0\n")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import cgmq_fx"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("python -m pip install 'torch>=2.11'")


def test_the_oldest_version_is_the_one_that_is_declared() -> None:
    declared = f'"torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]},<3"'
    assert declared in (ROOT / "pyproject.toml").read_text()


def test_a_checkout_that_is_not_installed_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> str:
        raise PackageNotFoundError("cgmq-fx")

    monkeypatch.setattr(requirements, "version", missing)
    assert own_version() == "from a checkout"
    check_torch()  # nor is a PyTorch without metadata refused
