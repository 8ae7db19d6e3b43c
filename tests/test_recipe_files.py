"""Recipe files: parents, relative paths, and the folders of models that they name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from adarank.cli.main import main
from adarank.errors import CheckpointError, RecipeError
from adarank.methods import CART, SVDk
from adarank.recipe.job import open_job
from adarank.recipe.reader import load_recipe, parse_recipe
from adarank.recipe.schema import Recipe
from make import models_on_disk

NAMES = ["encoder.layer.0.weight", "encoder.layer.1.weight", "encoder.layer.1.mlp.weight"]


def parsed(text: str | Mapping[str, Any], folder: Path = Path(".")) -> Recipe:
    return parse_recipe(yaml.safe_load(text) if isinstance(text, str) else text, folder)


def plain(method: str = "average", **more: Any) -> dict[str, Any]:
    return {"merge_method": method, "base_model": "base", "models": [{"model": "a"}, {"model": "b"}], **more}


def write(path: Path, values: Mapping[str, Any] | str) -> Path:
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(dict(values)))
    return path


def test_extends_gives_the_keys_that_the_file_does_not(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", plain("cart", parameters={"rank": 0.5}, seed=3))
    write(tmp_path / "b.yaml", {"extends": "a.yaml", "merge_method": "svd_k"})
    recipe = load_recipe(write(tmp_path / "c.yaml", {"extends": "b.yaml", "seed": 9}))
    assert (recipe.merge_method, recipe.seed, recipe.base_model) == ("svd_k", 9, "base")
    method = recipe.method(NAMES)
    assert isinstance(method, SVDk)
    assert method.rank == 0.5


@pytest.mark.parametrize("chain", [["a"], ["b", "a"], ["b", "c", "a"]])
def test_a_recipe_that_extends_itself_is_refused(tmp_path: Path, chain: list[str]) -> None:
    for name, parent in zip(["a", *chain], chain, strict=False):
        write(tmp_path / f"{name}.yaml", {"extends": f"{parent}.yaml"})
    with pytest.raises(RecipeError, match="extends itself"):
        load_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize("parent", ["none.yaml", "sub/x.yaml", "../x.yaml", 3, ["a.yaml"]])
def test_a_parent_that_is_no_recipe_beside_it_is_refused(tmp_path: Path, parent: Any) -> None:
    with pytest.raises(RecipeError, match="yaml"):
        load_recipe(write(tmp_path / "a.yaml", {"extends": parent, **plain()}))


@pytest.mark.parametrize("content", ["", "- a", "a: [", "3", "a: b: c", "\t- x"])
def test_a_file_that_is_no_mapping_is_refused_with_its_name(tmp_path: Path, content: str) -> None:
    with pytest.raises(RecipeError, match=r"bad\.yaml"):
        load_recipe(write(tmp_path / "bad.yaml", content))


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: no such recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_relative_paths_count_from_the_recipes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models_on_disk(tmp_path / "other")
    values = plain("cart", base_model="models/base", models=[{"model": "experts/a"}, {"model": "./experts/b"}])
    file = write(tmp_path / "other" / "recipe.yaml", values)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for path in (file, Path("../other/recipe.yaml")):
        job = open_job(load_recipe(path))
        assert job.network.tasks == ("a", "b")
        assert isinstance(job.recipe.method([]), CART)


def test_all_checkpoints_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    models_on_disk(tmp_path)
    values = plain(base_model="models/base", models=[{"model": "experts/a"}, {"model": "./x"}, {"model": "./y"}])
    with pytest.raises(CheckpointError, match="2 checkpoints") as caught:
        open_job(load_recipe(write(tmp_path / "r.yaml", values)))
    assert all(str(tmp_path / name) in str(caught.value) for name in "xy")


def test_an_expert_called_base_is_not_taken_for_the_base(tmp_path: Path) -> None:
    models_on_disk(tmp_path, ("base", "b"))
    values = plain(base_model="models/base", models=[{"model": "experts/base"}, {"model": "experts/b"}])
    job = open_job(load_recipe(write(tmp_path / "r.yaml", values)))
    assert list(job.experts) == ["base-1", "b"]
    assert job.experts["base-1"].path == tmp_path / "experts" / "base"
    assert job.base is not None
    assert job.base.path == tmp_path / "models" / "base"


def test_half_of_a_character_is_answered_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('merge_method: average\nmodels: [{model: a}, {model: b}]\n"\\ud800": cpu\n')
    assert main(["plan", str(recipe)]) == 1
    assert "a key: has half of a character" in capsys.readouterr().err
