"""What no file holds is never made up: a network with random tensors is neither adapted, nor scored, nor planned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import adarank
import clip_zoo
import image_zoo
import text_zoo
from adarank.cli.main import main
from adarank.errors import AdaRankError, CheckpointError
from adarank.workflow.build_networks import build_models
from make import family, save


def without(folder: Path, drop: Callable[[str], bool]) -> list[str]:
    """Take tensors out of a model's file; returns their names."""
    file = folder / "model.safetensors"
    state = load_file(file)
    save_file({name: tensor for name, tensor in state.items() if not drop(name)}, file, {"format": "pt"})
    return [name for name in state if drop(name)]


HEADS = {"text": ("classifier.weight", "classifier.bias"), "image": ("classifier.weight", "classifier.bias")}


@pytest.mark.parametrize(("kind", "zoo"), [("text", text_zoo), ("image", image_zoo)])
def test_an_expert_without_its_head_is_refused_by_name(tmp_path: Path, kind: str, zoo: Any, capsys: Any) -> None:
    folder = zoo.make_zoo(tmp_path / "zoo")
    task = next(iter(zoo.TASKS))
    assert set(without(folder / "models" / task, lambda name: name.startswith("classifier"))) == set(HEADS[kind])
    path = zoo.recipe(folder, **zoo.ADAPT)
    assert main(["merge", str(path), str(tmp_path / "out")]) == 1
    text = " ".join(capsys.readouterr().err.split())
    assert all(part in text for part in (f"models/{task}", "It has no head", *map(repr, HEADS[kind])))
    assert not (tmp_path / "out").exists()
    for call in (lambda: adarank.evaluate_recipe(path), lambda: adarank.evaluate_recipe(zoo.recipe(folder, "d.yaml"))):
        with pytest.raises(CheckpointError, match="would be random"):
            call()


@pytest.mark.parametrize("architecture", ["bert", "resnet"])
def test_a_part_of_the_body_that_no_file_holds_is_named(tmp_path: Path, architecture: str) -> None:
    """Fine-tuned and base lack it alike, so that nothing but the network itself tells that it is missing."""
    zoo: Any = text_zoo if architecture == "bert" else image_zoo
    folder = zoo.make_zoo(tmp_path / "zoo", architecture)
    part = "pooler.dense." if architecture == "bert" else "embedder.embedder.normalization.running_mean"
    for model in ("base", *zoo.TASKS):
        assert without(folder / "models" / model, lambda name: part in name)
    with pytest.raises(CheckpointError, match=rf"no file there holds: '.*{part}") as caught:
        adarank.evaluate_recipe(zoo.recipe(folder))
    assert "no head" not in str(caught.value)


def test_what_is_computed_may_be_missing(tmp_path: Path) -> None:
    folder = image_zoo.make_zoo(tmp_path, "resnet")
    for model in ("base", *image_zoo.TASKS):
        assert without(folder / "models" / model, lambda name: name.endswith("num_batches_tracked"))
    assert adarank.evaluate_recipe(image_zoo.recipe(folder)).rows["experts"]


@pytest.mark.parametrize("part", ["vision_model.post_layernorm.", "text_model.final_layer_norm."])
def test_a_clip_that_is_not_whole_is_refused(tmp_path: Path, part: str) -> None:
    folder = clip_zoo.make_zoo(tmp_path, "CLIPModel")
    for model in ("base", *clip_zoo.CLASSES):
        assert len(without(folder / "models" / model, lambda name: name.startswith(part))) == 2
    with pytest.raises(CheckpointError, match=r"no file there holds: '(vision_model\.|text_model\.)?(post_layernorm|final_layer_norm)\.bias'"):  # fmt: skip
        build_models(adarank.open_job(adarank.load_recipe(clip_zoo.recipe(folder))))


def test_a_body_alone_is_no_expert_of_a_task(tmp_path: Path, capsys: Any) -> None:
    folder = text_zoo.make_zoo(tmp_path / "zoo")
    shutil.rmtree(folder / "models" / "mood")
    shutil.copytree(folder / "models" / "base", folder / "models" / "mood")
    for command in (["plan"], ["merge", str(tmp_path / "out")]):
        assert main([command[0], str(text_zoo.recipe(folder)), *command[1:]]) == 1
        text = " ".join(capsys.readouterr().err.split())
        assert "task 'mood' (models/mood) is a BertModel by its config.json, without the head of a classifier" in text
    untasked = [{"model": "models/mood"}, {"model": "models/colour"}]  # without tasks they merge
    path = text_zoo.recipe(folder, "untasked.yaml", models=untasked, select={"head": ["classifier*"]})
    assert main(["merge", str(path), str(tmp_path / "out")]) == 0


LANGUAGE = {"LlamaForCausalLM": "score", "GPT2LMHeadModel": "score", "BertForMaskedLM": "classifier",
            "BertForTokenClassification": "", "T5ForConditionalGeneration": ""}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "text-classification") for name in LANGUAGE), ("BertForMaskedLM", None), ("BertForTokenClassification", None)],
)  # fmt: skip
def test_a_model_with_another_head_has_no_classes(tmp_path: Path, name: str, kind: str | None, capsys: Any) -> None:
    base, experts = family(2)
    config = {"architectures": [name], "model_type": "llama"}
    save(tmp_path / "base", base, config)
    for task, state in experts.items():
        save(tmp_path / task, state, config)
    (tmp_path / "rows.jsonl").write_text('{"text": "no label here"}\n' * 9)
    task = {"data": "rows.jsonl", **({"kind": kind} if kind else {})}
    path = text_zoo.recipe(tmp_path, base_model="base", merge_method="average", models=[{"model": name, "task": {"name": name, **task}} for name in experts])  # fmt: skip
    for command in (["plan", path], ["merge", path, tmp_path / "out"], ["evaluate", path]):
        assert main([str(part) for part in command]) == 1
        text = " ".join(capsys.readouterr().err.split())
        assert f"task 'task0' (task0) is a {name} by its config.json" in text
        assert "task1" in text
        assert "or no task" in text
    assert not (tmp_path / "out").exists()


def test_a_bundle_of_language_models_gives_language_models(tmp_path: Path) -> None:
    """Its configuration names the class; by model type alone it would be taken for a classifier without a head."""
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": 12, "tie_word_embeddings": False}
    for name in ("base", "a", "b"):
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / name)
    models = [{"model": "a"}, {"model": "b"}]
    path = text_zoo.recipe(tmp_path, merge_method="emr", base_model="base", models=models)
    adarank.merge_recipe(path, tmp_path / "out")
    module = adarank.from_bundle(tmp_path / "out", "a")
    assert type(module) is transformers.GPT2LMHeadModel
    weights = dict(adarank.load_bundle(tmp_path / "out").tensors("a"))
    assert torch.equal(module.lm_head.weight, weights["lm_head.weight"].float())


def test_a_head_of_other_classes_than_the_config_is_refused(tmp_path: Path) -> None:
    folder = text_zoo.make_zoo(tmp_path)
    file = folder / "models" / "colour" / "config.json"
    config = json.loads(file.read_text())
    labels = {str(number): f"colour-{number}" for number in range(5)}
    file.write_text(
        json.dumps({**config, "id2label": labels, "label2id": {label: int(n) for n, label in labels.items()}})
    )
    with pytest.raises(AdaRankError, match=r"models/colour: cannot be loaded .*"):
        adarank.evaluate_recipe(text_zoo.recipe(folder))
