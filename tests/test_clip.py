"""CLIP's image tower under zero-shot heads: judged by `CLIPModel` itself, whatever form experts are stored in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from torch import Tensor

import adarank
from adarank.cli.main import main
from adarank.data.task import TaskData
from adarank.errors import CheckpointError, RecipeError
from adarank.models.clip import classifier_class
from adarank.recipe.job import open_job
from adarank.recipe.plan import describe
from adarank.recipe.reader import load_recipe
from adarank.workflow.build_networks import build_models, network_tensors
from adarank.workflow.load_tasks import load_tasks
from clip_zoo import CLASSES, FORMS, make_zoo, recipe, whole

ALL = {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.5}}
ADAPT: dict[str, Any] = {"merge_method": "adarank", "parameters": {"rank": 0.25, "lambda": 1.0}, "adapt": {"steps": 8, "batch_size": 4, "lr_masks": 0.05}}  # fmt: skip


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("clip"))


def data_of(zoo: Path) -> dict[str, TaskData]:
    return load_tasks(open_job(load_recipe(recipe(zoo, "data.yaml"))))


def pixels(zoo: Path, task: str, count: int = 6) -> Tensor:
    own = data_of(zoo)[task]
    return own.examples.batch(own.splits.rows["test"][:count])["pixel_values"]


@torch.no_grad()
def by_clip(model: Any, zoo: Path, classes: tuple[str, ...], images: Tensor, templates: tuple[str, ...]) -> Tensor:
    """Logits as CLIP's own forward pass gives them; of several templates, text features averaged by hand."""
    tokens = transformers.AutoTokenizer.from_pretrained(zoo / "models" / "base")
    logits, units = [], []
    for template in templates:
        text = tokens([template.replace("{}", name) for name in classes], padding=True, return_tensors="pt")
        out = model(input_ids=text["input_ids"], attention_mask=text["attention_mask"], pixel_values=images)
        logits.append(out.logits_per_image)
        units.append(out.text_embeds.double().numpy())
    if len(templates) == 1:
        return logits[0]
    mean = np.mean([own / np.linalg.norm(own, axis=1, keepdims=True) for own in units], axis=0)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    image = out.image_embeds.double().numpy()
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    return torch.from_numpy(float(model.logit_scale.exp()) * image @ mean.T).float()


@torch.no_grad()
def logits(module: Any, images: Tensor) -> Tensor:
    found: Tensor = module(pixel_values=images).logits
    return found


TEMPLATES = [("a photo of a {}.",), ("a photo of a {}.", "the {} drawing", "{}")]


@pytest.mark.parametrize("templates", TEMPLATES, ids=["one", "three"])
@pytest.mark.parametrize("which", ["base", "digits", "shapes"])
def test_base_and_experts_score_as_clip_does(zoo: Path, which: str, templates: tuple[str, ...]) -> None:
    told = {task: {"templates": list(templates)} for task in CLASSES}
    job = open_job(load_recipe(recipe(zoo, tasks=told)))
    models = build_models(job)
    models.fill(network_tensors(job, which))
    for task, classes in CLASSES.items():
        images = pixels(zoo, task)
        wanted = by_clip(whole(zoo, which), zoo, classes, images, templates)
        torch.testing.assert_close(logits(models.modules[task], images), wanted, rtol=1e-4, atol=1e-4)


ZERO_SHOT = {
    **ADAPT,
    "adapt": {**ADAPT["adapt"], "learn_heads": False},
}  # a learned head is not that of the class names


@pytest.mark.parametrize("changes", [ALL, ZERO_SHOT], ids=["static", "adapted"])
def test_the_output_is_a_clip_whose_tasks_load_as_scored(zoo: Path, tmp_path: Path, changes: Any) -> None:
    adarank.merge_recipe(recipe(zoo, **changes), tmp_path / "out")
    merged = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    assert isinstance(merged, transformers.CLIPModel)
    base = whole(zoo, "base").state_dict()
    moved = {name for name, own in merged.state_dict().items() if not torch.equal(own, base[name])}
    assert moved
    assert all(name.startswith("vision_model.") for name in moved)
    table = adarank.evaluate_recipe(recipe(zoo, **changes), [tmp_path / "out"])
    for task, classes in CLASSES.items():
        own = data_of(zoo)[task]
        rows = own.splits.rows["test"]
        images = own.examples.batch(rows)["pixel_values"]
        found = logits(adarank.load_task(tmp_path / "out", task), images)
        torch.testing.assert_close(found, by_clip(merged, zoo, classes, images, TEMPLATES[0]), rtol=1e-4, atol=1e-4)
        right = [int(row.argmax()) == label for row, label in zip(found, own.targets(rows), strict=True)]
        assert table.rows[str(tmp_path / "out")][task] == pytest.approx(100 * np.mean(right))


def test_the_form_that_experts_are_stored_in_changes_nothing(tmp_path: Path) -> None:
    found = []
    for form in FORMS:
        folder = make_zoo(tmp_path / form, form)
        adarank.merge_recipe(recipe(folder, **ALL), folder / "out")
        found.append(load_file(folder / "out" / "model.safetensors"))
    for other in found[1:]:
        assert set(other) == set(found[0])
        assert all(torch.equal(other[name], own) for name, own in found[0].items())


def test_a_projection_merges_only_where_experts_moved_it(tmp_path: Path) -> None:
    for form, projected in ((FORMS[0], True), (FORMS[1], True)):
        folder = make_zoo(tmp_path / form, form, projected)
        job = open_job(load_recipe(recipe(folder, **ALL)))
        choice = job.network.choices["visual_projection.weight"]
        assert choice.action == ("scale" if form == FORMS[1] else "keep")
        assert job.network.choices["text_model.embeddings.token_embedding.weight"].action == "keep"


def test_one_expert_alone_is_that_expert_in_a_bundle_too(zoo: Path, tmp_path: Path) -> None:
    alone = yaml.safe_load(recipe(zoo, merge_method="emr").read_text())
    adarank.merge_recipe(recipe(zoo, "alone.yaml", **{**alone, "models": alone["models"][1:]}), tmp_path / "out")
    images = pixels(zoo, "shapes")
    wanted = by_clip(whole(zoo, "shapes"), zoo, CLASSES["shapes"], images, TEMPLATES[0])
    found = adarank.from_bundle(tmp_path / "out", "shapes")
    torch.testing.assert_close(logits(found, images), wanted, rtol=1e-4, atol=1e-4)
    found.save_pretrained(tmp_path / "deployed")
    again: Any = classifier_class().from_pretrained(tmp_path / "deployed")
    assert torch.equal(logits(again.eval(), images), logits(found, images))
    assert again.config.id2label[2] == "dog"


@pytest.mark.parametrize(("method", "own"), [
    ("surgery", {"adapt": {"steps": 2, "batch_size": 4}, "parameters": {"rank": 4}}),
    ("wemoe", {"adapt": {"steps": 2, "batch_size": 4}}),
    ("regmean", {}),
    ("adarank", {**ADAPT, "adapt": {"steps": 2, "batch_size": 4, "objective": "features"}}),
])  # fmt: skip
def test_what_looks_inside_networks_takes_them(zoo: Path, tmp_path: Path, method: str, own: Any) -> None:
    path = recipe(zoo, f"{method}.yaml", **{**own, "merge_method": method})
    adarank.merge_recipe(path, tmp_path / "out")
    assert set(adarank.evaluate_recipe(path, [tmp_path / "out"]).rows) >= {"base", "experts"}


def test_planning_reads_headers_alone_and_tells_what_is_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_zoo(tmp_path, "CLIPModel")
    monkeypatch.setattr(
        transformers.CLIPTextModelWithProjection, "from_pretrained", lambda *_, **__: pytest.fail("a tower was loaded")
    )
    job = open_job(load_recipe(recipe(folder)))
    described = describe(job)
    assert described["kind"] == "zero-shot-image-classification"
    tower = whole(folder, "base").text_model.state_dict().values()
    assert described["peak_bytes"] - job.process_bytes >= 4 * sum(own.numel() for own in tower)
    assert described["heads"] == {task: ["classifier.weight"] for task in CLASSES}
    assert main(["plan", str(recipe(folder))]) == 0
    shown = capsys.readouterr().out
    assert "heads are made by the base's text tower" in " ".join(shown.split())


def test_names_and_templates_may_be_files(zoo: Path) -> None:
    (zoo / "classes.txt").write_text("\n".join(CLASSES["shapes"]) + "\n")
    (zoo / "templates.txt").write_text("the {} drawing\n\n")
    job = open_job(load_recipe(recipe(zoo, tasks={"shapes": {"classes": "classes.txt", "templates": "templates.txt"}})))
    told = open_job(load_recipe(recipe(zoo, tasks={"shapes": {"templates": ["the {} drawing"]}})))
    first, second = (build_models(own).heads["shapes"]["classifier.weight"] for own in (job, told))
    assert torch.equal(first, second)
    assert job.experts["shapes"].config["id2label"] == {"0": "red square", "1": "blue circle", "2": "dog"}


def test_classes_may_be_numbers_and_truth_values_are_refused(zoo: Path) -> None:
    job = open_job(load_recipe(recipe(zoo, tasks={"digits": {"classes": [0, 1]}})))
    assert job.experts["digits"].config["id2label"] == {"0": "0", "1": "1"}
    with pytest.raises(RecipeError, match=r"classes: .*put them in quotes"):
        load_recipe(recipe(zoo, "wrong.yaml", tasks={"digits": {"classes": [True, False]}}))


@pytest.mark.parametrize(("tasks", "changes", "text"), [
    ({"digits": {"classes": None}, "shapes": {"classes": None}}, {}, r"2 problem.*digits.*shapes.*one on each line"),
    ({"digits": {"templates": ["a photo"]}}, {}, r"template 'a photo' has no \{\}"),
    ({"digits": {"classes": "lost.txt"}}, {}, r"lost.txt: no readable list"),
    ({}, {"base_model": "models/digits"}, r"whole CLIP model.*missing from models/digits: visual_projection.weight, text_projection.weight, logit_scale"),
    ({}, {"base_model": None, "merge_method": "average"}, r"names no base"),
    ({"digits": {"kind": "image-classification"}, "shapes": {"kind": "image-classification"}}, {}, r"of zero-shot-image-classification, and this is image-classification"),
])  # fmt: skip
def test_mistakes_are_told_before_anything_is_spent(zoo: Path, tasks: Any, changes: Any, text: str) -> None:
    with pytest.raises(RecipeError, match="(?s)" + text):
        open_job(load_recipe(recipe(zoo, "wrong.yaml", tasks, **changes)))


def test_a_label_beyond_the_named_classes_is_refused(zoo: Path) -> None:
    job = open_job(load_recipe(recipe(zoo, tasks={"shapes": {"classes": ["red square", "dog"]}})))
    with pytest.raises(adarank.AdaRankError, match="label 2; the expert knows red square, dog"):
        load_tasks(job)


def test_a_text_tower_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    folder = make_zoo(tmp_path)
    for file in (folder / "models" / "base").glob("tokenizer*"):
        file.unlink()
    job = open_job(load_recipe(recipe(folder)))
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        build_models(job)
