"""Everything that can be checked, checked before anything is spent: recipe, checkpoints, tokenizers and data, in one list."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from adarank.data.spec import Split
from adarank.data.task import TaskData
from adarank.errors import Problems
from adarank.recipe.draft import METHOD, Draft
from adarank.recipe.job import Job, Opened, open_draft
from adarank.recipe.planned import Part, open_parts
from adarank.recipe.reader import RecipeLike, read_draft

R = TypeVar("R")
Read = Callable[[Opened, Problems], Mapping[str, R]]


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
        parts: in the order in which they are merged, the output's the last; none if the recipe cannot be read at all.
    """

    parts: Sequence[Part] = ()

    @property
    def jobs(self) -> dict[str, Job]:
        """Name -> stage, of those that could be opened whole; the output's name is empty."""
        return {part.name: part.opened.job for part in self.parts if part.opened.job is not None}

    def label(self, name: str) -> str:
        """What a stage is called before its problems; empty if there is no other."""
        return next(part.label for part in self.parts if part.name == name)

    def whole(self, problems: Problems) -> dict[str, Job]:
        """All stages, if nothing is wrong; else all that is wrong is raised."""
        problems.refuse()
        return self.jobs

    def data(self, read: Read[R], problems: Problems) -> dict[str, Mapping[str, R]]:
        """Stage -> task -> its data, of stages whose merge reads them. What is wrong with them is noted.

        Arguments:
            read: reads the tasks of what could be opened.
        """
        of_stages: dict[str, Mapping[str, R]] = {}
        for part in self.parts:
            with problems.of(part.label) as here:
                of_stages[part.name] = read(part.opened, here) if reads_data(part.draft) else {}
        return of_stages


def prepare(draft: Draft | None, problems: Problems) -> Prepared:
    """Open a recipe's stages. What is wrong is noted, and all is checked that it leaves possible."""
    return Prepared(open_parts(draft, problems) if draft else ())


def reads_data(draft: Draft) -> bool:
    """Whether a merge by this recipe reads its tasks' data; of a method that is not known it is taken to."""
    recipe = draft.recipe
    return METHOD in draft.left_out or bool(recipe.kind.data) or recipe.heads == "learn"


def check_labels(data: Mapping[str, TaskData], split: Split, problems: Problems) -> None:
    """Note each task that cannot be scored on a split: it is empty there, or has inputs without labels."""
    for of_task in data.values():
        with problems.noted():
            of_task.targets(of_task.filled(split))
