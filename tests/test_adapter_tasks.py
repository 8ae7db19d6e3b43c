"""Adapters of classifiers with their tasks: adapted on and evaluated as the models that peft merges them into."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, CLIPModel

import adarank
import clip_zoo
from lora_zoo import train
from text_zoo import ADAPT, TASKS, make_zoo, recipe

TARGETS = {"bert": ["query", "value", "dense"], "gpt2": ["c_attn", "c_proj"]}


def make_adapters(folder: Path, architecture: str) -> None:
    """adapters/TASK over models/base, which has no head, and whole/TASK, what peft merges it into."""
    for seed, (task, classes) in enumerate(TASKS.items()):
        load = AutoModelForSequenceClassification.from_pretrained
        settings = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=TARGETS[architecture])
        wrapped = get_peft_model(load(folder / "models" / "base", num_labels=classes), settings)
        train(wrapped, seed)
        wrapped.save_pretrained(folder / "adapters" / task)
        model = load(folder / "models" / "base", num_labels=classes)
        PeftModel.from_pretrained(model, str(folder / "adapters" / task)).merge_and_unload().save_pretrained(
            folder / "whole" / task
        )
        AutoTokenizer.from_pretrained(folder / "models" / "base").save_pretrained(folder / "whole" / task)


@pytest.fixture(scope="module", params=list(TARGETS))
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_zoo(tmp_path_factory.mktemp("zoo"), request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_adapters(folder, request.param)
    return folder


def merge(zoo: Path, kind: str, called: str = "", **changes: Any) -> Path:
    models = [
        {"model": f"{kind}/{t}", "task": {"name": t, "kind": "text-classification", "data": f"data/{t}.tsv"}}
        for t in TASKS
    ]
    out = zoo / f"{called or changes['merge_method']}-{kind}"
    adarank.merge_recipe(recipe(zoo, f"{out.name}.yaml", models=models, **changes), out)
    return out


# The learned head of a task is kept or not, which rounding may decide.
FIXED_HEADS: dict[str, Any] = {**ADAPT, "merge_method": "adarank", "adapt": {**ADAPT["adapt"], "learn_heads": False}}


@pytest.mark.parametrize("changes", [{"merge_method": "tsv_m"}, {"merge_method": "regmean"}, FIXED_HEADS])
def test_tasks_of_adapters_are_those_of_merged_models(changes: dict[str, Any], zoo: Path) -> None:
    one, other = (merge(zoo, kind, **changes) for kind in ("adapters", "whole"))
    for file in ("model.safetensors", *(f"heads/{task}/head.safetensors" for task in TASKS)):
        first, second = load_file(one / file), load_file(other / file)
        assert set(first) == set(second)
        for name in first:
            torch.testing.assert_close(first[name], second[name], atol=5e-5, rtol=1e-4)


def test_binary_masks_agree_on_the_components_there_are(zoo: Path) -> None:
    settings = {**ADAPT["parameters"], "mask": "binary", "origin": "pretrained"}
    changes = {**ADAPT, "merge_method": "adarank", "parameters": settings}
    one, other = (
        adarank.MaskFile.load(merge(zoo, kind, "binary", **changes) / "masks.safetensors")
        for kind in ("adapters", "whole")
    )
    for name, mask in one.masks.items():
        parts = zip(mask.split(one.sizes[name]), other.masks[name].split(other.sizes[name]), strict=True)
        assert all(torch.equal(few, many[: len(few)]) for few, many in parts)
    assert set(one.lam) == set(other.lam)
    for name, lam in one.lam.items():
        torch.testing.assert_close(lam, other.lam[name], atol=1e-4, rtol=1e-4)


def test_masks_learned_on_adapters_merge_them_again(zoo: Path) -> None:
    """The file has the components that adapters have, and no others; what it merges is what was adapted."""
    out = zoo / "adarank-adapters"
    if not out.exists():
        merge(zoo, "adapters", **ADAPT)
    masks = adarank.MaskFile.load(out / "masks.safetensors")
    assert {size for sizes in masks.sizes.values() for size in sizes} <= {0, 2, 4}
    again = zoo / "again"
    models = [{"model": f"adapters/{t}", "task": {"name": t, "kind": "text-classification"}} for t in TASKS]
    settings = {"masks": "adarank-adapters/masks.safetensors"}
    adarank.merge_recipe(recipe(zoo, "again.yaml", models=models, merge_method="masked", parameters=settings), again)
    first, second = load_file(out / "model.safetensors"), load_file(again / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_output_that_is_an_adapter_is_evaluated(zoo: Path) -> None:
    """At full rank it scores as the whole model does, under the tasks' heads."""
    models = [
        {"model": f"adapters/{t}", "task": {"name": t, "kind": "text-classification", "data": f"data/{t}.tsv"}}
        for t in TASKS
    ]
    file = recipe(zoo, "out.yaml", models=models, merge_method="tsv_m")
    as_adapter = recipe(zoo, "out-adapter.yaml", models=models, merge_method="tsv_m", output={"lora": {"rank": 16}})
    adarank.merge_recipe(file, zoo / "out-whole")
    record = adarank.merge_recipe(as_adapter, zoo / "out-adapter")
    assert record["lora"]["relative_error"] < 1e-5
    assert not (zoo / "out-adapter" / "model.safetensors").exists()
    rows = adarank.evaluate_recipe(file, [zoo / "out-whole", zoo / "out-adapter"]).rows
    assert rows[str(zoo / "out-whole")] == rows[str(zoo / "out-adapter")]


def test_adapters_of_image_towers_merge_under_zero_shot_heads(tmp_path: Path) -> None:
    clip_zoo.make_zoo(tmp_path, "CLIPModel")
    towers = r".*vision_model.*\.(q_proj|fc1)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed, task in enumerate(clip_zoo.CLASSES):
            wrapped = get_peft_model(
                CLIPModel.from_pretrained(tmp_path / "models" / "base"), LoraConfig(r=2, target_modules=towers)
            )
            train(wrapped, seed)
            wrapped.save_pretrained(tmp_path / "adapters" / task)
            wrapped.merge_and_unload().save_pretrained(tmp_path / "models" / task)
    whole = clip_zoo.recipe(tmp_path, merge_method="tsv_m")
    models = [
        {**entry, "model": entry["model"].replace("models/", "adapters/")}
        for entry in yaml.safe_load(whole.read_text())["models"]
    ]
    adapters = clip_zoo.recipe(tmp_path, "adapters.yaml", merge_method="tsv_m", models=models)
    job = adarank.open_job(adarank.load_recipe(adapters))
    assert {
        job.network.change_rank(task, "vision_model.encoder.layers.0.mlp.fc1.weight") for task in clip_zoo.CLASSES
    } == {2}
    states = []
    for file in (adapters, whole):
        adarank.merge_recipe(file, tmp_path / f"out-{file.stem}")
        states.append(load_file(tmp_path / f"out-{file.stem}" / "model.safetensors"))
    for name in states[1]:
        torch.testing.assert_close(states[0][name], states[1][name], atol=1e-5, rtol=1e-4)
    rows = adarank.evaluate_recipe(adapters, [tmp_path / "out-adapters"]).rows
    assert set(rows["experts"]) == set(clip_zoo.CLASSES)
