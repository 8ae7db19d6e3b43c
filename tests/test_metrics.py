"""Metrics: values that are worked out by hand or with scikit-learn and SciPy, labels as files hold them, whole recipes."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from torch import Tensor, nn

import adarank
import text_zoo
from adarank.cli.main import main
from adarank.data.labels import Label, problem_of, read_labels
from adarank.data.metrics import chosen_metric, class_scores, loss, score
from adarank.errors import DataError
from adarank.recipe.job import open_job
from adarank.recipe.reader import load_recipe
from adarank.recipe.registry import METHODS
from adarank.workflow.load_tasks import load_tasks
from adarank.workflow.plan import plan
from adarank.workflow.scores import Table
from adarank.workflow.search import Axis, search
from make import randn

ONE, SEVERAL, NUMBER = "single_label_classification", "multi_label_classification", "regression"


def logits_of(guesses: Sequence[int], classes: int) -> Tensor:
    return nn.functional.one_hot(torch.tensor(guesses), classes).float()


# Class 1 is guessed 3 times, 2 of them rightly, and had by 4 inputs: F1 = 2·2 / (3 + 4). Class 0: 4 right, 6 guessed, 5 had.
LABELS, GUESSES = [0, 0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(("metric", "wanted"), [
    ("accuracy", 6 / 9), ("f1", 4 / 7), ("macro_f1", (4 / 7 + 8 / 11) / 2),
    ("matthews", (4 * 2 - 1 * 2) / math.sqrt(5 * 4 * 6 * 3)),
])  # fmt: skip
def test_scores_of_one_label_are_as_worked_by_hand(metric: str, wanted: float) -> None:
    assert score(LABELS, logits_of(GUESSES, 2), metric, ONE) == pytest.approx(100 * wanted)


# Three inputs, three classes: logits above 0 are {0}, {0, 1}, {}.
TAGS, TAG_LOGITS = [(0,), (1, 2), ()], torch.tensor([[1.0, -1.0, -2.0], [3.0, 0.5, -1.0], [-1.0, -3.0, -0.1]])


@pytest.mark.parametrize(("metric", "wanted"), [
    ("micro_f1", 2 * 2 / (3 + 3)), ("macro_f1", (2 / 3 + 1 + 0) / 3), ("exact_match", 2 / 3),
])  # fmt: skip
def test_scores_of_several_labels_are_as_worked_by_hand(metric: str, wanted: float) -> None:
    assert score(TAGS, TAG_LOGITS, metric, SEVERAL) == pytest.approx(100 * wanted)


def test_correlations_are_scipys_and_of_constants_nought() -> None:
    labels, given = randn(0, 40).tolist(), randn(1, 40, 1)
    for metric, oracle in (("pearson", scipy.stats.pearsonr), ("spearman", scipy.stats.spearmanr)):
        wanted = 100 * oracle(labels, given[:, 0].numpy()).statistic
        assert score(labels, given, metric, NUMBER) == pytest.approx(wanted, rel=1e-6)
        assert score(labels, torch.full((40, 1), 3.0), metric, NUMBER) == 0.0
        assert score([2.0] * 40, given, metric, NUMBER) == 0.0
    line = torch.tensor([[1.0], [2.0], [4.0]])
    assert score([10.0, 20.0, 400.0], line, "spearman", NUMBER) == pytest.approx(100)
    assert score([-1.0, -2.0, -4.0], line, "pearson", NUMBER) == pytest.approx(-100)


@pytest.mark.parametrize("problem", [ONE, SEVERAL, NUMBER])
def test_losses_are_those_that_transformers_trains_by(problem: Any) -> None:
    import transformers

    outputs = 1 if problem == NUMBER else 3
    config = transformers.AutoConfig.for_model("bert", vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                               intermediate_size=8, num_labels=outputs, problem_type=problem)  # fmt: skip
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    labels: dict[str, tuple[list[Any], Tensor]] = {
        ONE: ([0, 2, 1], torch.tensor([0, 2, 1])),
        SEVERAL: (TAGS, torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0]])),
        NUMBER: ([0.5, -2.0, 3.0], torch.tensor([0.5, -2.0, 3.0])),
    }
    given, stored = labels[problem]
    with torch.no_grad():
        out = model(input_ids=torch.arange(9).reshape(3, 3), labels=stored)
    assert score(given, out.logits, "loss", problem) == pytest.approx(float(out.loss), rel=1e-5)
    assert float(loss(given, out.logits, problem)) == pytest.approx(float(out.loss), rel=1e-5)


def test_an_output_that_is_not_finite_has_no_loss() -> None:
    for metric, problem, labels in (("loss", ONE, [0]), ("pearson", NUMBER, [1.0])):
        with pytest.raises(DataError, match="not finite"):
            score(labels, torch.tensor([[math.nan]]), metric, problem)  # type: ignore[arg-type]


def test_class_scores_are_scikit_learns() -> None:
    labels, guesses = [0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 0, 2]
    rows = class_scores(labels, logits_of(guesses, 4), ONE, ("a", "b", "c", "d"))
    assert [row.name for row in rows] == ["a", "b", "c", "d"]
    assert [row.inputs for row in rows] == [2, 1, 3, 0]
    for average, name in (("precision_score", "precision"), ("recall_score", "recall"), ("f1_score", "f1")):
        oracle = getattr(sklearn.metrics, average)(labels, guesses, labels=range(4), average=None, zero_division=0)
        assert [getattr(row, name) for row in rows] == pytest.approx(list(100 * oracle))
    tags = class_scores(TAGS, TAG_LOGITS, SEVERAL, ("x", "y", "z"))
    assert [(row.precision, row.recall) for row in tags] == [(50, 100), (100, 100), (0, 0)]
    assert class_scores([1.0], torch.zeros(1, 1), NUMBER, ()) == ()


@pytest.mark.parametrize(("metric", "problem", "classes", "sentence"), [
    ("pearson", ONE, 3, "metric 'pearson' is not for single label classification. Give accuracy"),
    ("accuracy", SEVERAL, 3, "not for multi label classification. Give micro_f1"),
    ("f1", ONE, 3, "of two classes, and there are 3. Give macro_f1"),
])  # fmt: skip
def test_a_metric_for_another_problem_is_refused(metric: str, problem: Any, classes: int, sentence: str) -> None:
    with pytest.raises(DataError, match=rf"task 'x': .*{sentence}"):
        chosen_metric(metric, problem, classes, "task 'x'")


def test_problems_are_told_as_transformers_does() -> None:
    assert problem_of({"num_labels": 1}) == problem_of({"id2label": {"0": "LABEL_0"}}) == NUMBER
    assert problem_of({}) == problem_of({"id2label": {"0": "a", "1": "b"}}) == ONE
    assert problem_of({"problem_type": SEVERAL, "num_labels": 3}) == SEVERAL
    assert [chosen_metric(None, problem, 2, "") for problem in (ONE, SEVERAL, NUMBER)] == ["accuracy", "micro_f1", "pearson"]  # type: ignore[arg-type]  # fmt: skip


CONFIG = {"problem_type": SEVERAL, "id2label": {"0": "joy", "1": "fear", "2": "awe"}, "label2id": {"joy": 0, "fear": 1, "awe": 2}}  # fmt: skip


@pytest.mark.parametrize("cells", [
    [[0, 2], [], [1]], [["joy", "awe"], [], ["fear"]], ["0,2", "[]", "1"], ["joy, awe", "[]", "fear"], ['["awe", "joy"]', "[]", "fear"],
    [[1, 0, 1], [0, 0, 0], [0, 1, 0]], ["1,0,1", "0,0,0", "0,1,0"], [[True, False, True], [False] * 3, [False, True, False]],
    [np.array([1.0, 0.0, 1.0]), np.zeros(3), np.array([0.0, 1.0, 0.0])],
], ids=["numbers", "names", "text", "named text", "json", "hot", "hot text", "truth", "floats"])  # fmt: skip
def test_several_labels_are_read_in_every_form(cells: list[Any]) -> None:
    assert read_labels(cells, CONFIG, "x") == [(0, 2), (), (1,)]


@pytest.mark.parametrize(("config", "cells", "sentence"), [
    (CONFIG, [[0, 3]], r"row 1 has label 3; the expert knows joy, fear, awe"),
    (CONFIG, [[0], [1, 1]], r"row 2 names a class twice"),
    (CONFIG, ["joy,sorrow"], r"label 'sorrow'"),
    ({"num_labels": 1}, [1.0, "good"], r"row 2 has label 'good', and its expert gives a number"),
    ({"num_labels": 1}, [math.inf], r"Give a finite number"),
    ({"problem_type": NUMBER, "num_labels": 3}, [1.0], r"gives 3 numbers for an input"),
])  # fmt: skip
def test_labels_that_the_expert_does_not_know_are_named(config: Any, cells: list[Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        read_labels(cells, config, "x")


def test_withheld_labels_are_told_from_numbers() -> None:
    assert read_labels([[0], None, "", -1], CONFIG, "x") == [(0,), None, None, None]
    assert read_labels(["-1", "2.5", "", None], {"num_labels": 1}, "x") == [-1.0, 2.5, None, None]
    assert read_labels([-1, -1.0], {"num_labels": 1}, "x") == [None, None]


def test_modules_in_memory_are_scored_by_any_metric() -> None:
    torch.manual_seed(0)
    number, tags, inputs = nn.Linear(4, 1), nn.Linear(4, 3), randn(0, 20, 4)
    heights = number(inputs).detach()[:, 0]
    hot = (tags(inputs) > 0).int()
    lists = [[i for i, v in enumerate(row) if v] for row in hot.tolist()]
    batches = {"n": [(inputs, (3 * heights + 1).tolist())], "h": [(inputs, hot)], "t": [(inputs, lists)]}
    modules = {"n": number, "h": tags, "t": tags}
    assert adarank.evaluate(modules, batches) == pytest.approx({"n": 100, "h": 100, "t": 100})
    scores = adarank.evaluate(modules, batches, metric={"n": "loss", "h": "exact_match"})
    assert scores["n"] == pytest.approx(float(((2 * heights + 1) ** 2).mean()), rel=1e-5)
    with pytest.raises(DataError, match="task 'n': metric 'accuracy' is not for regression"):
        adarank.evaluate(modules, batches, metric="accuracy")


TASKS = {"stars": 1, "tags": 3, "mood": 2}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A regression, a task with several labels an input, and a classifier; each labelled by its expert but for some rows."""
    folder = text_zoo.make_zoo(tmp_path_factory.mktemp("zoo"), tasks=TASKS)
    config = folder / "models" / "tags" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "problem_type": SEVERAL}))
    rng = np.random.default_rng(0)
    for task in ("stars", "tags"):
        with (folder / "data" / f"{task}.tsv").open() as handle:
            texts = [line.rstrip("\n").split("\t")[1] for line in handle][1:]
        labels = [f"{rng.normal():.3f}" if task == "stars" else json.dumps(sorted(rng.choice(3, rng.integers(0, 4), replace=False).tolist())) for _ in texts]  # fmt: skip
        lines = [f"{label}\t{text}\n" for label, text in zip(labels, texts, strict=True)]
        (folder / "data" / f"{task}.tsv").write_text("label\ttext\n" + "".join(lines))
    return folder


def recipe(zoo: Path, name: str = "recipe.yaml", metrics: dict[str, str] | None = None, **changes: Any) -> Path:
    models = [
        {"model": f"models/{task}", "task": {"name": task, "data": f"data/{task}.tsv", **({"metric": metrics[task]} if task in (metrics or {}) else {})}}
        for task in TASKS
    ]  # fmt: skip
    return text_zoo.recipe(zoo, name, models=models, **changes)


def outputs(zoo: Path, task: str, module: Any) -> tuple[list[Label], Tensor]:
    """Labels and logits of a task's test rows, input by input."""
    data = load_tasks(open_job(load_recipe(recipe(zoo, "data.yaml"))))[task]
    rows = data.splits.rows["test"]
    with torch.no_grad():
        return data.targets(rows), torch.cat([module(**data.examples.batch([row])).logits for row in rows])


@pytest.mark.parametrize("method", ["average", "regmean", "emr"])
def test_all_problems_merge_and_are_scored(zoo: Path, tmp_path: Path, method: str) -> None:
    path = recipe(zoo, f"{method}.yaml", merge_method=method)
    adarank.merge_recipe(path, tmp_path / "out")
    table = adarank.evaluate_recipe(path, [tmp_path / "out"])
    assert table.metrics == {"stars": "pearson", "tags": "micro_f1", "mood": "accuracy"}
    row = next(name for name in table.rows if name.startswith(str(tmp_path / "out")))
    for task in TASKS:
        labels, logits = outputs(zoo, task, adarank.load_task(tmp_path / "out", task))
        if task == "stars":
            wanted = scipy.stats.pearsonr(np.array(labels), logits[:, 0].numpy()).statistic
        elif task == "tags":
            hot = [[int(i in label) for i in range(3)] for label in labels]  # type: ignore[operator]
            wanted = sklearn.metrics.f1_score(hot, (logits > 0).int().numpy(), average="micro")
        else:
            wanted = sklearn.metrics.accuracy_score(labels, logits.argmax(dim=-1).tolist())
        assert table.rows[row][task] == pytest.approx(100 * wanted, abs=1e-3)


def test_pipelines_of_extracted_tasks_fit_their_problem(zoo: Path, tmp_path: Path) -> None:
    import transformers

    adarank.merge_recipe(recipe(zoo, "average.yaml", merge_method="average"), tmp_path / "out")
    for task in ("stars", "tags"):  # transformers has the sigmoid of one output, too, unless its problem is named
        adarank.extract(tmp_path / "out", task, tmp_path / task)
        pipe = transformers.pipeline("text-classification", model=str(tmp_path / task), top_k=None)
        with torch.no_grad():
            logits = adarank.load_task(tmp_path / "out", task)(**pipe.tokenizer("good red", return_tensors="pt")).logits
        wanted = {f"{task}-{i}": float(value) for i, value in enumerate(logits[0].sigmoid())}
        assert {e["label"]: e["score"] for e in pipe(["good red"])[0]} == pytest.approx(wanted, rel=1e-5)


READS_CLASSES = sorted(name for name, kind in METHODS.built_in.items() if kind.of_classes and kind.of_inputs)


@pytest.mark.parametrize("method", READS_CLASSES)
def test_methods_that_read_shares_of_classes_refuse(zoo: Path, tmp_path: Path, method: str) -> None:
    path = recipe(zoo, "refused.yaml", merge_method=method)
    with pytest.raises(
        DataError, match=rf"'stars': its expert is no classifier.*'{re.escape(method)}'(?s:.*)'tags': .*multi_label"
    ):
        plan(path)
    with pytest.raises(DataError, match="the task is scored all the same"):
        adarank.merge_recipe(path, tmp_path / "out")
    with pytest.raises(DataError, match="heads: learn reads its outputs"):
        adarank.merge_recipe(recipe(zoo, "heads.yaml", merge_method="average", heads="learn"), tmp_path / "out")


def test_every_problem_of_classifiers_is_adapted_at_once(zoo: Path, tmp_path: Path) -> None:
    settings = {"steps": 40, "batch_size": 8, "keep": "last", "lr_masks": 0.02, "lr_lambda": 0.01}
    record = adarank.merge_recipe(recipe(zoo, "all.yaml", merge_method="adarank", parameters={"rank": 0.5, "lambda": 1.0}, adapt=settings), tmp_path / "out")  # fmt: skip
    first, *_, last = record["adaptation"]["judged"].values()
    assert set(first) == set(TASKS)
    assert sum(last[task]["divergence"] for task in TASKS) < sum(first[task]["divergence"] for task in TASKS)


def test_the_trained_reference_learns_every_problem(zoo: Path, tmp_path: Path) -> None:
    settings = {"steps": 40, "batch_size": 8, "lr": 0.01}
    path = recipe(zoo, "multitask.yaml", merge_method="multitask", parameters=settings)
    record = adarank.merge_recipe(path, tmp_path / "out")
    for task, losses in record["training"]["losses"].items():
        assert sum(losses[-8:]) < sum(losses[:8]), task


def test_losses_are_lower_for_better_in_every_summary(zoo: Path, tmp_path: Path, capsys: Any) -> None:
    table = Table("test", "disjoint", {"a": 9, "b": 9}, metrics={"b": "loss"})
    table.rows.update(merged={"a": 60.0, "b": 0.5}, experts={"a": 80.0, "b": 0.25})
    assert table.mean("merged") == 60.0
    assert table.normalised("merged") == pytest.approx(100 * (60 / 80 + 0.25 / 0.5) / 2)
    alone = Table("test", "disjoint", {"b": 9}, {"merged": {"b": 0.5}}, metrics={"b": "loss"})
    assert alone.mean("merged") == 0.5
    path = recipe(zoo, "loss.yaml", {"mood": "loss"}, merge_method="average")
    assert main(["evaluate", str(path)]) == 0
    assert "mean without the loss of mood" in " ".join(capsys.readouterr().out.split())


def test_a_search_ranks_losses_from_below(zoo: Path) -> None:
    path = recipe(zoo, "ranked.yaml", dict.fromkeys(TASKS, "loss"), merge_method="task_arithmetic")
    ranked, record = search(path, zoo / "ranked.best.yaml", [Axis("lambda", (0.0, 0.5, 4.0))])
    means = [point.mean for point in ranked]
    assert means == sorted(means)
    assert record["best"]["mean"] == min(point["mean"] for point in record["points"])
    mixed = recipe(zoo, "mixed.yaml", {"mood": "loss"}, merge_method="task_arithmetic")
    with pytest.raises(DataError, match=r"of 'mood' it is a loss.*to all tasks or to none"):
        search(mixed, zoo / "mixed.best.yaml", [Axis("lambda", (0.0, 0.5))])


def test_another_metric_may_be_given_for_all_tasks(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As if every task of the recipe had it; one that does not fit is refused for each task at once."""
    plain = recipe(zoo, "plain.yaml", merge_method="task_arithmetic")
    losses = recipe(zoo, "losses.yaml", dict.fromkeys(TASKS, "loss"), merge_method="task_arithmetic")
    assert main(["evaluate", str(plain), "--metric", "loss", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["rows"] == adarank.evaluate_recipe(losses).rows
    assert set(shown["metrics"].values()) == {"loss"}
    axes = [Axis("lambda", (0.0, 0.5))]
    by_option = search(plain, zoo / "plain.best.yaml", axes, metric="loss")[0]
    assert by_option == search(losses, zoo / "losses.best.yaml", axes)[0]
    assert main(["evaluate", str(plain), "--metric", "wit"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert all(f"task '{task}': metric 'wit' is not for" in said for task in TASKS)


def test_classes_are_counted_where_wanted(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(recipe(zoo, "classes.yaml", merge_method="average"))
    assert main(["evaluate", path, "--per-class", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert set(content["classes"]["experts"]) == {"tags", "mood"}  # a regression has none
    labels, logits = outputs(zoo, "mood", expert(zoo, "mood"))
    oracle = sklearn.metrics.recall_score(labels, logits.argmax(-1).tolist(), average=None, labels=[0, 1], zero_division=0)  # fmt: skip
    assert [row["recall"] for row in content["classes"]["experts"]["mood"]] == pytest.approx(list(100 * oracle))
    assert main(["evaluate", path, "--per-class", "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 2 * (3 + 2)
    for row in rows:
        (wanted,) = [each for each in content["classes"][row["model"]][row["task"]] if each["name"] == row["class"]]
        assert float(row["F1"]) == wanted["f1"]
    assert main(["evaluate", path, "--per-class"]) == 0
    text = capsys.readouterr().out
    assert "No classes: stars." in text
    assert "tags-2" in text
    assert main(["evaluate", path, "--json"]) == 0
    assert "classes" not in json.loads(capsys.readouterr().out)


def expert(zoo: Path, task: str) -> Any:
    import transformers

    return transformers.AutoModelForSequenceClassification.from_pretrained(zoo / "models" / task).eval()
