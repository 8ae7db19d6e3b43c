"""Base, experts and merged outputs of a recipe, scored in one table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from adarank.checkpoint import Checkpoint
from adarank.data.spec import Split
from adarank.data.task import TaskData
from adarank.errors import MismatchError
from adarank.evaluate import Table, evaluate_task
from adarank.models import TaskModels
from adarank.networks import build_models, family_of, network_tensors
from adarank.plan import Job, Note, open_job
from adarank.recipe import Recipe
from adarank.task_vectors import Network
from adarank.tasks import load_tasks
from adarank.writer import RECORD


def evaluate(
    recipe: Recipe, outputs: Sequence[Path] = (), split: Split = "test", note: Note = lambda text: None
) -> Table:
    """Score base, experts and merged outputs on one split of every task.

    Arguments:
        outputs: folders written by `merge`; a row each.
        split: `test`, or `select` while choosing settings.
    """
    job = open_job(recipe)
    data = load_tasks(job)
    opened = {_row(path, recipe): _open_output(path, job.network) for path in outputs}
    models = build_models(job)
    protocol = "transductive" if recipe.data.protocol == "transductive" else "disjoint"
    table = Table(split, protocol, {task: len(own.splits.rows[split]) for task, own in data.items()})
    if job.base is not None:
        note("Scoring the base")
        table.rows["base"] = score_all(job, models, data, split)
    for name, checkpoint in opened.items():
        note(f"Scoring {name}")
        models.fill((key, checkpoint.read(key)) for key in job.network.tensors)
        with heads_of(checkpoint.folder, models):
            table.rows[name] = score_all(job, models, data, split)
    note("Scoring the experts")
    table.rows["experts"] = score_experts(job, models, data, split)
    return table


@contextmanager
def heads_of(out: Path, models: TaskModels) -> Iterator[None]:
    """While it is open the models have the heads of an output: those of the experts, unless it was trained."""
    before = {task: {n: own.detach().clone() for n, own in head.items()} for task, head in models.heads.items()}
    for task, head in models.heads.items():
        file = out / "heads" / task / "head.safetensors"
        if file.exists():
            _fill_head(head, load_file(file), str(file))
    try:
        yield
    finally:
        for task, head in models.heads.items():
            _fill_head(head, before[task], "experts")


@torch.no_grad()
def _fill_head(head: Mapping[str, Tensor], tensors: Mapping[str, Tensor], file: str) -> None:
    other = [name for name, own in head.items() if name not in tensors or tensors[name].shape != own.shape]
    if other:
        raise MismatchError(
            f"{file}: lacks tensor '{other[0]}' {tuple(head[other[0]].shape)} of the expert's head, or has another shape. Give an output of this recipe's models."
        )
    for name, own in head.items():
        own.copy_(tensors[name])


def score_all(job: Job, models: TaskModels, data: Mapping[str, TaskData], split: Split) -> dict[str, float]:
    """The score of every task with the tensors that the models hold now."""
    return {task: evaluate_task(family_of(job), models.modules[task], data[task], split) for task in job.network.tasks}


def score_experts(job: Job, models: TaskModels, data: Mapping[str, TaskData], split: Split) -> dict[str, float]:
    """Each task's score by its own expert. The models hold the last expert's tensors afterwards."""
    scores = {}
    for task in job.network.tasks:
        models.fill(network_tensors(job, task))
        scores[task] = evaluate_task(family_of(job), models.modules[task], data[task], split)
    return scores


def _row(path: Path, recipe: Recipe) -> str:
    """A row's name: the output's path, whether it read labels, and what it was adapted on if that may be what is scored."""
    file = path / RECORD
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    trained = "training" in record
    if "adaptation" not in record and not trained:
        return str(path)
    if not trained and record["adaptation"]["protocol"] == "transductive":
        return f"{path} [transductive]"
    same = record["settings"]["data"] == recipe.data.model_dump()
    how = "trained with labels" if trained else "adapted"
    if not same:
        return f"{path} [{how} on other splits, which may hold scored inputs]"
    return f"{path} [trained with labels of its adapt split]" if trained else str(path)


def _open_output(path: Path, network: Network) -> Checkpoint:
    checkpoint = Checkpoint(path)
    lost = [name for name in network.tensors if name not in checkpoint.tensors]
    if lost:
        raise MismatchError(
            f"{path}: lacks {len(lost)} tensor(s) of this recipe's network, such as '{lost[0]}'. Give an output of this recipe's models."
        )
    return checkpoint
