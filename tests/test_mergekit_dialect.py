"""What mergekit's recipes say without effect, and their other ways to list whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adarank.cli.main import main
from adarank.errors import RecipeError
from adarank.methods import METHODS, merge_tensors
from adarank.recipe.job import open_job
from adarank.recipe.mergekit import SETTINGS, SHARED
from adarank.recipe.plan import describe
from adarank.recipe.reader import load_recipe, parse_recipe
from adarank.settings import keys
from make import family, save

LAYERS = 2
CONFIG = {"num_hidden_layers": LAYERS}
MODELS = [{"model": "task0"}, {"model": "task1"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models")
    base, experts = family(2)
    for name, state in {"start": base, **experts}.items():
        save(made / name, state, CONFIG)
    return made


def recipe(method: str, models: Any = MODELS, **more: Any) -> dict[str, Any]:
    return {"merge_method": method, "base_model": "start", "models": models, **more}


def merged(values: dict[str, Any], folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The merged tensors, and what is said of the recipe."""
    job = open_job(parse_recipe(values, folder))
    assert job.method is not None
    return dict(merge_tensors(job.method, job.network)), describe(job)["notes"]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def with_parameters(*given: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry | {"parameters": own} for entry, own in zip(MODELS, given, strict=True)]


IDLE: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "of all models": (
        recipe("sce", parameters={"select_topk": 0.5, "normalize": True, "filter_wise": True}),
        recipe("sce", parameters={"select_topk": 0.5}),
        ["parameters: normalize, filter_wise without effect in sce."],
    ),
    "of each model": (
        recipe("model_stock", with_parameters({"weight": [{"filter": "layer", "value": [2, 1]}, {"value": 1}]}, {"weight": 1})),
        recipe("model_stock"),
        ["models: 'task0': weight without effect in model_stock.", "models: 'task1': weight without effect in model_stock."],
    ),
    "of all models, given to one": (
        recipe("ties", with_parameters({"weight": 1, "lambda": 0.3}, {"weight": 1})),
        recipe("ties", with_parameters({"weight": 1}, {"weight": 1})),
        ["models: 'task0': lambda without effect in ties.", "lambda: ties takes it for all models, under parameters."],
    ),
    "of the base": (
        recipe("ties", [{"model": "start", "parameters": {"weight": 9, "density": 0.1}}, *with_parameters({"weight": 1}, {"weight": 2})]),
        recipe("ties", with_parameters({"weight": 1}, {"weight": 2})),
        ["models: the base: weight, density without effect in ties."],
    ),
    "of the recipe": (
        recipe("slerp", MODELS[:1], name="first", parameters={"t": [0.25, 0.75], "normalize": True}),
        recipe("slerp", MODELS[:1], parameters={"t": [0.25, 0.75]}),
        ["name: 'first', without effect.", "parameters: normalize without effect in slerp."],
    ),
    "beside parameters": (
        recipe("ties", with_parameters({"weight": 1}, {"weight": 2}), normalize=False, int8_mask=True),
        recipe("ties", with_parameters({"weight": 1}, {"weight": 2})),
        [f"{key}: without effect beside parameters. If it is meant, write it under them." for key in ("normalize", "int8_mask")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("where", IDLE)
def test_settings_of_other_methods_are_noted_and_change_nothing(where: str, folder: Path) -> None:
    values, plain, notes = IDLE[where]
    found, told = merged(values, folder)
    assert told == notes
    wanted, silence = merged(plain, folder)
    assert same(found, wanted)
    assert silence == []


def test_beside_parameters_other_methods_settings_are_unknown(folder: Path) -> None:
    with pytest.raises(RecipeError, match="normalize"):
        parse_recipe(recipe("cart", normalize=False), folder)


def test_the_command_line_shows_what_is_without_effect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "sce.yaml").write_text(
        "{merge_method: sce, base_model: start, models: [{model: task0}], parameters: {density: 0.5}}"
    )
    for arguments in (["plan"], ["merge"]):
        out = [str(folder / "out")] if arguments == ["merge"] else []
        assert main([*arguments, str(folder / "sce.yaml"), *out]) == 0
        assert "density without effect in sce" in " ".join(capsys.readouterr().out.split())
    assert "density without effect in sce" in (folder / "out" / "adarank.json").read_text()


@pytest.mark.parametrize(("values", "text"), [
    (recipe("sce", parameters={"lamda": 1}), "lamda: unknown key"),
    (recipe("ties", parameters={"densty": 1}), "Did you mean 'density'"),
    (recipe("ties", with_parameters({"wieght": 1}, {})), "'wieght'.* Did you mean 'weight'"),
    (recipe("ties", [{"model": "start", "parameters": {"wieght": 1}}, *MODELS]), "the base has parameter 'wieght'"),
    (recipe("ties", dype="float32"), "Did you mean 'dtype'"),
    (recipe("cart", parameters={"normalize": True}), "normalize: unknown key"),
    (recipe("average", with_parameters({"weight": 1}, {})), "'weight', which 'average' does not take"),
])  # fmt: skip
def test_keys_that_mergekit_has_not_stay_errors(values: dict[str, Any], text: str, folder: Path) -> None:
    with pytest.raises(RecipeError, match=text):
        open_job(parse_recipe(values, folder))


def test_the_list_of_mergekits_settings_is_that_of_its_methods() -> None:
    assert {name for name, kind in METHODS.items() if "mergekit" in kind.source} | {"task_arithmetic"} == SHARED
    assert {key for name in SHARED for key in keys(METHODS[name])} - {"seed"} == SETTINGS


def sources(**more: Any) -> list[dict[str, Any]]:
    """One slice of all layers, as mergekit writes into model cards."""
    models = [{"model": "start"}, *with_parameters({"weight": 0.3}, {"weight": 0.1})]
    return [{"sources": [{**entry, "layer_range": [0, LAYERS]} for entry in models], **more}]


@pytest.mark.parametrize("inside", [
    {"slices": sources(), "parameters": {"density": 0.5}},
    {"slices": sources(parameters={"density": 0.5})},
    {"models": with_parameters({"weight": 0.3}, {"weight": 0.1}), "parameters": {"density": 0.5}},
])  # fmt: skip
def test_a_default_module_is_the_models_whole(inside: dict[str, Any], folder: Path) -> None:
    values = {"merge_method": "ties", "base_model": "start", "modules": {"default": inside}, "tokenizer": {}}
    wanted = recipe("ties", with_parameters({"weight": 0.3}, {"weight": 0.1}), parameters={"density": 0.5})
    assert same(merged(values, folder)[0], merged(wanted, folder)[0])


@pytest.mark.parametrize("modules", [
    {"text": {"models": MODELS}}, {"default": {"models": MODELS}, "vision": {"models": MODELS}},
    {"default": {"models": MODELS, "dtype": "float16"}}, {"default": MODELS}, {},
])  # fmt: skip
def test_other_modules_are_refused(modules: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="'modules' is not supported"):
        parse_recipe({"merge_method": "ties", "base_model": "start", "modules": modules}, Path())


def test_a_module_beside_models_is_refused() -> None:
    with pytest.raises(RecipeError, match="'modules' is not supported"):
        parse_recipe(recipe("ties", modules={"default": {"models": MODELS}}), Path())


@pytest.mark.parametrize(("method", "parameters"), [("karcher", {}), ("linear", {"weight": 0.4})])
def test_a_base_is_one_of_the_models_where_a_method_has_none(
    method: str, parameters: dict[str, Any], folder: Path
) -> None:
    """As mergekit does, and said in the plan."""
    listed = recipe(method, [{"model": "start"}, *MODELS], parameters=parameters)
    found, told = merged(recipe(method, parameters=parameters), folder)
    assert same(found, merged(listed, folder)[0])
    assert told == [f"base_model: merged like the models, as {method} has no base."]
    alone = {key: value for key, value in recipe(method, parameters=parameters).items() if key != "base_model"}
    assert not same(found, merged(alone, folder)[0])


@pytest.mark.parametrize("listed", ["base", "./base", "base/"])
def test_a_base_called_base_may_be_listed(listed: str, tmp_path: Path) -> None:
    base, experts = family(2)
    for name in ("base", "start"):
        save(tmp_path / name, base, CONFIG)
    for name, state in experts.items():
        save(tmp_path / name, state, CONFIG)
    for method in ("linear", "ties"):
        models = [{"model": "start"}, *with_parameters({"weight": 0.5}, {"weight": 1})]
        wanted = merged(recipe(method, models), tmp_path)[0]
        called = recipe(method, [{"model": listed}, *models[1:]]) | {"base_model": "base"}
        assert same(merged(called, tmp_path)[0], wanted)


def test_a_slash_does_not_make_the_base_an_expert() -> None:
    for base in ("base", "./base", "base/", "org/base"):
        models = [{"model": base.rstrip("/") + "/"}, *MODELS]
        assert list(parse_recipe(recipe("ties", models) | {"base_model": base}, Path()).experts) == ["task0", "task1"]


def test_an_undefined_alias_is_no_readable_yaml(folder: Path) -> None:
    (folder / "alias.yaml").write_text("models: *nowhere")
    with pytest.raises(RecipeError, match=r"not readable YAML.*undefined alias"):
        load_recipe(folder / "alias.yaml")


def test_the_seed_of_model_cards_is_the_seed() -> None:
    assert parse_recipe(recipe("dare_ties", random_seed=3), Path()).seed == 3
    with pytest.raises(RecipeError, match="random_seed: unknown key"):
        parse_recipe(recipe("dare_ties", random_seed=3, seed=4), Path())


@pytest.mark.parametrize("kind", ["models", "slices"])
def test_what_inner_filters_leave_out_is_the_outer_setting(kind: str, folder: Path) -> None:
    inside = {"parameters": {"weight": [{"filter": "bias", "value": 0.5}]}}
    inside |= {"models": MODELS} if kind == "models" else {"slices": sources()}
    for entry in inside["slices"][0]["sources"] if kind == "slices" else ():
        entry.pop("parameters", None)
    values = {"merge_method": "task_arithmetic", "base_model": "start", "parameters": {"weight": 2.0}}
    wanted = recipe("task_arithmetic", parameters={"weight": [{"filter": "bias", "value": 0.5}, {"value": 2.0}]})
    assert same(merged({**values, "modules": {"default": inside}}, folder)[0], merged(wanted, folder)[0])
