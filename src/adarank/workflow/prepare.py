"""Everything that can be checked, checked before anything is spent: recipe, checkpoints, tokenizers and data, in one list."""

from __future__ import annotations

from collections.abc import Mapping

from adarank.data.spec import Split
from adarank.data.task import TaskData
from adarank.errors import Problems
from adarank.recipe.draft import METHOD, Draft
from adarank.recipe.job import Job, Opened, open_draft
from adarank.recipe.reader import RecipeLike, read_draft


def open_recipe(recipe: RecipeLike, problems: Problems) -> Opened | None:
    """What could be opened of a recipe, what is wrong noted; None if it cannot be read at all."""
    draft = read_draft(recipe, problems)
    return open_draft(draft, problems) if draft else None


def whole(opened: Opened | None, problems: Problems) -> Job:
    """The job, if nothing is wrong; else all that is wrong is raised."""
    problems.refuse()
    assert opened is not None
    assert opened.job is not None
    return opened.job


def reads_data(draft: Draft) -> bool:
    """Whether a merge by this recipe reads its tasks' data; of a method that is not known it is taken to."""
    recipe = draft.recipe
    return METHOD in draft.left_out or bool(recipe.kind.data) or recipe.heads == "learn"


def check_labels(data: Mapping[str, TaskData], split: Split, problems: Problems) -> None:
    """Note each task that cannot be scored on a split: it is empty there, or has inputs without labels."""
    for of_task in data.values():
        with problems.noted():
            of_task.targets(of_task.filled(split))
