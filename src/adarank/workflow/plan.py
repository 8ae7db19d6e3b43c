"""What a recipe will do: the plan from headers, with the tasks' data checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from adarank.errors import AdaRankError, Problems
from adarank.recipe.job import Job
from adarank.recipe.plan import check_memory, describe
from adarank.recipe.reader import RecipeLike, read_draft
from adarank.workflow.load_tasks import Rows, check_opened, check_tasks, refuse_without_classes
from adarank.workflow.prepare import prepare


def plan(recipe: RecipeLike, memory: int | None = None) -> dict[str, Any]:
    """What merging by a recipe will do, as plain data. Reads headers, and the tables of tasks with data.

    Arguments:
        recipe: its file, what would be in it, or what `load_recipe` gives.
        memory: as for `merge`.

    Raises:
        AdaRankError: what keeps the recipe from being merged.

    Example:
        adarank.workflow.plan.plan("recipe.yaml")["peak_bytes"]
    """
    problems = Problems()
    draft = read_draft(recipe, problems)
    prepared = prepare(draft, problems)
    for name, job in prepared.jobs.items():
        with problems.of(prepared.label(name)) as here, here.noted():
            refuse_without_classes(job)
        with problems.of(prepared.label(name)) as here, here.noted():
            check_memory(replace(job, memory=memory))
    rows = prepared.data(check_opened, problems)
    jobs = prepared.whole(problems)
    described = {name: _described(replace(job, memory=memory), rows[name]) for name, job in jobs.items()}
    output = described.pop("")
    return output | ({"stages": described} if described else {})


def _described(job: Job, rows: Mapping[str, Rows]) -> dict[str, Any]:
    described = describe(job)
    if rows:
        splits = {task: {split: len(chosen) for split, chosen in of.splits.rows.items()} for task, of in rows.items()}
        described |= {"splits": splits, **job.method.of_data(rows)}
    elif any(entry.task and entry.task.data for entry in job.recipe.experts.values()):
        try:  # merging reads none of it, but evaluation will
            check_tasks(job)
        except AdaRankError as error:
            described["notes"].append(f"The merge goes without the tasks' data, but `evaluate` will not: {error}")
    return described
