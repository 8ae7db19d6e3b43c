"""What a recipe will do: the plan from headers, with the tasks' data checked."""

from __future__ import annotations

from typing import Any

from adarank.errors import DataError
from adarank.recipe.job import Job
from adarank.recipe.plan import describe
from adarank.recipe.planned import open_stages
from adarank.recipe.reader import RecipeLike, load_recipe
from adarank.workflow.load_tasks import check_tasks, refuse_without_classes


def plan(recipe: RecipeLike) -> dict[str, Any]:
    """What merging by a recipe will do, as plain data. Reads headers, and the tables of tasks with data.

    Arguments:
        recipe: its file, what would be in it, or what `load_recipe` gives.

    Raises:
        AdaRankError: what keeps the recipe from being merged.

    Example:
        adarank.workflow.plan.plan("recipe.yaml")["peak_bytes"]
    """
    stages = open_stages(load_recipe(recipe))
    described = _described(stages.output)
    if stages.before:
        described["stages"] = {name: _described(job) for name, job in stages.before.items()}
    return described


def _described(job: Job) -> dict[str, Any]:
    refuse_without_classes(job)
    described = describe(job)
    if job.method.data or job.recipe.heads == "learn":
        described |= _of_data(job)
    elif any(entry.task and entry.task.data for entry in job.recipe.experts.values()):
        try:  # merging reads none of it, but evaluation will
            check_tasks(job)
        except DataError as error:
            described["notes"].append(f"The merge goes without the tasks' data, but `evaluate` will not: {error}")
    return described


def _of_data(job: Job) -> dict[str, Any]:
    """How many inputs each split has, and what the method will read of them."""
    tasks = check_tasks(job)
    splits = {task: {split: len(chosen) for split, chosen in of.splits.rows.items()} for task, of in tasks.items()}
    return {"splits": splits, **job.method.of_data(tasks)}
