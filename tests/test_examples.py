"""What README and docs tell users to write: recipes are files that load and plan, commands parse, examples in docstrings run."""

from __future__ import annotations

import inspect
import re
import shlex
import shutil
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
import yaml

import adarank
from adarank.cli.main import parser
from adarank.recipe.plan import describe
from adarank.workflow.plan import plan
from text_zoo import make_zoo

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *EXAMPLES.rglob("*.md")} - {ROOT / "CHANGELOG.md"})
TEXT_TASKS = {"sentiment": 2, "entailment": 3, "topic": 3}


def blocks(language: str) -> list[Any]:
    """(page, text) of every fenced block of a language."""
    return [
        pytest.param(page, text, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, text in enumerate(
            re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        )
    ]


def recipes(folder: str) -> list[Any]:
    return [pytest.param(path, id=path.stem) for path in sorted((EXAMPLES / folder).glob("*.yaml"))]


@pytest.fixture(scope="module")
def user_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models where examples/text wants a user's, a recipe of them, and what merges of it wrote."""
    zoo = make_zoo(tmp_path_factory.mktemp("zoo"), tasks=TEXT_TASKS, positions=256)
    folder = tmp_path_factory.mktemp("user_folder")
    shutil.copytree(EXAMPLES / "text", folder, dirs_exist_ok=True)
    shutil.copytree(zoo / "models", folder / "models")
    (folder / "examples").symlink_to(EXAMPLES)
    (folder / "recipe.yaml").write_text("extends: adarank.yaml\nmerge_method: task_arithmetic\n")
    adarank.merge_recipe(folder / "recipe.yaml", folder / "merged")
    recipe = {**yaml.safe_load((folder / "adarank.yaml").read_text()), "merge_method": "emr"}
    (folder / "emr.yaml").write_text(yaml.safe_dump(recipe))
    adarank.merge_recipe(folder / "emr.yaml", folder / "bundle")
    return folder


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_a_recipe_in_the_docs_is_a_file_or_part_of_one(page: Path, text: str) -> None:
    named = re.match(r"# (examples/\S+)\n", text)
    if named:
        assert (ROOT / named.group(1)).read_text(encoding="utf-8") == text
        return
    values = yaml.safe_load(text)
    assert "models" not in values
    whole = yaml.safe_load((EXAMPLES / "demo-8" / "average.yaml").read_text()) | {"merge_method": "adarank"} | values
    for entry in [whole, *whole["models"]]:
        for key in {"base_model", "model"} & entry.keys():
            entry[key] = str(EXAMPLES / "demo-8" / entry[key])
    adarank.load_recipe(whole)


@pytest.mark.parametrize(("page", "text"), blocks("bash"))
def test_commands_in_the_docs_parse_and_name_what_exists(page: Path, text: str) -> None:
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0].startswith("scripts/"):
            assert (ROOT / words[0]).exists()
        if not words or words[0] != "adarank":
            continue
        options = vars(parser().parse_args(words[1:]))
        if options.get("recipe"):
            assert (ROOT / options["recipe"]).is_file() or (page.parent / options["recipe"]).is_file()


@pytest.mark.parametrize("path", recipes("demo-8"))
def test_recipes_of_the_shipped_experts_plan(path: Path) -> None:
    assert describe(adarank.open_job(adarank.load_recipe(path)))["tasks"]


@pytest.mark.parametrize("path", recipes("layers"))
def test_recipes_of_layers_and_stages_plan(path: Path) -> None:
    assert plan(path)["tasks"]


@pytest.mark.parametrize("path", recipes("text"))
def test_recipes_of_a_users_text_models_plan(path: Path, user_folder: Path) -> None:
    job = adarank.open_job(adarank.load_recipe(user_folder / path.name))
    assert set(describe(job)["tasks"]) <= set(TEXT_TASKS)


@pytest.mark.parametrize(
    "path", [*recipes("clip"), *recipes("minilm-8"), *recipes("adapters"), *recipes("language"), *recipes("sentences")]
)
def test_recipes_of_other_models_load(path: Path) -> None:
    assert adarank.load_recipe(path).experts


def test_the_bundle_pages_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    found = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "bundles.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found
    exec(compile(found.group(1), "bundles.md", "exec"), {})


def example_of(thing: Any) -> str:
    """The code under `Example:` in a docstring, or nothing."""
    section = re.search(r"^Example:\n((?: {4}.*(?:\n|$)|\n)+)", inspect.getdoc(thing) or "", re.MULTILINE)
    return dedent(section.group(1)) if section else ""


DOCUMENTED = {name: getattr(adarank, name) for name in adarank.__all__}
EXAMPLE_CODE = [pytest.param(code, id=name) for name, thing in DOCUMENTED.items() if (code := example_of(thing))]


@pytest.mark.parametrize("name", adarank.__all__)
def test_every_public_name_has_an_example(name: str) -> None:
    assert example_of(getattr(adarank, name))


@pytest.mark.parametrize("name", [n for n in adarank.__all__ if inspect.isfunction(getattr(adarank, n))])
def test_public_functions_document_what_goes_in_and_comes_out(name: str) -> None:
    thing = getattr(adarank, name)
    text = inspect.getdoc(thing) or ""
    for section in ("Arguments:", "Returns:", "Raises:"):
        assert re.search(rf"^{section}$", text, re.MULTILINE), section
    arguments = re.search(r"^Arguments:\n((?: {4}.*\n)+)", text, re.MULTILINE)
    assert arguments
    for parameter in inspect.signature(thing).parameters:
        assert re.search(rf"^ {{4}}(?:\w+, )*{parameter}(?:, \w+)*:", arguments.group(1), re.MULTILINE), parameter


@pytest.mark.parametrize("code", EXAMPLE_CODE)
def test_examples_in_docstrings_run(code: str, user_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(user_folder)
    torch.manual_seed(0)
    exec(compile(code, "example", "exec"), {"torch": torch, "adarank": adarank})


def _is_table(line: str) -> bool:
    return line.startswith("|")


def test_the_readmes_lines_and_tables_are_narrow() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert max(len(line) for line in lines if not _is_table(line)) <= 135
    assert max(line.count("|") - 1 for line in lines if _is_table(line)) <= 6


def test_the_readme_explains_its_terms_before_the_first_table() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before = text[: re.search(r"^\|", text, re.MULTILINE).start()]  # type: ignore[union-attr]
    assert all(f"**{term}**" in before for term in ("expert", "task vector", "λ"))
