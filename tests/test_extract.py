"""One task as an ordinary folder: `Auto` classes and pipelines give what `load_task` gives, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import adarank
import clip_zoo
import image_zoo
import lm_zoo
import modular_zoo
import text_zoo
from adarank.cli.main import main
from adarank.errors import CheckpointError, OutputError
from adarank.io.checkpoint import Checkpoint

BATCH = {"input_ids": torch.tensor([[2, 5, 6, 7, 3], [2, 9, 9, 11, 3]]), "attention_mask": torch.ones(2, 5).long()}
METHODS = ["average", "emr"]  # one body with heads; a bundle


@torch.no_grad()
def logits(module: Any, **batch: Tensor) -> Tensor:
    given: Tensor = module(**batch).logits
    return given


def loaded(auto: Any, folder: Path, **named: Any) -> Any:
    """What an `Auto` class makes of a folder, which must hold its very tensors."""
    module, info = auto.from_pretrained(folder, output_loading_info=True, **named)
    assert not any(info.values()), info
    return module.eval()


def assert_same(module: Any, wanted: Any) -> None:
    assert type(module) is type(wanted)
    state, needed = module.state_dict(), wanted.state_dict()
    assert state.keys() == needed.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in needed.items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("architecture", "headless"),
    [("bert", True), ("bert", False), ("roberta", True), ("distilbert", True), ("gpt2", True)],
)
def test_a_text_tasks_folder_is_its_classifier(tmp_path: Path, architecture: str, headless: bool, method: str) -> None:
    zoo = text_zoo.make_zoo(tmp_path / "zoo", architecture, headless)
    adarank.merge_recipe(text_zoo.recipe(zoo, merge_method=method), tmp_path / "out")
    for task, classes in text_zoo.TASKS.items():
        adarank.extract(tmp_path / "out", task, tmp_path / task)
        wanted = adarank.load_task(tmp_path / "out", task)
        module = loaded(transformers.AutoModelForSequenceClassification, tmp_path / task)
        assert_same(module, wanted)
        assert torch.equal(logits(module, **BATCH), logits(wanted, **BATCH))
        assert Checkpoint(tmp_path / task).tensors.keys() == Checkpoint(zoo / "models" / task).tensors.keys()
        config = json.loads((tmp_path / task / "config.json").read_text())
        expert = json.loads((zoo / "models" / task / "config.json").read_text())
        names = ("architectures", "id2label", "label2id", "problem_type", "model_type")
        assert {name: config.get(name) for name in names} == {name: expert.get(name) for name in names}
        pipe = transformers.pipeline("text-classification", model=str(tmp_path / task), top_k=None)
        tokens = pipe.tokenizer("good red up", return_tensors="pt")
        shares = logits(wanted, **tokens)[0].softmax(dim=-1)
        given = {entry["label"]: entry["score"] for entry in pipe(["good red up"])[0]}
        assert given == pytest.approx({f"{task}-{c}": float(shares[c]) for c in range(classes)}, rel=1e-6)
        raw = {entry["label"]: entry["score"] for entry in pipe(["good red up"], function_to_apply="none")[0]}
        assert raw == {f"{task}-{c}": float(value) for c, value in enumerate(logits(wanted, **tokens)[0])}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["vit", "resnet"])
def test_an_image_tasks_folder_is_its_classifier(tmp_path: Path, architecture: str, method: str) -> None:
    """Only the experts' folders have an image processor, so the output must have kept it."""
    zoo = image_zoo.make_zoo(tmp_path / "zoo", architecture)
    kept = {"keep": ["*.running_*"]} if architecture == "resnet" else None
    adarank.merge_recipe(image_zoo.recipe(zoo, merge_method=method, select=kept), tmp_path / "out")
    image = image_zoo.pictures(1)[0]
    for task in image_zoo.TASKS:
        adarank.extract(tmp_path / "out", task, tmp_path / task)
        wanted = adarank.load_task(tmp_path / "out", task)
        assert_same(loaded(transformers.AutoModelForImageClassification, tmp_path / task), wanted)
        pipe = transformers.pipeline("image-classification", model=str(tmp_path / task))
        pixels = pipe.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        shares = logits(wanted, pixel_values=pixels)[0].softmax(dim=-1)
        given = {entry["label"]: entry["score"] for entry in pipe(Image.fromarray(image))}
        assert given == pytest.approx({f"{task}-{c}": float(share) for c, share in enumerate(shares)}, rel=1e-5)
        raw = {entry["label"]: entry["score"] for entry in pipe(Image.fromarray(image), function_to_apply="none")}
        assert raw == {f"{task}-{c}": float(value) for c, value in enumerate(logits(wanted, pixel_values=pixels)[0])}


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_shot_tasks_folder_is_a_whole_clip(tmp_path: Path, method: str) -> None:
    """`CLIPModel` with the task's class names computes what the head made of them does; the head lies beside it."""
    zoo = clip_zoo.make_zoo(tmp_path / "zoo")
    templates = {"templates": ["the {} drawing"]}
    tasks = dict.fromkeys(clip_zoo.CLASSES, templates)
    adarank.merge_recipe(clip_zoo.recipe(zoo, tasks=tasks, merge_method=method), tmp_path / "out")
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for task, classes in clip_zoo.CLASSES.items():
        adarank.extract(tmp_path / "out", task, tmp_path / task)
        wanted = adarank.load_task(tmp_path / "out", task)
        assert_same(adarank.load_task(tmp_path / task, task), wanted)
        whole = loaded(transformers.AutoModel, tmp_path / task)
        assert isinstance(whole, transformers.CLIPModel)
        tower = {n: t for n, t in wanted.state_dict().items() if n.startswith(("vision_model.", "visual_projection."))}
        assert len(tower) > 10
        assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in tower.items())
        pipe = transformers.pipeline("zero-shot-image-classification", model=str(tmp_path / task))
        names, (template,) = list(pipe.model.config.id2label.values()), pipe.model.config.prompt_templates
        assert tuple(names) == classes
        given = pipe(Image.fromarray(image), candidate_labels=names, hypothesis_template=template)
        pixels = pipe.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        shares = logits(wanted, pixel_values=pixels)[0].softmax(dim=-1)
        shown = {entry["label"]: entry["score"] for entry in given}
        assert shown == pytest.approx(dict(zip(classes, shares.tolist(), strict=True)), rel=1e-4)


@pytest.mark.parametrize("changes", [text_zoo.ADAPT, {"merge_method": "multitask", "parameters": {"steps": 3, "batch_size": 4}}],
                         ids=["masks", "trained heads"])  # fmt: skip
def test_the_head_is_the_outputs(text: Path, tmp_path: Path, changes: Any) -> None:
    adarank.merge_recipe(text_zoo.recipe(text, "kept.yaml", **changes), tmp_path / "out")
    adarank.extract(tmp_path / "out", "mood", tmp_path / "mood")
    module = loaded(transformers.AutoModelForSequenceClassification, tmp_path / "mood")
    assert_same(module, adarank.load_task(tmp_path / "out", "mood"))
    head = Checkpoint(tmp_path / "out" / "heads" / "mood" / "head.safetensors")
    assert torch.equal(module.classifier.weight, head.read("classifier.weight"))


@pytest.mark.parametrize("method", METHODS)
def test_the_dtype_is_the_outputs(text: Path, tmp_path: Path, method: str) -> None:
    path = text_zoo.recipe(text, "short.yaml", merge_method=method, out_dtype="bfloat16")
    adarank.merge_recipe(path, tmp_path / "out")
    adarank.extract(tmp_path / "out", "mood", tmp_path / "mood")
    usual, exact = (
        loaded(transformers.AutoModelForSequenceClassification, tmp_path / "mood", dtype=dtype)
        for dtype in ("auto", torch.float32)
    )
    assert usual.dtype == torch.bfloat16
    assert Checkpoint(tmp_path / "mood").tensors["bert.pooler.dense.bias"].dtype == torch.bfloat16
    assert_same(exact, adarank.load_task(tmp_path / "out", "mood"))


def test_a_head_of_the_base_gives_way_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its tensors have the names of the task's head, which is there: nothing of the task is left out."""
    zoo = image_zoo.make_zoo(tmp_path / "zoo", bare_base=False)
    adarank.merge_recipe(image_zoo.recipe(zoo, merge_method="average"), tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["classifier.weight"].shape[0] == 5
    assert main(["extract", str(tmp_path / "out"), "shapes", str(tmp_path / "shapes")]) == 0
    assert "left out" not in capsys.readouterr().out
    weight = load_file(tmp_path / "shapes" / "model.safetensors")["classifier.weight"]
    assert torch.equal(weight, load_file(zoo / "models" / "shapes" / "model.safetensors")["classifier.weight"])


def test_what_has_no_place_in_a_task_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """RoBERTa's classifier has no pooler, and the base has one."""
    zoo = text_zoo.make_zoo(tmp_path / "zoo", "roberta")
    adarank.merge_recipe(text_zoo.recipe(zoo, merge_method="average"), tmp_path / "out")
    assert main(["extract", str(tmp_path / "out"), "mood", str(tmp_path / "mood"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["extracted"]["left_out"] == ["pooler.dense.bias", "pooler.dense.weight"]
    assert record == json.loads((tmp_path / "mood" / "adarank.json").read_text())
    assert main(["extract", str(tmp_path / "out"), "colour", str(tmp_path / "colour")]) == 0
    assert "2 tensor(s) left out" in capsys.readouterr().out


def test_a_class_that_the_expert_does_not_name_is_filled_in(tmp_path: Path) -> None:
    zoo = text_zoo.make_zoo(tmp_path / "zoo")
    file = zoo / "models" / "mood" / "config.json"
    config = json.loads(file.read_text())
    del config["architectures"]
    file.write_text(json.dumps(config))
    adarank.merge_recipe(text_zoo.recipe(zoo, merge_method="average"), tmp_path / "out")
    adarank.extract(tmp_path / "out", "mood", tmp_path / "mood")
    assert json.loads((tmp_path / "mood" / "config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]


def test_more_layers_than_tensors_are_refused_unmade(tmp_path: Path) -> None:
    zoo = text_zoo.make_zoo(tmp_path / "zoo")
    adarank.merge_recipe(text_zoo.recipe(zoo, merge_method="average"), tmp_path / "out")
    for file in (tmp_path / "out").rglob("config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 10**7}))
    with pytest.raises(CheckpointError, match=r"tells of 10000000 layers, but there are \d+ tensors"):
        adarank.load_task(tmp_path / "out", "mood")


def test_an_output_without_an_image_processor_says_so(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adarank.merge_recipe(image_zoo.recipe(images, "plain.yaml", merge_method="average"), tmp_path / "out")
    (tmp_path / "out" / "heads" / "digits" / "preprocessor_config.json").unlink()
    assert main(["extract", str(tmp_path / "out"), "digits", str(tmp_path / "digits")]) == 0
    assert "holds no image processor" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("method", ["surgery", "twin_merging"])
def test_networks_that_are_more_than_weights_are_refused(text: Path, tmp_path: Path, method: str) -> None:
    modular_zoo.made(text, tmp_path / "out", **modular_zoo.METHODS[method])
    with pytest.raises(CheckpointError, match=r"more than their weights.*adarank\.load_task\('.*', 'mood'\)"):
        adarank.extract(tmp_path / "out", "mood", tmp_path / "mood")
    assert not (tmp_path / "mood").exists()
    served, known = (load(tmp_path / "out", "mood") for load in (adarank.load_task, adarank.from_bundle))
    assert torch.equal(logits(served, **BATCH), logits(known, **BATCH))


def test_the_command_takes_one_task_and_replaces_nothing(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, alone = str(tmp_path / "out"), str(tmp_path / "alone")
    adarank.merge_recipe(text_zoo.recipe(text, "one.yaml", merge_method="average"), out)
    for arguments, sentence in (
        ([out, alone], "one task is needed"),
        ([out, "mood", alone, "--task", "mood"], "one task is needed"),
        ([out, "moon", alone], "no head of task 'moon'. Did you mean 'mood'?"),
        ([str(tmp_path / "lost"), "mood", alone], "no such folder"),
        ([out, "mood", out, "--force"], "out"),
    ):
        assert main(["extract", *arguments]) == 1
        assert sentence in capsys.readouterr().err
        assert not Path(alone).exists()
    assert main(["extract", out, "mood", alone]) == 0
    assert main(["extract", out, alone, "--task", "colour"]) == 1
    assert "--force" in capsys.readouterr().err
    assert adarank.load_task(out, "mood").config.id2label[0] == "mood-0"
    assert main(["extract", out, alone, "--task", "colour", "--force"]) == 0
    assert json.loads((Path(alone) / "config.json").read_text())["id2label"]["2"] == "colour-2"
    with pytest.raises(OutputError, match="already exists"):
        adarank.extract(out, "mood", alone)


def test_a_generating_tasks_folder_is_the_merged_body(tmp_path: Path) -> None:
    """Weights are those of all tasks; chat template and settings of generation are the expert's."""
    zoo, out = lm_zoo.make_zoo(tmp_path / "zoo", rows=20), tmp_path / "out"
    (zoo / "models" / "news" / "chat_template.jinja").write_text("news: {{ messages }}")
    (zoo / "models" / "news" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 2, "max_new_tokens": 5})
    )
    adarank.merge_recipe(lm_zoo.recipe(zoo, merge_method="average"), out)
    for task, template in (("verse", lm_zoo.CHAT), ("news", "news: {{ messages }}")):
        adarank.extract(out, task, tmp_path / task)
        module = loaded(transformers.AutoModelForCausalLM, tmp_path / task)
        assert_same(module, lm_zoo.model(out))
        assert_same(module, adarank.load_task(out, task))
        assert_same(module, adarank.load_task(tmp_path / task, task))
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / task).chat_template == template
        assert module.generation_config.max_new_tokens == (5 if task == "news" else None)
    with pytest.raises(CheckpointError, match=r"no task 'new'\. Did you mean 'news'"):
        adarank.extract(out, "new", tmp_path / "new")
