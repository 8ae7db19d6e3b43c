"""Recipes: mergekit's dialect is read, mistakes are sentences, all at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import adarank
import text_zoo
from adarank.adapt import ADAPTIVE, AdaptiveMethod
from adarank.errors import CheckpointError, RecipeError
from adarank.methods import METHODS, Linear, TaskArithmetic
from adarank.recipe.job import open_job
from adarank.recipe.reader import load_recipe, parse_recipe
from adarank.recipe.schema import Recipe
from adarank.settings import Settings
from make import models_on_disk

NAMES = ["encoder.layer.0.weight", "encoder.layer.1.weight", "encoder.layer.1.mlp.weight"]
LINEAR = """
models:
  - model: org/first
    parameters: {weight: 0.3}
  - model: org/second
    parameters:
      weight: [0, 1]
merge_method: linear
dtype: float16
parameters: {normalize: false}
"""
ARITHMETIC = """
models:
  - model: org/base
  - model: org/first
    parameters:
      weight:
        - filter: mlp
          value: 0.5
        - value: 1.0
  - model: org/second
    parameters: {weight: 0.25}
merge_method: task_arithmetic
base_model: org/base
parameters: {normalize: false, lambda: 0.9}
dtype: float32
out_dtype: bfloat16
tokenizer_source: base
"""
ADAPTIVE_RECIPE: dict[str, Any] = {
    "merge_method": "adarank",
    "base_model": "base",
    "models": [{"model": t, "task": {"data": f"{t}.tsv"}} for t in ("cola", "sst2")],
    "adapt": {"steps": 7, "preset": "roberta-7-cart"},
}


def parsed(text: str | Mapping[str, Any], folder: Path = Path(".")) -> Recipe:
    return parse_recipe(yaml.safe_load(text) if isinstance(text, str) else text, folder)


def plain(method: str = "average", **more: Any) -> dict[str, Any]:
    return {"merge_method": method, "base_model": "base", "models": [{"model": "a"}, {"model": "b"}], **more}


def message(values: Mapping[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(values, Path("."))
    return str(caught.value)


# mergekit's dialect


def test_a_linear_file_of_mergekit_is_read() -> None:
    recipe = parsed(LINEAR)
    method = recipe.method(NAMES)
    assert isinstance(method, Linear)
    assert [method.normalize.of("", name) for name in NAMES] == [0, 0, 0]
    assert [method.weight.of("first", name) for name in NAMES] == [0.3, 0.3, 0.3]
    assert [method.weight.of("second", name) for name in NAMES] == [0.0, 1.0, 1.0]
    assert recipe.output_dtype() == torch.float16


def test_a_task_arithmetic_file_of_mergekit_is_read() -> None:
    recipe = parsed(ARITHMETIC)
    assert list(recipe.experts) == ["first", "second"]
    method = recipe.method(NAMES)
    assert isinstance(method, TaskArithmetic)
    assert method.scale is not None
    assert {method.scale.of("", name) for name in NAMES} == {0.9}
    assert method.weight is not None
    assert [method.weight.of("first", name) for name in NAMES] == [1.0, 1.0, 0.5]
    assert method.weight.of("second", NAMES[0]) == 0.25
    assert recipe.output_dtype() == torch.bfloat16


def test_the_base_among_the_models_counts_in_linear_only() -> None:
    models = [{"model": "root"}, {"model": "a"}, {"model": "b"}]
    assert list(parsed(plain("linear", base_model="root", models=models)).experts) == ["root", "a", "b"]
    for name in ("average", "task_arithmetic", "svd_k", "cart"):
        assert list(parsed(plain(name, base_model="root", models=models)).experts) == ["a", "b"]


def test_a_global_weight_is_the_default_of_models_that_give_none() -> None:
    models = [{"model": "a", "parameters": {"weight": 2}}, {"model": "b"}]
    method = parsed({**plain("linear", models=models, parameters={"weight": 0.5}), "base_model": None}).method(NAMES)
    assert isinstance(method, Linear)
    assert [method.weight.of(task, NAMES[0]) for task in "ab"] == [2.0, 0.5]


@pytest.mark.parametrize(("key", "value", "remedy"), [
    ("modules", {"text_decoder": {"slices": []}}, "list whole models under models"),
])  # fmt: skip
def test_what_mergekit_has_and_this_has_not_is_refused_by_name(key: str, value: Any, remedy: str) -> None:
    text = message({**plain(), key: value})
    assert f"'{key}' is not supported" in text
    assert remedy in text
    assert "unknown key" not in text


@pytest.mark.parametrize("key", ["slices", "modules", "tokenizer", "tokenizer_source", "chat_template"])
def test_keys_of_mergekit_without_a_value_ask_for_nothing(key: str) -> None:
    assert parsed(plain(**{key: None})).tokenizer_source is None


def test_all_of_mergekits_unsupported_keys_come_at_once() -> None:
    text = message({**plain(), "modules": {"text_decoder": {"slices": []}}})
    assert "'modules'" in text


@pytest.mark.parametrize("names", [["a", "a"], ["a", "a", "b", "a"], ["a", "a", "a-1"], ["a-2", "a", "a"]])
def test_models_of_one_name_stay_apart(names: list[str]) -> None:
    recipe = parsed(plain(models=[{"model": f"dir{i}/{name}"} for i, name in enumerate(names)]))
    assert len(recipe.experts) == len(names)
    assert [entry.model for entry in recipe.experts.values()] == [f"dir{i}/{name}" for i, name in enumerate(names)]


@pytest.mark.parametrize(
    ("reference", "name"), [("org/cola", "cola"), ("org/cola@main", "cola"), ("./runs/cola/", "cola")]
)
def test_a_task_is_called_by_the_last_part_of_its_model(reference: str, name: str) -> None:
    assert list(parsed(plain(models=[{"model": reference}])).experts) == [name]
    named = parsed(plain(models=[{"model": reference, "task": {"name": "mine"}}]))
    assert list(named.experts) == ["mine"]


@pytest.mark.parametrize("name", ["../../x", "a/b", "/x", "..", ""])
def test_a_task_name_that_is_no_folder_name_is_refused(name: str) -> None:
    """Outputs hold a folder heads/NAME per task."""
    try:
        tasks = parsed(plain(models=[{"model": "org/cola", "task": {"name": name}}])).experts
    except RecipeError:
        return
    assert all(task and "/" not in task and task != ".." for task in tasks)


# Mistakes


@pytest.mark.parametrize(("values", "sentence"), [
    ({"merge_metod": "x"}, "merge_metod: unknown key. Did you mean 'merge_method'?"),
    ({"base_mdel": "x"}, "base_mdel: unknown key. Did you mean 'base_model'?"),
    ({"models": [{"model": "a", "parametrs": {}}]}, "models.0.parametrs: unknown key. Did you mean 'parameters'?"),
    ({"models": [{"model": "a", "task": {"metrc": "x"}}]}, "models.0.task.metrc: unknown key. Did you mean 'metric'?"),
    ({"models": [{"model": "a", "task": {"columns": {"txt": "s"}}}]}, "columns.txt: unknown key. Did you mean 'text'?"),
    ({"adapt": {"stps": 3}}, "adapt.stps: unknown key. Did you mean 'steps'?"),
    ({"select": {"kep": ["x"]}}, "select.kep: unknown key. Did you mean 'keep'?"),
    ({"data": {"protocl": "x"}}, "data.protocl: unknown key. Did you mean 'protocol'?"),
    ({"merge_method": "adarnk"}, "unknown merge_method 'adarnk'. Did you mean 'adarank'?"),
    ({"models": [{"model": "a", "task": {"data": {"adpt": "x.tsv", "test": "y.tsv"}}}]}, "adpt: unknown key. Did you mean 'adapt'?"),
])  # fmt: skip
def test_a_mistyped_name_is_answered_with_the_nearest(values: dict[str, Any], sentence: str) -> None:
    assert sentence in message({**plain(), **values})


def test_all_problems_come_at_once() -> None:
    text = message({"merge_method": "cart", "models": [{"modle": "a"}], "adapt": {"steps": "x"}, "sed": 3})
    assert all(part in text for part in ("models.0.modle", "models.0.model", "adapt.steps", "sed: unknown key"))


def test_all_problems_between_fields_come_at_once() -> None:
    models = [{"model": "a", "parameters": {"rank": 0.5}}, {"model": "b", "parameters": {"weigt": 1}}]
    text = message({"merge_method": "task_arithmetic", "models": models, "adapt": {"steps": 3}})
    assert "4 problem" in text
    assert all(
        part in text for part in ("adapt:", "'a' has parameter 'rank'", "'b' has parameter 'weigt'", "base_model:")
    )
    assert "Did you mean 'weight'" in text


def test_problems_of_an_adaptive_method_come_with_all_others() -> None:
    text = message(
        {**ADAPTIVE_RECIPE, "base_model": None, "parameters": {"rnk": 0.1}, "adapt": {"preset": "robeta-7-cart"}}
    )
    assert "base_model" in text
    assert "rnk" in text or "robeta" in text


@pytest.mark.parametrize("method", METHODS)
def test_an_adapt_block_is_refused_where_nothing_adapts(method: str) -> None:
    text = message(plain(method, adapt={"steps": 3}))
    assert f"'{method}' does not adapt" in text
    assert all(name in text for name in ADAPTIVE)


@pytest.mark.parametrize("method", ["average", "svd_k", "cart", "masked"])
def test_a_model_parameter_unknown_to_the_method_is_refused(method: str) -> None:
    models = [{"model": "a", "parameters": {"weight": 1}}]
    assert f"'a' has parameter 'weight', which '{method}' does not take" in message(plain(method, models=models))


@pytest.mark.parametrize(("method", "parameters", "part"), [
    ("cart", {"rank": "much"}, "rank"), ("cart", {"rank": 2}, "rank"), ("svd_k", {"lambda": [1]}, "lambda"),
    ("svd_k", {"lamda": 1}, "Did you mean 'lambda'"), ("linear", {"normalize": "perhaps"}, "normalize"),
    ("average", {"rank": 1}, "rank: unknown key"), ("task_arithmetic", {"weights": 1}, "weights"),
    ("masked", {}, "masks"), ("linear", {"weight": "heavy"}, "weight"),
])  # fmt: skip
def test_parameters_of_wrong_type_or_name_are_refused(method: str, parameters: dict[str, Any], part: str) -> None:
    with pytest.raises(RecipeError, match=part):
        parsed({**plain(method, parameters=parameters), "base_model": None if method == "linear" else "base"}).method(
            NAMES
        )


@pytest.mark.parametrize("values", [
    {"models": []}, {"models": None}, {"models": "a"}, {"models": ["a"]}, {"models": [{"model": "base"}]}, {"models": {}},
    {"merge_method": 3}, {"dtype": "int8"}, {"seed": "x"}, {"parameters": [1]},
    {"data": {"adapt": 0.9}}, {"select": {"keep": 3}}, {"device": 3},
])  # fmt: skip
def test_values_of_the_wrong_kind_are_refused(values: dict[str, Any]) -> None:
    assert next(iter(values)) in message({**plain(), **values})


@pytest.mark.parametrize("method", ["task_arithmetic", "svd_k", *ADAPTIVE])
def test_methods_about_the_base_need_one(method: str) -> None:
    values = {**ADAPTIVE_RECIPE, "merge_method": method, "base_model": None, "adapt": None}
    assert f"base_model: '{method}' needs the model" in message(values)


@pytest.mark.parametrize("method", ["average", "linear", "cart"])
def test_methods_about_the_experts_need_no_base(method: str) -> None:
    assert parsed(plain(method, base_model=None)).base_model is None


# Adaptive recipes


def test_adaptation_has_the_preset_first_and_the_recipe_on_top() -> None:
    method = parsed({**ADAPTIVE_RECIPE, "parameters": {"rank": 0.5}}).method()
    assert isinstance(method, AdaptiveMethod)
    settings = method.settings
    assert (method.rank, method.scale, method.origin) == (0.5, 1.6, "average")
    assert (settings.steps, settings.batch_size, settings.lr_masks) == (7, 8, 1e-4)


def test_tasks_without_data_are_named() -> None:
    models = [{"model": "cola"}, {"model": "sst2", "task": {"data": "x.tsv"}}, {"model": "rte", "task": {}}]
    text = message({**ADAPTIVE_RECIPE, "models": models})
    assert "'cola' has no task with data" in text
    assert "'rte' has no task with data" in text
    assert "'sst2'" not in text


def test_tasks_of_different_kinds_are_refused() -> None:
    kinds = ["text-classification", "image-classification"]
    models = [{"model": k, "task": {"kind": k, "data": "x.tsv"}} for k in kinds]
    assert all(kind in message({**ADAPTIVE_RECIPE, "models": models}) for kind in kinds)


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    assert "Did you mean 'roberta-7-cart'" in message({**ADAPTIVE_RECIPE, "adapt": {"preset": "roberta-7-crt"}})


# Files


def write(path: Path, values: Mapping[str, Any] | str) -> Path:
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(dict(values)))
    return path


def test_weights_that_sum_to_zero_are_refused_before_any_work(tmp_path: Path) -> None:
    models_on_disk(tmp_path)
    models = [{"model": f"experts/{n}", "parameters": {"weight": w}} for n, w in (("a", 1), ("b", -1))]
    with pytest.raises(RecipeError, match="sum to 0"):
        open_job(load_recipe(write(tmp_path / "r.yaml", plain("linear", models=models, base_model=None))))


def test_linear_with_a_base_that_has_no_weight_is_refused() -> None:
    """Nor does mergekit take it: it would be one of the models, of no weight."""
    models = [{"model": "a", "parameters": {"weight": 1}}]
    assert "List the base among the models" in message({**plain("linear", models=models), "base_model": "b"})


def test_uncovered_tensors_fall_back_to_the_global_weight() -> None:
    models = [{"model": "a", "parameters": {"weight": [{"filter": "no such part", "value": 3}]}}]
    values = {**plain("linear", models=models, parameters={"weight": 0.5}), "base_model": None}
    method = parsed(values).method(NAMES)
    assert isinstance(method, Linear)
    assert method.weight.of("a", NAMES[0]) == 0.5


def test_empty_parameters_are_none() -> None:
    assert parsed(plain("cart", parameters=None)).parameters == {}


@pytest.mark.parametrize(
    ("device", "text"),
    [
        ("gpu", "'gpu' is not a valid device"),
        ("mps", "'mps' is not supported"),
        ("cuda:99", "PyTorch sees [0-9]+ CUDA"),
    ],
)
def test_a_device_that_is_not_there_is_refused_at_once(device: str, text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        parse_recipe({"merge_method": "average", "models": [{"model": "a"}], "device": device}, Path("."))


def test_two_tasks_of_one_name_are_one_problem() -> None:
    models = [{"model": m, "task": {"name": "mood", "data": "x.tsv"}} for m in "ab"]
    with pytest.raises(RecipeError, match=r"1 problem\(s\)\.\n  models: 2 tasks are called 'mood'"):
        parse_recipe({"merge_method": "average", "models": models}, Path("."))
    models = [{"model": m, "task": {"name": m, "data": "x.tsv"}} for m in "ab"]
    with pytest.raises(RecipeError, match=r"1 problem\(s\)\.\n  parameters of 'adarank': rank"):
        parse_recipe({"merge_method": "adarank", "base_model": "base", "models": models, "parameters": {"rank": "high"}}, Path("."))  # fmt: skip


def test_wrong_kinds_are_told_in_a_users_words(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"models\.0\.task: a mapping of settings is needed, got 'sentiment'"):
        parse_recipe({"merge_method": "average", "models": [{"model": "a", "task": "sentiment"}]}, tmp_path)
    with pytest.raises(RecipeError, match="models: a list is needed, got 'a'"):
        parse_recipe({"merge_method": "average", "models": "a"}, tmp_path)
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        adarank.load_task(tmp_path / "nowhere", "a")


@pytest.mark.parametrize(
    ("method", "given", "kinds"),
    [
        ("cart", {}, ["CART"]),
        ("regmean", {}, ["RegMean"]),
        ("adarank", {"adapt": {"steps": 1}}, ["AdaRank", "AdaptSettings"]),
        ("multitask", {"parameters": {"steps": 1}}, ["Multitask"]),
        (
            "surgery",
            {"parameters": {"start": {"merge_method": "adarank", "adapt": {"steps": 1}}}},
            ["Surgery", "AdaptSettings", "AdaptBlock", "AdaRank", "AdaptSettings"],
        ),
    ],
)
def test_settings_are_parsed_once(
    text: Path, monkeypatch: pytest.MonkeyPatch, method: str, given: dict[str, Any], kinds: list[str]
) -> None:
    seen: list[str] = []
    validate = Settings.model_validate.__func__  # type: ignore[attr-defined]

    def counted(kind: type[Settings], values: Any) -> Settings:
        seen.append(kind.__name__)
        return validate(kind, values)

    monkeypatch.setattr(Settings, "model_validate", classmethod(counted))
    open_job(load_recipe(text_zoo.recipe(text, "once.yaml", merge_method=method, **given)))
    assert sorted(seen) == sorted(["Recipe", *kinds])


def test_a_changed_recipe_has_settings_of_its_own() -> None:
    recipe = parsed(ADAPTIVE_RECIPE)
    before = recipe.method()
    assert recipe.method() is before
    assert recipe.model_copy(update={"parameters": {"rank": 0.5}}).method().rank == 0.5 != before.rank
    assert recipe.method() is before
