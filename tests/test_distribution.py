"""What is built and installed: the demo travels with the package, and the command starts without PyTorch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from adarank.cli.threads import wait_passively
from adarank.workflow import demo

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = {p.relative_to(demo.ZOO.parent).as_posix() for p in demo.ZOO.rglob("*") if p.is_file()}
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"


def run(command: list[str], folder: Path, **environment: str) -> str:
    """What a command says, run in a folder without the variables that are about threads and modules."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "KMP_", "PYTHON"))}
    done = subprocess.run(command, cwd=folder, env={**clean, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources as an archive, built from a copy of what it is made of."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("sdist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    run([sys.executable, "-c", BUILD, "sdist", str(out)], tree)
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the archive of the sources, as an installer would without one."""
    tree, out = tmp_path_factory.mktemp("unpacked"), tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(tree, filter="data")
    run([sys.executable, "-c", BUILD, "wheel", str(out)], next(tree.iterdir()))
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but what the wheel installs."""
    folder = tmp_path_factory.mktemp("installed")
    install = ["install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(folder), str(wheel)]
    run([sys.executable, "-m", "pip", "--disable-pip-version-check", *install], folder)
    return folder


def test_the_sdist_has_the_whole_demo(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/src/adarank/")[2] for name in archive.getnames()}
    assert names >= SHIPPED


def test_the_wheel_has_the_package_and_the_whole_demo(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name.removeprefix("adarank/") for name in archive.namelist() if name.startswith("adarank/")}
    source = demo.ZOO.parent
    pages = [
        path
        for place in ("report/template", "recipe/suite_files")
        for path in (source / place).iterdir()
        if path.is_file()
    ]
    written = {path.relative_to(source).as_posix() for path in (*source.rglob("*.py"), *pages)}
    assert names == SHIPPED | written | {"py.typed"}


def test_the_installed_demo_can_be_planned_elsewhere(installed: Path, tmp_path: Path) -> None:
    """Every file has its hash, and recipe, checkpoints and data open, with nothing of the repository."""
    code = "from adarank.workflow import demo; demo.check_zoo(demo.ZOO); print(demo.ZOO)"
    zoo = Path(run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(installed)).strip())
    assert zoo.is_relative_to(installed)
    command = [str(installed / "bin" / "adarank"), "plan", str(zoo / "recipe.yaml")]
    assert "gtsrb" in run(command, tmp_path, PYTHONPATH=str(installed), OMP_NUM_THREADS="1")


@pytest.mark.slow
def test_the_installed_quick_demo_runs_elsewhere(installed: Path, tmp_path: Path) -> None:
    command = [str(installed / "bin" / "adarank"), "demo", "--quick", "--threads", "1", "--json"]
    table = json.loads(run(command, tmp_path, PYTHONPATH=str(installed)))
    assert list(table["rows"]) == ["experts", "base", *demo.ROWS]
    assert (tmp_path / "adarank-demo" / "adarank.json").exists()


# A program that ends where it would import PyTorch, and says what its threads would do.
STOP_AT_PYTORCH = """
import os, runpy, sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("KMP_BLOCKTIME"))
            sys.exit(0)
sys.meta_path.insert(0, Stop())
sys.argv = sys.argv[1:]
if sys.argv[0] == "adarank":
    from adarank.cli.main import main
    main()
else:
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
sys.exit("PyTorch was never imported")
"""
HERE = str(demo.ZOO.parent.parent)
BENCHMARKS = [p for p in sorted((ROOT / "benchmarks").glob("*.py")) if "torch.set_num_threads(" in p.read_text()]


def threads_of(command: list[str], folder: Path, environment: Mapping[str, str]) -> str:
    """OMP_WAIT_POLICY and KMP_BLOCKTIME as PyTorch would find them."""
    return run([sys.executable, "-c", STOP_AT_PYTORCH, *command], folder, PYTHONPATH=HERE, **environment).strip()


@pytest.mark.parametrize(
    ("environment", "seen"),
    [
        ({}, "PASSIVE 0"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
        ({"OMP_WAIT_POLICY": "ACTIVE", "KMP_BLOCKTIME": "200"}, "ACTIVE 200"),
        ({"KMP_BLOCKTIME": "1"}, "PASSIVE 1"),
    ],
)
def test_threads_wait_passively_unless_the_user_says_otherwise(
    environment: Mapping[str, str], seen: str, tmp_path: Path
) -> None:
    assert threads_of(["adarank", "methods", "cart"], tmp_path, environment) == seen


@pytest.mark.parametrize("path", [p for p in BENCHMARKS if "--threads" in p.read_text()], ids=lambda p: p.stem)
def test_benchmarks_of_several_threads_wait_passively(path: Path, tmp_path: Path) -> None:
    assert threads_of([str(path), "--help"], tmp_path, {}) == "PASSIVE 0"
    assert threads_of([str(path), "--help"], tmp_path, {"OMP_WAIT_POLICY": "ACTIVE"}) == "ACTIVE None"


def test_nothing_is_set_once_pytorch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    wait_passively()
    assert "OMP_WAIT_POLICY" not in os.environ
    assert "KMP_BLOCKTIME" not in os.environ


@pytest.mark.parametrize(
    "code", ["import adarank; dir(adarank)", "from adarank.cli.main import parser; parser().format_help()"]
)
def test_neither_import_nor_help_loads_pytorch(code: str, tmp_path: Path) -> None:
    code += "; import sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert run([sys.executable, "-c", code], tmp_path, PYTHONPATH=HERE).strip() == "[]"


def test_submodules_never_take_the_place_of_functions(tmp_path: Path) -> None:
    code = (
        "import adarank.adapt.settings, adarank.workflow.evaluate; import adarank; "
        "print(adarank.adapt.__module__, adarank.evaluate.__module__)"
    )
    assert run([sys.executable, "-c", code], tmp_path, PYTHONPATH=HERE).strip() == "adarank.api adarank.api"


def test_releases_test_every_python_and_start_by_hand() -> None:
    """The workflow's Pythons are those from the oldest that is supported on, and nothing but a person starts it."""
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    oldest = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest
    pythons = flow["jobs"]["wheel"]["strategy"]["matrix"]["python"]
    assert pythons == [f"3.{minor}" for minor in range(int(oldest[1]), 15)]
    assert list(flow[True]) == ["workflow_dispatch"]  # YAML 1.1 reads the key `on` as true
    assert flow["jobs"]["publish"]["needs"] == "wheel"
    assert [name for name, job in flow["jobs"].items() if "id-token" in job.get("permissions", {})] == ["publish"]
