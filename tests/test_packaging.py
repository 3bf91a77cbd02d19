import ast
import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import cgmq_fx.api

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
FOLDERS = ("cgmq_fx", "passes", "cost_models")


def packages_on_disk(top: Path) -> set[str]:
    """Returns the dotted name of every folder under `top` that holds Python files."""
    return {
        ".".join(Path(folder).relative_to(top.parent).parts)
        for folder, _, files in os.walk(top, followlinks=True)
        if any(file.endswith(".py") for file in files)
    }


def test_every_package_on_disk_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == packages_on_disk(ROOT / "cgmq_fx")


@pytest.mark.parametrize("name", ["passes", "cost_models"])
def test_bare_name_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    with pytest.raises(ImportError, match=rf"cgmq_fx\.{name}"):
        importlib.import_module(name)


def test_no_module_hides_a_public_name() -> None:
    modules = {module.name for module in pkgutil.iter_modules(cgmq_fx.__path__)}
    assert modules.isdisjoint(cgmq_fx.api.__all__)


def test_public_names_are_listed_and_others_are_not_there() -> None:
    assert set(cgmq_fx.api.__all__) < set(dir(cgmq_fx))
    assert cgmq_fx.quantize is cgmq_fx.api.quantize
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert cgmq_fx.__version__ == listed
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        getattr(cgmq_fx, "quantise")  # noqa: B009 - a type checker would find the plain form


@pytest.mark.parametrize("module", ["cgmq_fx", "cgmq_fx.cli", "cgmq_fx.cost_models"])
def test_import_does_not_wait_for_torch(module: str, tmp_path: Path) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    assert run(sys.executable, "-c", code, cwd=tmp_path, python_path=str(ROOT)) == "False\n"


SLOW = {
    *("jinja2", "matplotlib", "networkx", "onnx", "onnxruntime", "pandas", "pint", "rich"),
    *("sympy", "torch._dynamo", "torch._inductor", "torch.onnx"),
}


def test_public_names_do_not_wait_for_what_only_some_of_them_use(tmp_path: Path) -> None:
    loaded = f"sorted({SLOW} & (sys.modules.keys() - before))"
    code = "import sys, torch; before = set(sys.modules); import cgmq_fx; cgmq_fx.quantize"
    code = f"{code}; print({loaded})"
    assert run(sys.executable, "-c", code, cwd=tmp_path, python_path=str(ROOT)) == "[]\n"


def test_first_use_takes_less_than_a_third_of_a_second_beyond_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processor time, for other work on the machine is not ours; with byte code, as installed.

    Where PyTorch's own import takes longer than a second, a third of that.
    """
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "bytecode"))
    code = (
        "from time import process_time as now; start = now(); import torch; before = now(); "
        "import cgmq_fx; cgmq_fx.quantize; print((now() - before) / max(1.0, before - start))"
    )
    command = (sys.executable, "-c", code)
    seconds = (float(run(*command, cwd=tmp_path, python_path=str(ROOT))) for _ in range(5))
    assert any(taken < 0.33 for taken in seconds)  # the first has to compile


ALLOWED = {
    "cost_models": ("cgmq_fx.cost_models",),
    "passes": ("cgmq_fx.cost_models", "cgmq_fx.passes"),
}


def imported_modules(source: str) -> Iterator[str]:
    """Yields the dotted name of everything that `source` imports; relative ones with their dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (f"{node.module}." if node.module else "")
            yield from (f"{origin}{alias.name}" for alias in node.names)


def forbidden_imports(layer: str, source: str) -> list[str]:
    """Returns the imports that reach out of what `layer` may import of this library."""
    return [
        module
        for module in imported_modules(source)
        if module.partition(".")[0] in ("", *FOLDERS)
        and not any(f"{module}.".startswith(f"{allowed}.") for allowed in ALLOWED[layer])
    ]


@pytest.mark.parametrize("layer", ALLOWED)
def test_lower_layer_does_not_import_upper_one(layer: str) -> None:
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    for file in files:
        assert forbidden_imports(layer, file.read_text()) == [], file


@pytest.mark.parametrize(
    ("layer", "source", "forbidden"),
    [
        ("cost_models", "import cgmq_fx.cost_models.facts", []),
        ("cost_models", "from cgmq_fx.cost_models import BOPs", []),
        ("cost_models", "from cgmq_fx import cost_models", []),
        ("cost_models", "import cgmq_fx_other, torch.fx.passes", []),
        ("cost_models", "from cgmq_fx.passes import capture", ["cgmq_fx.passes.capture"]),
        ("cost_models", "from cgmq_fx import passes", ["cgmq_fx.passes"]),
        ("cost_models", "def f():\n    import cgmq_fx", ["cgmq_fx"]),
        ("cost_models", "import passes.capture", ["passes.capture"]),
        ("cost_models", "from . import facts", [".facts"]),
        ("passes", "from cgmq_fx.passes.capture import capture", []),
        ("passes", "from cgmq_fx.cost_models import BOPs", []),
        ("passes", "from cgmq_fx.passes_more import x", ["cgmq_fx.passes_more.x"]),
        ("passes", "from cgmq_fx.controller import C", ["cgmq_fx.controller.C"]),
        ("passes", "from cost_models import BOPs", ["cost_models.BOPs"]),
    ],
)
def test_layer_check_itself(layer: str, source: str, forbidden: list[str]) -> None:
    assert forbidden_imports(layer, source) == forbidden


def run(*command: str, cwd: Path, python_path: str = "") -> str:
    environment = {**os.environ, "PYTHONPATH": python_path}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy so that nothing is left in, or taken from, the checkout."""
    source = tmp_path_factory.mktemp("source")
    for folder in (*FOLDERS, "benchmarks", "tests"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True)
    for file in ("pyproject.toml", "docs/pypi.md", "LICENSE"):
        (source / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, source / file)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    options = ("--no-deps", "--no-index", "--no-compile", "--quiet", "--target", str(target))
    run(sys.executable, "-m", "pip", "install", *options, str(wheel), cwd=target)
    return target


def test_wheel_holds_the_modules_and_nothing_else(wheel: Path) -> None:
    expected = {
        f"cgmq_fx/{file.relative_to(ROOT / 'cgmq_fx')}"
        for pattern in (
            "*.py",
            "cli/*.py",
            "exporters/*.py",
            "integrations/*.py",
            "py.typed",
            "templates/*",
        )
        for file in (ROOT / "cgmq_fx").glob(pattern)
    } | {
        f"cgmq_fx/{file.relative_to(ROOT)}"
        for layer in ("passes", "cost_models")
        for pattern in ("*.py", "*.cpp", "*.h", "targets/*.json")
        for file in (ROOT / layer).glob(pattern)
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected


def test_wheel_is_small(wheel: Path) -> None:
    """Code and templates only; 420 kB when this was written, of which docstrings are a fifth."""
    assert wheel.stat().st_size < 500_000


@pytest.mark.parametrize(
    "module", ["cgmq_fx", "cgmq_fx.cli", "cgmq_fx.passes", "cgmq_fx.cost_models"]
)
def test_wheel_imports_from_another_directory(module: str, installed: Path, tmp_path: Path) -> None:
    code = f"import {module}; print({module}.__file__)"
    printed = run(sys.executable, "-c", code, cwd=tmp_path, python_path=str(installed))
    assert Path(printed.strip()) == installed.joinpath(*module.split("."), "__init__.py")


def test_wheel_brings_its_targets(installed: Path, tmp_path: Path) -> None:
    code = (
        "from cgmq_fx.cost_models import load_target, target_names; "
        "print(*(load_target(name).name for name in target_names()))"
    )
    printed = run(sys.executable, "-c", code, cwd=tmp_path, python_path=str(installed))
    shipped = (ROOT / "cost_models" / "targets").glob("*.json")
    assert printed.split() == sorted(file.stem for file in shipped)


@pytest.mark.parametrize("name", ["passes", "cost_models", "benchmarks", "tests"])
def test_wheel_installs_no_generic_top_level_name(name: str, installed: Path) -> None:
    assert (installed / "cgmq_fx").is_dir()
    assert not (installed / name).exists()
