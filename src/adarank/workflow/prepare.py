"""Everything that can be checked, checked before anything is spent: recipe, checkpoints, tokenizers and data, in one list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adarank.data.spec import Split
from adarank.data.task import TaskData
from adarank.errors import Problems
from adarank.recipe.draft import METHOD, Draft
from adarank.recipe.job import Job, Opened, open_draft
from adarank.recipe.planned import Stages, open_stages
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


@dataclass(frozen=True)
class Prepared:
    """A recipe's stages, as far as they could be opened.

    Attributes:
        stages: all of them; None if something is wrong.
        opened: what could be opened of the output's; None if the recipe cannot be read at all.
    """

    stages: Stages | None = None
    opened: Opened | None = None

    @property
    def jobs(self) -> list[Job]:
        """All stages, in the order in which they are merged."""
        return self.stages.jobs if self.stages else []

    @property
    def before(self) -> Mapping[str, Job]:
        """Name -> stage that is merged before the output."""
        return self.stages.before if self.stages else {}

    def whole(self, problems: Problems) -> Stages:
        """All stages, if nothing is wrong; else all that is wrong is raised."""
        problems.refuse()
        assert self.stages is not None
        return self.stages


def prepare(draft: Draft, problems: Problems) -> Prepared:
    """Open a recipe's stages. What is wrong is noted; of one stage alone all is checked that it leaves possible."""
    if not (draft.recipe.stages or draft.recipe.unread):
        opened = open_draft(draft, problems)
        return Prepared(Stages({}, opened.job) if opened.job else None, opened)
    with problems.noted():
        stages = open_stages(draft.recipe)
        job = stages.output
        return Prepared(stages, Opened(job, job.recipe, True, job.experts, job.family))
    return Prepared()


def job_reads_data(job: Job) -> bool:
    """Whether a merge by a job reads its tasks' data."""
    return bool(job.method.data) or job.recipe.heads == "learn"


def reads_data(draft: Draft) -> bool:
    """Whether a merge by this recipe reads its tasks' data; of a method that is not known it is taken to."""
    recipe = draft.recipe
    return METHOD in draft.left_out or bool(recipe.kind.data) or recipe.heads == "learn"


def check_labels(data: Mapping[str, TaskData], split: Split, problems: Problems) -> None:
    """Note each task that cannot be scored on a split: it is empty there, or has inputs without labels."""
    for of_task in data.values():
        with problems.noted():
            of_task.targets(of_task.filled(split))
