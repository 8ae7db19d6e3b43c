"""Base, experts and merged outputs of a recipe, scored in one table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

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
        table.rows[name] = score_all(job, models, data, split)
    note("Scoring the experts")
    table.rows["experts"] = score_experts(job, models, data, split)
    return table


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
    """A row's name: the output's path, and what it was adapted or informed on if that may be what is scored."""
    file = path / RECORD
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    used = record.get("adaptation") or record.get("statistics")
    if not used:
        return str(path)
    if used["protocol"] == "transductive":
        return f"{path} [transductive]"
    if record["settings"]["data"] == recipe.data.model_dump():
        return str(path)
    use = "adapted on" if "adaptation" in record else "informed by"
    return f"{path} [{use} other splits, which may hold scored inputs]"


def _open_output(path: Path, network: Network) -> Checkpoint:
    checkpoint = Checkpoint(path)
    lost = [name for name in network.tensors if name not in checkpoint.tensors]
    if lost:
        raise MismatchError(
            f"{path}: lacks {len(lost)} tensor(s) of this recipe's network, such as '{lost[0]}'. Give an output of this recipe's models."
        )
    return checkpoint
