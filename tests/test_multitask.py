"""Multi-task training: what is trained, on which labels, and that it is plain fine-tuning."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import adarank
import image_zoo
import text_zoo
from adarank.adapt.history import History
from adarank.cli.main import main
from adarank.errors import DataError, Interrupted, MismatchError, RecipeError
from adarank.recipe.reader import load_recipe
from adarank.workflow.build_networks import build_models
from adarank.workflow.evaluate import evaluate
from adarank.workflow.load_tasks import load_tasks
from adarank.workflow.merge import merge
from text_zoo import TASKS, WORDS, make_zoo, recipe

TRAIN: dict[str, Any] = {
    "merge_method": "multitask",
    "parameters": {"steps": 8, "batch_size": 4, "lr": 0.01, "warmup": 0.25, "save_every": 3},
}


def train(**changes: Any) -> dict[str, Any]:
    return {**TRAIN, "parameters": {**TRAIN["parameters"], **changes}}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


def learnable(folder: Path) -> list[dict[str, Any]]:
    """Entries whose labels can be learned: every class has words of its own."""
    entries, draw = [], random.Random(0)
    for task, classes in TASKS.items():
        rows = [(y, " ".join(draw.choices(WORDS[y::classes], k=8))) for y in range(classes) for _ in range(40)]
        path = folder / f"{task}.tsv"
        path.write_text("label\ttext\n" + "".join(f"{label}\t{text}\n" for label, text in rows))
        entries.append({"model": f"models/{task}", "task": {"name": task, "data": str(path)}})
    return entries


def everything(out: Path) -> dict[str, Tensor]:
    """All tensors of an output: the body's, and each head's."""
    heads = {f"{file.parent.name}/{n}": t for file in out.glob("heads/*/head.safetensors") for n, t in load_file(file).items()}  # fmt: skip
    return {**load_file(out / "model.safetensors"), **heads}


def same(one: Path, other: Path) -> bool:
    first, second = everything(one), everything(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("heads", ["fresh", "expert", "fixed"])
def test_every_tasks_loss_falls_and_the_output_scores_the_same(zoo: Path, tmp_path: Path, heads: str) -> None:
    path = recipe(zoo, **train(steps=60, batch_size=16, heads=heads), models=learnable(tmp_path))
    record = merge(load_recipe(path), tmp_path / "out")
    found = record["training"]
    assert found["reads"].startswith("labels of the adapt split")
    assert found["steps"] == 60
    assert "adaptation" not in record
    for values in found["losses"].values():
        assert sum(values[-10:]) < 0.95 * sum(values[:10])
    table = evaluate(load_recipe(path), [tmp_path / "out"])
    (row,) = [name for name in table.rows if name not in ("base", "experts")]
    assert row.endswith("[trained with labels of its adapt split]")
    for task, own in load_tasks(adarank.open_job(load_recipe(path))).items():
        model = adarank.load_task(tmp_path / "out", task)
        rows = own.splits.rows["test"]
        guesses = [int(model(**own.examples.batch([r])).logits.argmax()) for r in rows]
        right = sum(a == b for a, b in zip(guesses, own.targets(rows), strict=True))
        assert table.rows[row][task] == pytest.approx(100 * right / len(rows))


def test_scoring_a_trained_output_leaves_the_experts_heads(zoo: Path, tmp_path: Path) -> None:
    merge(load_recipe(recipe(zoo, **TRAIN)), tmp_path / "out")
    alone = evaluate(load_recipe(recipe(zoo)))
    beside = evaluate(load_recipe(recipe(zoo)), [tmp_path / "out"])
    assert beside.rows["experts"] == alone.rows["experts"]


def test_a_trained_output_without_its_heads_is_not_scored(zoo: Path, tmp_path: Path) -> None:
    merge(load_recipe(recipe(zoo, **TRAIN)), tmp_path / "out")
    (tmp_path / "out" / "heads" / "mood" / "head.safetensors").unlink()
    with pytest.raises(MismatchError, match=r"mood/head\.safetensors: is missing"):
        evaluate(load_recipe(recipe(zoo)), [tmp_path / "out"])


def test_what_is_trained_and_what_is_not(zoo: Path, tmp_path: Path) -> None:
    """The body with its embeddings moves, heads as asked; what the recipe keeps stays the base's, bit for bit."""
    keep = "encoder.layer.0.output.dense.weight"
    base = load_file(zoo / "models" / "base" / "model.safetensors")
    for heads in ("fresh", "expert", "fixed"):
        out = tmp_path / heads
        merge(load_recipe(recipe(zoo, **train(heads=heads), select={"keep": [keep]})), out)
        body = load_file(out / "model.safetensors")
        still = [name for name in body if torch.equal(body[name], base[name])]
        assert still == [keep]
        for task in TASKS:
            expert = load_file(zoo / "models" / task / "model.safetensors")
            head = load_file(out / "heads" / task / "head.safetensors")
            assert {n for n in expert if not n.startswith("bert.")} == set(head)
            assert all(torch.equal(head[name], expert[name]) == (heads == "fixed") for name in head)


def test_no_step_leaves_the_base_and_the_heads_asked_for(zoo: Path, tmp_path: Path) -> None:
    base = load_file(zoo / "models" / "base" / "model.safetensors")
    merge(load_recipe(recipe(zoo, **train(steps=0, heads="expert"))), tmp_path / "expert")
    merge(load_recipe(recipe(zoo, **train(steps=0))), tmp_path / "fresh")
    for name in ("expert", "fresh"):
        body = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(body[key], base[key]) for key in body)
    for task in TASKS:
        expert = load_file(zoo / "models" / task / "model.safetensors")
        kept, fresh = (load_file(tmp_path / n / "heads" / task / "head.safetensors") for n in ("expert", "fresh"))
        assert all(torch.equal(kept[key], expert[key]) for key in kept)
        assert not torch.equal(fresh["classifier.weight"], expert["classifier.weight"])
        assert 0 < fresh["classifier.weight"].std() < 0.05  # as BERT draws: N(0, 0.02²), biases 0
        assert not fresh["classifier.bias"].any()


def test_the_seed_decides_every_byte(zoo: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        torch.rand(hash(name) % 7)  # what was drawn before does not matter
        merge(load_recipe(recipe(zoo, **TRAIN, seed=seed)), tmp_path / name)
    assert same(tmp_path / "one", tmp_path / "two")
    assert not same(tmp_path / "one", tmp_path / "other")


def test_stopped_and_continued_gives_the_same_bytes(zoo: Path, tmp_path: Path) -> None:
    path = recipe(zoo, **TRAIN)

    def stop(history: History, steps: int) -> None:
        if history.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="step 5 of 8"):
        merge(load_recipe(path), tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    torch.rand(5)
    record = merge(load_recipe(path), tmp_path / "out")
    assert record["training"]["resumed_from"] == [5]
    merge(load_recipe(path), tmp_path / "whole")
    assert same(tmp_path / "out", tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_a_state_of_other_settings_or_labels_is_refused(zoo: Path, tmp_path: Path) -> None:
    def stop(history: History, steps: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def ask(labels: str = "", progress: Any = None, **changes: Any) -> dict[str, Any]:
        models = split_files(zoo, tmp_path, flip=labels)
        return merge(load_recipe(recipe(zoo, **train(**changes), models=models)), tmp_path / "out", progress=progress)

    with pytest.raises(Interrupted):
        ask(progress=stop)
    for other in ({"lr": 0.02}, {"labels": "adapt"}):
        with pytest.raises(RecipeError, match="belongs to another run"):
            ask(**other)
    assert ask(save_every=2)["training"]["resumed_from"] == [1]  # decides no number


def plain_loop(zoo: Path, task: str, steps: int, size: int, lr: float, warmup: int) -> dict[str, Tensor]:
    """Fine-tuning as one writes it by hand: the base's body, the expert's head, AdamW, warm-up and linear decay."""
    data = load_tasks(adarank.open_job(load_recipe(recipe(zoo, "plain.yaml"))))[task]
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(zoo / "models" / task)
    model.bert.load_state_dict(load_file(zoo / "models" / "base" / "model.safetensors"), strict=False)
    plain = [p for n, p in model.named_parameters() if n.endswith("bias") or "LayerNorm" in n]
    decayed = [p for n, p in model.named_parameters() if not (n.endswith("bias") or "LayerNorm" in n)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=lr)
    model.train()
    torch.manual_seed(0)
    for step in range(steps):
        rows = data.adapt_rows(step, size)
        rate = lr * ((step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup))
        for group in optimiser.param_groups:
            group["lr"] = rate
        labels = torch.tensor([int(data.labels[row] or 0) for row in rows])
        optimiser.zero_grad()
        model(**data.examples.batch(rows), labels=labels).loss.backward()
        optimiser.step()
    return dict(model.state_dict())


def test_one_task_is_plain_fine_tuning(zoo: Path, tmp_path: Path) -> None:
    only = [{"model": "models/mood", "task": {"name": "mood", "data": "data/mood.tsv"}}]
    changes = train(steps=12, warmup=0.25, heads="expert", weight_decay=0.1)
    merge(load_recipe(recipe(zoo, **changes, models=only)), tmp_path / "out")
    expected = plain_loop(zoo, "mood", 12, 4, 0.01, 3)
    body = load_file(tmp_path / "out" / "model.safetensors")
    head = load_file(tmp_path / "out" / "heads" / "mood" / "head.safetensors")
    for name, tensor in {**{f"bert.{n}": t for n, t in body.items()}, **head}.items():
        if name in expected:
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert set(head) <= set(expected)


def split_files(zoo: Path, folder: Path, flip: str = "", drop: str = "") -> list[dict[str, Any]]:
    """Entries with a file per split; the labels of one split are wrong, or all but absent."""
    entries = []
    for task, classes in TASKS.items():
        _, *rows = [line.split("\t") for line in (zoo / "data" / f"{task}.tsv").read_text().splitlines()]
        files = {}
        for number, split in enumerate(("adapt", "select", "test")):
            own = rows[number::3]
            if split in flip.split():
                own = [[str((int(y) + 1) % classes), text] for y, text in own]
            lines = ["text"] + [text for _, text in own] if split in drop.split() else ["label\ttext"] + ["\t".join(row) for row in own]  # fmt: skip
            files[split] = str(folder / f"{task}-{split}-{flip}-{drop}.tsv".replace(" ", "-"))
            Path(files[split]).write_text("\n".join(lines) + "\n")
        entries.append({"model": f"models/{task}", "task": {"name": task, "data": files}})
    return entries


def test_no_label_of_select_and_test_is_read(zoo: Path, tmp_path: Path) -> None:
    """Wrong or absent labels there change no byte; wrong ones of adapt do."""
    variants = {
        "right": {},
        "wrong": {"flip": "select test"},
        "absent": {"drop": "select test"},
        "other": {"flip": "adapt"},
    }
    for name, changed in variants.items():
        models = split_files(zoo, tmp_path, **changed)
        merge(load_recipe(recipe(zoo, f"{name}.yaml", **TRAIN, models=models)), tmp_path / name)
    assert same(tmp_path / "right", tmp_path / "wrong")
    assert same(tmp_path / "right", tmp_path / "absent")
    assert not same(tmp_path / "right", tmp_path / "other")


def test_adapt_rows_without_labels_are_refused_at_once(zoo: Path, tmp_path: Path) -> None:
    models = split_files(zoo, tmp_path, drop="adapt")
    with pytest.raises(DataError, match=r"task 'mood'.*no labels.*columns"):
        merge(load_recipe(recipe(zoo, **TRAIN, models=models)), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (train(stepz=3), "stepz.*steps"),
        (train(lr=0), "lr"),
        ({**TRAIN, "adapt": {"steps": 3}}, "does not adapt"),
        ({**TRAIN, "data": {"protocol": "transductive"}}, "reads labels.*scored.*disjoint"),
        ({**TRAIN, "base_model": None}, "base_model"),
        ({**TRAIN, "models": [{"model": "models/mood"}]}, "trains on its inputs"),
    ],
)
def test_recipes_that_cannot_train_are_refused(zoo: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        load_recipe(recipe(zoo, **changes))


def test_the_command_line_says_that_labels_are_read(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(recipe(zoo, **TRAIN))
    assert main(["plan", path]) == 0
    shown = capsys.readouterr().out
    assert "reads labels of the adapt split: a reference, not a merge" in shown
    assert "trained" in shown
    assert "decomposed" not in shown
    assert main(["merge", path, str(tmp_path / "out")]) == 0
    done = capsys.readouterr()
    assert "reads labels of the adapt split of every task; none of select and test" in done.out
    assert "kept" not in done.err
    assert main(["methods", "multitask"]) == 0
    assert "reads labels" in capsys.readouterr().out
    assert main(["search", path, str(zoo / "best.yaml"), "--over", "lr=0.1,0.2"]) == 1
    assert "learns what it writes" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ["vit", "resnet"])
def test_image_models_train_running_statistics_too(tmp_path: Path, architecture: str) -> None:
    folder = image_zoo.make_zoo(tmp_path, architecture)
    path = image_zoo.recipe(folder, **train(steps=3))
    merge(load_recipe(path), folder / "out")
    base = load_file(folder / "models" / "base" / "model.safetensors")
    body = load_file(folder / "out" / "model.safetensors")
    still = [name for name in body if torch.equal(body[name], base[name])]
    assert not still
    counters = [name for name in body if name.endswith("num_batches_tracked")]
    assert all(int(body[name]) == int(base[name]) + 3 * len(image_zoo.TASKS) for name in counters)
    assert bool(counters) == (architecture == "resnet")
    assert set(evaluate(load_recipe(path), [folder / "out"]).rows) > {"base", "experts"}


def test_every_text_architecture_trains(tmp_path: Path) -> None:
    for architecture in ("roberta", "distilbert", "gpt2"):
        folder = text_zoo.make_zoo(tmp_path / architecture, architecture)
        record = merge(load_recipe(recipe(folder, **train(steps=2))), folder / "out")
        assert record["training"]["steps"] == 2
        models = build_models(adarank.open_job(load_recipe(recipe(folder))))
        for task in TASKS:
            assert set(models.heads[task]) == set(load_file(folder / "out" / "heads" / task / "head.safetensors"))
