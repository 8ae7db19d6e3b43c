"""Which model is the base, and what models are called: folders' names and labels change nothing of what is merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import adarank
from adarank.cli.main import main
from adarank.errors import DataError, RecipeError
from adarank.recipe.reader import load_recipe, parse_recipe
from adarank.recipe.schema import Recipe
from adarank.workflow.merge import merge
from make import State, close, near, same, save
from text_zoo import ADAPT, make_zoo, recipe

NAMES = {"model.embed_tokens.weight": (11, 6), "model.layers.0.up.weight": (6, 6), "lm_head.weight": (11, 6)}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models in folders called `base` and `a`, and one more called `base` elsewhere."""
    place = tmp_path_factory.mktemp("models")
    start = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for name, shape in NAMES.items()}
    for seed, path in enumerate(("base", "a", "other/base", "b")):
        save(place / path, near(start, seed) if seed else start, LLAMA)
    return place


def weights(folder: Path, name: str) -> State:
    return load_file(folder / name / "model.safetensors")


def parsed(folder: Path, models: list[Any], **more: Any) -> Recipe:
    listed = [m if isinstance(m, dict) else {"model": m} for m in models]
    return parse_recipe({"merge_method": "task_arithmetic", "models": listed, "device": "cpu", **more}, folder)


def merged(folder: Path, out: Path, models: list[Any], **more: Any) -> State:
    adarank.merge_recipe(parsed(folder, models, **more), out)
    assert not (out / "heads").exists()
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("listed", ["base", "base/", "./base", "a/../base"])
def test_linear_sums_a_base_that_is_called_base(folder: Path, tmp_path: Path, listed: str) -> None:
    models = [{"model": listed, "parameters": {"weight": 1.0}}, {"model": "a", "parameters": {"weight": 0.5}}]
    found = merged(folder, tmp_path / "out", models, merge_method="linear", base_model="base")
    start, own = weights(folder, "base"), weights(folder, "a")
    close(found, {name: (start[name] + 0.5 * own[name]) / 1.5 for name in NAMES})


@pytest.mark.parametrize("listed", ["base", "base/", "./base", "a/../base", "{folder}/base", "{folder}/base/"])
@pytest.mark.parametrize("given", ["base", "base/", "{folder}/base"])
def test_the_base_is_known_however_its_path_is_written(folder: Path, listed: str, given: str) -> None:
    listed, given = (text.format(folder=folder) for text in (listed, given))
    assert list(parsed(folder, [listed, "a"], base_model=given).experts) == ["a"]


def test_a_hub_model_that_ends_in_base_is_an_expert(folder: Path) -> None:
    models = ["org/roberta-base", "org/base", "org/base@main", "a"]
    recipe = parsed(folder, models, base_model="other-org/base")
    assert [entry.model for entry in recipe.experts.values()] == models
    assert "base" not in recipe.experts
    assert list(parsed(folder, ["org/base", "a"], merge_method="average").experts) == ["base", "a"]


def test_an_expert_called_base_merges_beside_the_base(folder: Path, tmp_path: Path) -> None:
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("other/base", "a")]
    found = merged(folder, tmp_path / "out", models, base_model="base")
    start, one, two = (weights(folder, name) for name in ("base", "other/base", "a"))
    close(found, {n: start[n] + 0.5 * (one[n] - start[n]) + 0.5 * (two[n] - start[n]) for n in NAMES})


def test_a_model_in_the_recipes_own_folder_is_called_by_it(folder: Path) -> None:
    assert list(parsed(folder / "a", [".", "../b"], base_model="../base").experts) == ["a", "b"]
    assert list(parsed(folder / "a", ["..", "../b"], base_model="../base").experts) == [folder.name, "b"]


def test_a_label_of_base_is_refused_and_the_remedy_works(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'base' cannot name a task here .* Give another one under task: name"):
        parsed(folder, [{"model": "b", "task": {"name": "base"}}, "a"], base_model="base")
    named = [{"model": "b", "task": {"name": "origin"}}, "a"]
    assert same(
        merged(folder, tmp_path / "named", named, base_model="base"),
        merged(folder, tmp_path / "out", ["b", "a"], base_model="base"),
    )


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "average"])
@pytest.mark.parametrize("labelled", [0, 1, 2])
def test_a_name_alone_changes_nothing_of_what_is_merged(
    folder: Path, tmp_path: Path, method: str, labelled: int
) -> None:
    models = [{"model": name} for name in ("b", "a", "base")]
    base = {} if method == "average" else {"base_model": "base"}
    plain = merged(folder, tmp_path / "plain", models, merge_method=method, **base)
    models[labelled] = {**models[labelled], "task": {"name": "mine"}}
    assert same(merged(folder, tmp_path / "named", models, merge_method=method, **base), plain)


def test_a_classifier_needs_more_than_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its head is refused as any other tensor that the base lacks, and what the error says to do works."""
    zoo = make_zoo(tmp_path / "zoo")
    named = [{"model": f"models/{task}", "task": {"name": task}} for task in ("mood", "colour")]
    assert main(["merge", str(recipe(zoo, models=named)), str(tmp_path / "out")]) == 1
    assert "'classifier.bias' is the head of a task, give the model its task: kind" in " ".join(
        capsys.readouterr().err.split()
    )
    told = [{**entry, "task": {**entry["task"], "kind": "text-classification"}} for entry in named]
    assert main(["merge", str(recipe(zoo, models=told)), str(tmp_path / "out")]) == 0
    assert load_recipe(recipe(zoo, models=told)).tasks.keys() == {"mood", "colour"}
    assert {path.name for path in (tmp_path / "out" / "heads").iterdir()} == {"mood", "colour"}


@pytest.mark.parametrize("withheld", ["null", "NaN", '""', "-1"])
def test_a_withheld_label_stops_no_adaptation(tmp_path: Path, withheld: str) -> None:
    zoo = make_zoo(tmp_path)
    lines = [f'{{"text": "good {"red " * (i % 7)}{i}", "label": {withheld if i % 3 else i % 2}}}' for i in range(40)]
    (zoo / "data" / "mood.jsonl").write_text("\n".join(lines))
    models = [{"model": f"models/{t}", "task": {"name": t, "data": f"data/{t}.{e}"}}
              for t, e in (("mood", "jsonl"), ("colour", "tsv"))]  # fmt: skip
    path = recipe(zoo, **{**ADAPT, "adapt": {"steps": 1}}, models=models)
    merge(load_recipe(path), tmp_path / "out")
    with pytest.raises(DataError, match="rows carry no labels"):
        adarank.evaluate_recipe(path)


def test_a_label_beyond_two_unnamed_classes_is_refused(tmp_path: Path, capsys: Any) -> None:
    zoo = make_zoo(tmp_path)
    config = zoo / "models" / "mood" / "config.json"
    values = json.loads(config.read_text())
    del values["id2label"], values["label2id"]  # as transformers writes a configuration of two classes
    config.write_text(json.dumps(values))
    (zoo / "data" / "mood.tsv").write_text("text\tlabel\n" + "".join(f"good {i}\t{i % 3}\n" for i in range(30)))
    with pytest.raises(DataError, match="row 3 has label '2'; the expert knows 0 to 1"):
        adarank.evaluate_recipe(recipe(zoo))


def test_some_rows_without_labels_are_counted(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path)
    rows = "".join(f"good {'red ' * (i + 1)}\t{-1 if i < 2 else i % 2}\n" for i in range(8))
    (zoo / "data" / "mood.tsv").write_text("text\tlabel\n" + rows)
    with pytest.raises(DataError, match=r"of [0-9]+ rows carry no labels.*or take the rows with label -1 out"):
        adarank.evaluate_recipe(recipe(zoo, data={"adapt": 0.0, "select": 0.0, "test": 1.0}))
