"""What a recipe will do: the plan from headers, with the tasks' data checked."""

from __future__ import annotations

from typing import Any

from adarank.errors import AdaRankError, Problems
from adarank.recipe.job import open_draft
from adarank.recipe.plan import describe
from adarank.recipe.reader import RecipeLike, read_draft
from adarank.workflow.load_tasks import check_opened, check_tasks
from adarank.workflow.prepare import reads_data, whole


def plan(recipe: RecipeLike) -> dict[str, Any]:
    """What merging by a recipe will do, as plain data. Reads headers, and the tables of tasks with data.

    Arguments:
        recipe: its file, what would be in it, or what `load_recipe` gives.

    Raises:
        AdaRankError: what keeps the recipe from being merged.

    Example:
        adarank.workflow.plan.plan("recipe.yaml")["peak_bytes"]
    """
    problems = Problems()
    draft = read_draft(recipe, problems)
    opened = open_draft(draft, problems) if draft else None
    rows = check_opened(opened, problems) if draft and opened and reads_data(draft) else {}
    job = whole(opened, problems)
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
