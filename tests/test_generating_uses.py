"""What else is done with models that generate text: figures, a search, an adapter as output."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch

import adarank
from adarank.models.text_scores import parts_of_loss
from adarank.recipe.job import open_job
from adarank.recipe.reader import load_recipe
from adarank.workflow.analyse import Options, analyse
from adarank.workflow.build_networks import build_models, network_tensors
from adarank.workflow.load_tasks import load_tasks
from adarank.workflow.search import Axis, search
from lm_zoo import TASKS, evaluated, make_zoo, model, recipe, texts


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("lm"))


def test_parts_of_the_loss_add_up_to_its_gradient(zoo: Path) -> None:
    job = open_job(load_recipe(recipe(zoo, "parts.yaml", {"metric": "loss"})))
    data, models, family = load_tasks(job), build_models(job), job.family
    models.fill(network_tensors(job, "news"))
    module, net = models.modules["news"], model(zoo / "models" / "news")
    parts = list(parts_of_loss(family, module, data["news"], "test"))  # type: ignore[arg-type]
    sum(parts).backward()  # type: ignore[union-attr]
    rows = list(texts(zoo, "news", "test"))
    whole = sum(net(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1) for ids in rows)
    (whole / sum(ids.shape[1] - 1 for ids in rows)).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(models.shared[name].grad, parameter.grad, atol=1e-5, rtol=1e-3)


def test_figures_have_the_losses_of_text(zoo: Path, tmp_path: Path) -> None:
    path = recipe(zoo, "figure.yaml")
    out = zoo / "average"
    adarank.merge_recipe(recipe(zoo, "average.yaml", merge_method="average"), out)
    analyse("radar", path, tmp_path / "radar", options=Options(outputs=[out], image="none"))
    rows = list(csv.DictReader((tmp_path / "radar.csv").open()))
    scores = {(row, task): score for row, of_row in evaluated(path, out).items() for task, score in of_row.items()}
    assert len(rows) == len(scores)
    for row in rows:
        wanted = scores[str(out) if row["model"] == out.name else row["model"], row["task"]]
        assert float(row["score"]) == pytest.approx(wanted, rel=1e-5)
        assert float(row["loss"]) == pytest.approx(math.log(wanted), rel=1e-5)


def test_a_search_ranks_perplexities_from_below(zoo: Path) -> None:
    path = recipe(zoo, "ranked.yaml", merge_method="task_arithmetic")
    ranked, _ = search(path, zoo / "ranked.best.yaml", [Axis("lambda", (0.0, 0.4, 3.0))])
    means = [point.mean for point in ranked]
    assert means == sorted(means)
    assert means[0] < means[-1]


def test_a_merge_of_language_models_may_be_an_adapter(zoo: Path) -> None:
    path = recipe(zoo, "lora.yaml", merge_method="task_arithmetic", output={"lora": {"rank": 16}})
    whole = recipe(zoo, "whole.yaml", merge_method="task_arithmetic")
    adarank.merge_recipe(path, zoo / "lora")
    adarank.merge_recipe(whole, zoo / "task-arithmetic")
    rows = evaluated(path, zoo / "lora", zoo / "task-arithmetic")
    for task in TASKS:  # of matrices of 16 columns no rank is lost
        assert rows[str(zoo / "lora")][task] == pytest.approx(rows[str(zoo / "task-arithmetic")][task], rel=1e-3)
