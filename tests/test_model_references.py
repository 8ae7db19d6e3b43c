"""mergekit's ways to refer to a model: mappings, revisions, adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adarank.errors import AdaRankError, CheckpointError, RecipeError
from adarank.recipe.job import open_job
from adarank.recipe.reader import parse_recipe
from adarank.recipe.schema import Recipe
from make import family, save

CONFIG = {"num_hidden_layers": 2}


def recipe(model: Any, base: Any = "start", folder: Path = Path()) -> Recipe:
    values = {"merge_method": "task_arithmetic", "base_model": base, "models": [{"model": model}]}
    return parse_recipe(values, folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base, experts = family(1)
    save(tmp_path / "start", base, CONFIG)
    save(tmp_path / "one", experts["task0"], CONFIG)
    save(tmp_path / "c++", experts["task0"], CONFIG)
    return tmp_path


FORMS: list[tuple[Any, str]] = [
    ("org/name@v1", "org/name@v1"), ({"path": "org/name", "revision": "v1"}, "org/name@v1"),
    ({"model": "org/name", "revision": "v1", "lora": None}, "org/name@v1"), ({"model": "one"}, "one"),
    ({"model": {"path": "org/name", "revision": "v1"}, "lora": None}, "org/name@v1"), ({"model": {"path": "one"}}, "one"),
    ({"model": "one", "lora": "adapter"}, "one+adapter"), ("org/name@v1+org/adapter", "org/name@v1+org/adapter"),
    ({"model": {"path": "one"}, "lora": {"path": "org/adapter", "revision": "v2"}}, "one+org/adapter@v2"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "text"), FORMS)
def test_every_form_of_a_reference_is_read(given: Any, text: str) -> None:
    assert recipe("another", base=given).base_model == text
    assert [entry.model for entry in recipe(given).models] == [text]


@pytest.mark.parametrize("adapted", ["one+missing", "org/model+org/missing", "org/model@v1+org/missing"])
@pytest.mark.parametrize("as_base", [False, True])
def test_an_adapter_that_is_not_there_is_named(adapted: str, as_base: bool, folder: Path) -> None:
    model = adapted.partition("+")[0]
    given = recipe("one", adapted, folder) if as_base else recipe(adapted, "start", folder)
    with pytest.raises(CheckpointError, match="missing: no such adapter" if model == "one" else "org/model"):
        open_job(given)


@pytest.mark.parametrize(("given", "text"), [
    ({"model": "one", "lora": 3}, "lora is the path"), ({"model": "one+a", "lora": "b"}, "its adapter twice"),
    ({"model": "one", "override_architecture": "x"}, "has no override_architecture"),
    ({"revision": "v1"}, "needs one of model and path"), ({"path": 3}, "are texts"),
    ({"path": "one@v1", "revision": "v2"}, "its revision twice"),
])  # fmt: skip
def test_other_mappings_are_refused_with_the_reason(given: Any, text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        recipe(given)


def test_a_folder_with_a_plus_in_its_name_is_read(folder: Path) -> None:
    assert list(open_job(recipe("c++", "start", folder)).experts) == ["c++"]


def test_every_adapter_that_is_not_there_is_named_at_once(folder: Path) -> None:
    values = {"merge_method": "task_arithmetic", "base_model": "start", "models": [{"model": "start+two"}, {"model": "start+three"}]}  # fmt: skip
    with pytest.raises(AdaRankError, match=r"(?s)two: no such adapter.*three: no such adapter"):
        open_job(parse_recipe(values, folder))


def test_an_adapter_beside_its_model_is_as_inside_of_it() -> None:
    values = {"merge_method": "task_arithmetic", "base_model": "start"}
    beside = parse_recipe({**values, "models": [{"model": "one", "lora": "adapter"}]}, Path())
    assert [entry.model for entry in beside.models] == ["one+adapter"]
    assert [entry.model for entry in recipe({"model": "one", "lora": "adapter"}).models] == ["one+adapter"]
    assert list(beside.experts) == ["adapter"]
