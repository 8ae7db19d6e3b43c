"""Image classifiers: merged, adapted, loaded and scored; how images of any form become a model's input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

import adarank
from adarank.cli.main import main
from adarank.errors import DataError, RecipeError
from adarank.models import FAMILIES, kind_of
from adarank.models.image import ImageClassifiers
from adarank.models.predict import predict
from adarank.recipe.reader import load_recipe
from adarank.workflow.build_networks import build_models
from adarank.workflow.evaluate import heads_of
from adarank.workflow.load_tasks import load_tasks
from image_zoo import ADAPT, HEADS, SIZE, TASKS, expert, make_zoo, recipe
from test_end_to_end import KILLED

ALONE = {"merge_method": "task_arithmetic", "parameters": {"lambda": 1.0}}
TEACHER = "DeiTForImageClassificationWithTeacher"  # two heads, whose logits are averaged


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("resnet"), "resnet")


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


@torch.no_grad()
def logits(module: Any, pixels: torch.Tensor) -> torch.Tensor:
    return module(pixel_values=pixels).logits


@pytest.mark.parametrize("bare_base", [True, False])
@pytest.mark.parametrize("architecture", [*HEADS, TEACHER])
def test_one_expert_merged_alone_is_that_expert(tmp_path: Path, architecture: str, bare_base: bool) -> None:
    """What the loader renames would otherwise stay at the base without a word. The recipe does not say the kind."""
    name, head = ("deit", TEACHER) if architecture == TEACHER else (architecture, None)
    folder = make_zoo(tmp_path, name, bare_base, head=head)
    loaded = load_recipe(recipe(folder, models=[expert("shapes", kind=None)], **ALONE))
    adarank.merge_recipe(loaded, tmp_path / "out")
    job = adarank.open_job(loaded)
    models = build_models(job)
    pixels = torch.randn(4, 3, SIZE, SIZE)
    own = transformers.AutoModelForImageClassification.from_pretrained(folder / "models" / "shapes").eval()
    wanted = logits(own, pixels)
    assert (logits(models.modules["shapes"], pixels) - wanted).abs().max() > 1e-3  # the base's body is another
    models.fill(weights(tmp_path / "out").items())
    torch.testing.assert_close(logits(models.modules["shapes"], pixels), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(adarank.load_task(tmp_path / "out", "shapes"), pixels), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("architecture", "bare_base"), [(name, i % 2 == 0) for i, name in enumerate(HEADS)])
def test_an_adapted_task_loads_as_it_was_scored(tmp_path: Path, architecture: str, bare_base: bool) -> None:
    folder = make_zoo(tmp_path, architecture, bare_base)
    loaded = load_recipe(recipe(folder, **{**ADAPT, "adapt": {"steps": 2, "batch_size": 4}}))
    record = adarank.merge_recipe(loaded, tmp_path / "out")
    assert record["adaptation"]["steps"] == 2
    job = adarank.open_job(loaded)
    models = build_models(job)
    models.fill(weights(tmp_path / "out").items())
    for task, data in load_tasks(job).items():
        with heads_of(tmp_path / "out", models):
            rows, scored = predict(FAMILIES["image-classification"], models.modules[task], data, "test")
        again = logits(adarank.load_task(tmp_path / "out", task), data.examples.batch(rows)["pixel_values"])
        assert scored.shape == (24, TASKS[task])
        torch.testing.assert_close(again, scored)


def test_evaluation_scores_base_output_and_experts(zoo: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe(zoo, models=[expert("shapes")], **ALONE))
    adarank.merge_recipe(loaded, tmp_path / "out")
    table = adarank.evaluate_recipe(loaded, [tmp_path / "out"])
    assert list(table.rows) == ["base", str(tmp_path / "out"), "experts"]
    assert table.rows[str(tmp_path / "out")] == table.rows["experts"]
    assert table.counts == {"shapes": 24}


# Statistics of batch norms


def test_running_statistics_merge_and_counters_are_kept(resnet: Path, tmp_path: Path) -> None:
    given = {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.5}}
    record = adarank.merge_recipe(load_recipe(recipe(resnet, **given)), tmp_path / "out")
    name = "embedder.embedder.normalization.running_var"
    base, *own = [next(t for n, t in weights(resnet / "models" / m).items() if n.endswith(name)) for m in ("base", *TASKS)]  # fmt: skip
    torch.testing.assert_close(weights(tmp_path / "out")[name], base + 0.5 * sum(t - base for t in own))
    assert record["plan"]["tensors"][name.replace("running_var", "num_batches_tracked")]["action"] == "keep"


def test_a_variance_below_zero_is_refused(resnet: Path, tmp_path: Path) -> None:
    given = {"merge_method": "task_arithmetic", "parameters": {"lambda": -60.0}}
    with pytest.raises(RecipeError, match=r"running_var: the result of 'task_arithmetic' has negative variances"):
        adarank.merge_recipe(load_recipe(recipe(resnet, **given)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    adarank.merge_recipe(load_recipe(recipe(resnet, **given, select={"keep": ["*.running_*"]})), tmp_path / "out")


# Recipes


def test_the_kind_is_read_off_the_experts(zoo: Path, tmp_path: Path) -> None:
    untold = [expert(task, kind=None) for task in TASKS]
    job = adarank.open_job(load_recipe(recipe(zoo, models=untold)))
    assert job.family is FAMILIES["image-classification"]
    mixed = [expert("digits", kind="text-classification"), expert("shapes", kind=None)]
    with pytest.raises(RecipeError, match=r"different kinds \(image-classification, text-classification\)"):
        adarank.open_job(load_recipe(recipe(zoo, models=mixed)))
    said = [expert("digits", kind="text-classification"), expert("shapes")]
    with pytest.raises(RecipeError, match=r"different kinds \(image-classification, text-classification\)"):
        load_recipe(recipe(zoo, models=said))


def test_an_expert_that_does_not_tell_its_kind_is_named(zoo: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(zoo, tmp_path / "zoo")
    (folder / "models" / "digits" / "config.json").write_text("{}")
    with pytest.raises(
        RecipeError, match=r"the kind of task 'digits' cannot be told from .*config.json. Give task: kind"
    ):
        adarank.open_job(load_recipe(recipe(folder, models=[expert(task, kind=None) for task in TASKS])))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"architectures": ["ViTForImageClassification"]}, "image-classification"),
        ({"architectures": [TEACHER]}, "image-classification"),
        ({"architectures": ["BertForSequenceClassification"], "model_type": "vit"}, "text-classification"),
        ({"architectures": ["ViTModel"], "model_type": "vit"}, "image-classification"),
        ({"architectures": None, "model_type": "roberta"}, "text-classification"),
        ({"model_type": "of-the-future"}, None),
        ({}, None),
    ],
)
def test_kind_of_a_configuration(config: dict[str, Any], kind: str | None) -> None:
    assert kind_of(config) == kind


def test_plan_names_splits_and_actions(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(recipe(zoo, **ADAPT))
    assert main(["plan", path]) == 0
    shown = capsys.readouterr().out
    assert "inputs of digits: 24 to adapt, 12 to select, 24 to test" in shown
    assert "head of each task: classifier.bias, classifier.weight" in shown
    assert main(["plan", path, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["kind"] == "image-classification"
    kernel = planned["tensors"]["embeddings.patch_embeddings.projection.weight"]
    assert (kernel["action"], kernel["shape"]) == ("scale", [16, 3, 8, 8])


def test_relative_position_tables_are_no_matrices(tmp_path: Path) -> None:
    job = adarank.open_job(load_recipe(recipe(make_zoo(tmp_path, "swin"))))
    tables = {choice.action for name, choice in job.network.choices.items() if name.endswith("position_bias_table")}
    assert tables == {"scale"}


def test_killed_then_run_again_is_uninterrupted(zoo: Path, tmp_path: Path) -> None:
    path, out, whole = recipe(zoo, "killed.yaml", **ADAPT), tmp_path / "out", tmp_path / "whole"
    run = [sys.executable, "-c", KILLED, str(path), str(out), "5", "adapt"]
    assert subprocess.run(run, capture_output=True, check=False).returncode == -9
    record = adarank.merge_recipe(load_recipe(path), out)
    assert record["adaptation"]["resumed_from"] == [4]
    adarank.merge_recipe(load_recipe(path), whole)
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(out).items())


def test_other_images_are_another_run(zoo: Path, tmp_path: Path) -> None:
    """The fingerprint that guards a saved state covers pixels and the processor's settings."""
    folder = shutil.copytree(zoo, tmp_path / "zoo")

    def prints() -> dict[str, str]:
        job = adarank.open_job(load_recipe(recipe(folder)))
        return {task: data.fingerprint() for task, data in load_tasks(job).items()}

    first = prints()
    assert prints() == first
    file = folder / "data" / "digits.npz"
    arrays = dict(np.load(file))
    arrays["image"][7, 3, 3, 0] ^= 1
    np.savez(file, **arrays)
    second = prints()
    assert second["digits"] != first["digits"]
    assert second["shapes"] == first["shapes"]
    settings = folder / "models" / "shapes" / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("0.6", "0.7"))
    assert prints()["shapes"] != first["shapes"]


# Mistakes


def npz(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    arrays = dict(np.load(folder / "data" / "digits.npz"))
    np.savez(folder / "data" / "digits.npz", image=change(arrays["image"]), label=arrays["label"])


def pngs(folder: Path, names: Sequence[str] = ("digits-0/a.png", "digits-1/b.png")) -> Path:
    """A folder of images in the place of the npz file, which the recipe then reads."""
    (folder / "data" / "digits.npz").unlink()
    path = folder / "data" / "digits.npz"
    path.mkdir()
    for number, name in enumerate(names):
        (path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (number, 9, 9)).save(path / name)
    return path


def no_processor(folder: Path) -> None:
    (folder / "models" / "digits" / "preprocessor_config.json").unlink()


def truncated(folder: Path) -> None:
    file = pngs(folder) / "digits-1" / "b.png"
    file.write_bytes(file.read_bytes()[:-40])


def no_image(folder: Path) -> None:
    (pngs(folder) / "digits-1" / "b.png").write_text("not an image")


def deep(folder: Path) -> None:
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(pngs(folder) / "digits-1" / "b.png")


def unsized(folder: Path) -> None:
    Image.new("RGB", (9, 20)).save(pngs(folder) / "digits-1" / "b.png")
    settings = folder / "models" / "digits" / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace('"do_resize": true', '"do_resize": false'))


def other_size(folder: Path) -> None:
    settings = folder / "models" / "digits" / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace(f'"height": {SIZE}', '"height": 24'))


def no_column(folder: Path) -> None:
    file = folder / "data" / "digits.npz"
    arrays = dict(np.load(file))
    np.savez(file, picture=arrays["image"], label=arrays["label"])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_processor, ["models/digits", "no usable image processor", "Copy preprocessor_config.json"]),
        (truncated, ["task 'digits', row 2", "digits-1/b.png", "truncated"]),
        (no_image, ["row 2", "digits-1/b.png", "of no known format"]),
        (deep, ["digits-1/b.png", "mode I;16", "8-bit"]),
        (unsized, ["row 2", "(3, 20, 9)", "(3, 20, 20)", "do_resize"]),
        (other_size, ["ViTForImageClassification", "(3, 24, 16)", "preprocessor_config.json"]),
        (no_column, ["digits.npz", "no column 'image'", "'picture'", "task: columns"]),
        (lambda folder: npz(folder, lambda a: a / 255), ["row 1", "float64", "uint8 from 0 to 255"]),
        (lambda folder: npz(folder, lambda a: a.reshape(60, -1)), ["(768,)", "(height, width, 3)"]),
        (lambda folder: npz(folder, lambda a: np.repeat(a, 2, axis=3)), ["(16, 16, 6)", "(height, width, 3)"]),
        (lambda folder: pngs(folder, ()), ["digits.npz: no rows", "one sub-folder a class"]),
        (lambda folder: pngs(folder, ("other/a.png",)), ["row 1 has label 'other'", "digits-0, digits-1"]),
    ],
)
def test_each_mistake_is_one_sentence_and_nothing_left(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], words: list[str]
) -> None:
    folder = shutil.copytree(zoo, tmp_path / "zoo")
    path = recipe(folder, **{**ADAPT, "adapt": {"steps": 1, "batch_size": 2}, "data": {"adapt": 0.5, "select": 0, "test": 0.5}})  # fmt: skip
    damage(folder)
    assert main(["merge", str(path), str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert all(word in shown for word in words), shown
    assert "Traceback" not in shown
    assert " at 0x" not in shown
    assert [p.name for p in tmp_path.iterdir()] == ["zoo"]


def test_a_broken_image_is_refused_before_adaptation(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageClassifiers, "kept_bytes", 0)
    folder = shutil.copytree(zoo, tmp_path / "zoo")
    no_image(folder)
    with pytest.raises(DataError, match=r"row 2: .*b\.png: no readable image"):
        load_tasks(adarank.open_job(load_recipe(recipe(folder))))


@pytest.mark.parametrize("size", [(2, 16), (24, 24)], ids=["less than a patch", "another"])
def test_images_that_the_network_refuses_are_a_sentence(size: tuple[int, int], zoo: Path) -> None:
    module = transformers.AutoModelForImageClassification.from_pretrained(zoo / "models" / "digits")
    with pytest.raises(DataError, match=rf"refuses images of shape \(3, {size[0]}, {size[1]}\)"):
        ImageClassifiers().logits(module, {"pixel_values": torch.zeros(1, 3, *size)})


def test_what_the_machine_refuses_is_no_fault_of_the_images() -> None:
    def out_of_memory(**batch: torch.Tensor) -> None:
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        ImageClassifiers().logits(out_of_memory, {"pixel_values": torch.zeros(1, 3, 4, 4)})  # type: ignore[arg-type]
