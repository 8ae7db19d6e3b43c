"""The shape of the code: layers, public names, generated pages, the README's example."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sys
import tokenize
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import adarank
from adarank.recipe import catalogue
from adarank.recipe.registry import METHODS

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "adarank"
# CONTRIBUTING.md has the same table. A package or file imports only from layers above its own.
LAYERS = [
    {"errors"},
    {"settings"},
    {"io"},
    {"data"},
    {"alignment"},
    {"models", "sparsify"},
    {"spectral", "method"},
    {"methods", "adapt"},
    {"modular", "calibration"},
    {"recipe"},
    {"outputs", "report", "analysis"},
    {"workflow"},
    {"api", "cli"},
    {"__main__"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    """Parts of adarank that a file imports, by their name under the package."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("adarank"):
            parts = node.module.split(".")[1:] or [alias.name for alias in node.names if alias.name != "__version__"]
            found |= {parts[0]} if node.module != "adarank" else set(parts)
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("adarank.")}
    return found


FILES = [p for p in sorted(SOURCE.rglob("*.py")) if p != SOURCE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    wrong = {name for name in imports(path) if name != own and LAYER[name] >= LAYER[own]}
    assert not wrong


def test_methods_and_adaptation_never_import_each_other() -> None:
    for own, other in (("methods", "adapt"), ("adapt", "methods")):
        for path in (SOURCE / own).rglob("*.py"):
            assert other not in imports(path)


FLAGS = {"adaptive", "modular", "trains", "learns", "task_aware"}
# Every class that derives from the contract, and what runs used to give: nobody asks which one it has before them.
KINDS = {
    *(kind.__name__ for kind in METHODS.built_in.values()),
    *("Method", "TaskAwareMethod", "CalibratedMethod", "Adapting", "AdaptiveMethod", "Modular", "Multitask", "Bundle"),
}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_nobody_tells_kinds_of_methods_apart(path: Path) -> None:
    """Not by a class that a method derives from, nor by a flag: the method is asked for what is needed of it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
        ):
            assert not KINDS & {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
        if isinstance(node, ast.MatchClass) and isinstance(node.cls, ast.Name):
            assert node.cls.id not in KINDS
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            assert node.attr not in FLAGS, node.attr


# What a family of methods is written with comes from one file; task-aware and calibrated methods have one of their own beside it.
CONTRACTS = {"method", "methods.base", "methods.task_aware.base", "methods.calibrated.base", "modular.base"}
METHOD_FILES = [
    path
    for package in ("methods", "modular")
    for path in sorted((SOURCE / package).rglob("*.py"))
    if path.stem != "__init__"
    and ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    not in CONTRACTS | {"methods.per_tensor", "modular.training"}
]


@pytest.mark.parametrize("path", METHOD_FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_method_imports_two_files_beside_its_contract(path: Path) -> None:
    named = set(re.findall(r"^\s*from adarank\.([\w.]+) import", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert len(named - CONTRACTS) <= 2, named


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_only_the_command_line_prints(path: Path) -> None:
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert "print" not in calls or path.is_relative_to(SOURCE / "cli")


WRITTEN = [
    path
    for folder in ("src", "tests", "benchmarks", "docs", "zoo", "examples", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_scripts_import_names_that_there_are() -> None:
    scripts = [path for path in WRITTEN if not path.is_relative_to(SOURCE)]
    imports = {
        (node.module, alias.name, path.name)
        for path in scripts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "adarank"
        for alias in node.names
    }
    assert not [(script, module, name) for module, name, script in imports if not _importable(module, name)]


def _importable(module: str, name: str) -> bool:
    package = importlib.import_module(module)
    submodule = hasattr(package, "__path__") and importlib.util.find_spec(f"{module}.{name}") is not None
    return hasattr(package, name) or submodule


@pytest.mark.parametrize("name", adarank.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    thing = getattr(adarank, name)
    assert inspect.getdoc(thing)
    for member, value in vars(thing).items() if inspect.isclass(thing) else ():
        if inspect.isfunction(value) and not member.startswith("_"):
            assert inspect.getdoc(value), f"{name}.{member}"


DOCUMENTED = (
    "io",
    "data",
    "alignment",
    "sparsify",
    "spectral",
    "models",
    "calibration",
    "methods",
    "method",
    "modular",
    "adapt",
    "recipe",
    "outputs",
    "report",
    "analysis",
    "workflow",
    "cli",
    "api.py",
    "settings.py",
    "errors.py",
)


def undocumented(body: list[ast.stmt], inside: str = "") -> list[str]:
    """Public functions, classes and methods without a docstring."""
    public = [
        node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    ]
    names = [inside + node.name for node in public if not ast.get_docstring(node)]
    for node in public:
        if isinstance(node, ast.ClassDef):
            names += undocumented(node.body, f"{inside}{node.name}.")
    return names


@pytest.mark.parametrize("package", DOCUMENTED)
def test_everything_public_has_a_docstring(package: str) -> None:
    place = SOURCE / package
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    names = {path.name: undocumented(ast.parse(path.read_text(encoding="utf-8")).body) for path in files}
    assert names
    assert not any(names.values()), names


TESTS = sorted((ROOT / "tests").rglob("*.py"))
REACHING = {"getattr", "setattr", "delattr", "hasattr", "patch"}


def private(dotted: str) -> bool:
    """Some part of a dotted name begins with one underscore."""
    return any(part.startswith("_") and not part.startswith("__") for part in dotted.split("."))


def private_names(tree: ast.AST) -> Iterator[str]:
    """What a program imports, takes of an object or has replaced that is private; also in a program that it has as text."""
    for node in ast.walk(tree):
        names: list[str] = []
        match node:
            case ast.Attribute():
                names = [node.attr]
            case ast.Import() | ast.ImportFrom():
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in REACHING:
                given = [part.value for part in node.args if isinstance(part, ast.Constant)]
                names = [text for text in given if isinstance(text, str)]
            case ast.Constant(value=str(text)) if "import " in text and "\n" in text:
                with suppress(SyntaxError):
                    yield from private_names(ast.parse(text))
        yield from filter(private, names)


@pytest.mark.parametrize("text", ["x._y", "from a import _b", "from a._b import c", "import a._b", "m.setattr(x, '_y', 1)",
                                  "m.setattr('a._b.c', 1)", "getattr(x, '_y')", "RUN = 'import a\\na._b()'"])  # fmt: skip
def test_private_names_are_seen(text: str) -> None:
    assert len(list(private_names(ast.parse(text)))) == 1


@pytest.mark.parametrize("path", TESTS, ids=lambda p: str(p.relative_to(ROOT / "tests")))
def test_tests_touch_nothing_private(path: Path) -> None:
    """Names of two underscores are the language's, and `os._exit` is the standard library's."""
    assert set(private_names(ast.parse(path.read_text(encoding="utf-8")))) <= {"_exit"}


@pytest.mark.parametrize("path", TESTS, ids=lambda p: p.stem)
def test_names_of_tests_are_short(path: Path) -> None:
    defined = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    ]
    assert not [node.name for node in defined if node.name.startswith("test_") and len(node.name) > 60]


def test_the_readmes_example_runs() -> None:
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    exec(compile(block.group(1), "README.md", "exec"), {})


def test_the_guides_method_is_half_way_to_the_average() -> None:
    block = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert block
    names: dict = {"__name__": "half"}
    exec(compile(block.group(1), "CONTRIBUTING.md", "exec"), names)
    half = names["Half"]
    base, one, two = ({"w": torch.full((2, 2), value)} for value in (0.0, 1.0, 3.0))
    assert torch.equal(adarank.merge(base, {"a": one, "b": two}, half)["w"], torch.ones(2, 2))
    assert torch.equal(adarank.merge(base, {"a": one, "b": two}, half(share=1))["w"], torch.full((2, 2), 2.0))
    assert catalogue.entry_of(half).formula == "W = W₀ + ½ mean_t τ_t"


SAYS_NOTHING = {"own", "found", "told", "asked", "untold", "bare", "strangers", "watched"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_identifiers_say_what_they_hold(path: Path) -> None:
    with tokenize.open(path) as file:
        names = {token.string for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.NAME}
    assert not names & SAYS_NOTHING


def _pages() -> dict:
    sys.path.insert(0, str(ROOT / "docs"))  # as when it is run
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PAGES


@pytest.mark.parametrize(
    "name", ["docs/methods.md", "docs/cli.md", "docs/results.md", "docs/adaptation.md", "README.md"]
)
def test_generated_pages_are_up_to_date(name: str) -> None:
    if name == "docs/cli.md" and sys.version_info[:2] != (3, 11):
        pytest.skip("argparse words its help differently in other versions of Python")
    assert (ROOT / name).read_text(encoding="utf-8") == _pages()[name](), f"run: python docs/build.py ({name})"


def test_nothing_of_a_machine_or_workplace_is_named() -> None:
    pattern = re.compile(r"/(?:work|home|root)/\w")
    for path in [
        *SOURCE.rglob("*.py"),
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "benchmarks").glob("*.py"),
        *(ROOT / "records").glob("*.jsonl"),
    ]:
        assert not pattern.search(path.read_text(encoding="utf-8")), path
