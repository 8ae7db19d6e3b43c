"""Of which kind a recipe's tasks are, and models that are of none."""

from __future__ import annotations

from collections.abc import Mapping

from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.data.spec import TaskSpec
from adarank.errors import RecipeError, itemise
from adarank.io.checkpoint import Checkpoint
from adarank.models import (
    FAMILIES,
    Family,
    classes_of,
    foreign_code,
    kind_by_names,
    kind_of,
    named_alone,
    no_classifier,
)
from adarank.models.sentence_encoders import SentenceEncoders
from adarank.recipe.checks import different_kinds
from adarank.recipe.schema import Recipe


def family_of_tasks(recipe: Recipe, experts: Mapping[str, Checkpoint]) -> Family | None:
    """The kind of the recipe's tasks: as it says, else as the experts' config.json tells. None if there are no tasks.

    Raises:
        RecipeError: it cannot be told, there are several, or an expert is no classifier; all problems at once.
    """
    kinds = {name: kind_of_task(task, experts[name]) for name, task in recipe.tasks.items()}
    others = [
        name for name, task in recipe.tasks.items() if no_classifier(experts[name].config, _said(task, experts[name]))
    ]
    problems = [_no_classifier(name, experts[name], recipe.tasks[name].kind) for name in others]
    problems += [
        f"models: the kind of task '{name}' cannot be told from {experts[name].folder / 'config.json'}. Give task: kind, one of {', '.join(FAMILIES)}."
        for name, kind in kinds.items()
        if kind is None and name not in others
    ]
    foreign = {experts[name].folder: foreign_code(experts[name].config) for name in recipe.tasks}
    problems += [
        f"{folder / 'config.json'}: {what}, and adarank never runs code of a checkpoint. Merge it by a data-free method, without a task."
        for folder, what in foreign.items()
        if what
    ]
    known = {kind for kind in kinds.values() if kind}
    _refuse([*problems, *([different_kinds(known)] if len(known) > 1 else [])])
    return FAMILIES[known.pop()] if known else None


def check_bodies(recipe: Recipe, experts: Mapping[str, Checkpoint], network: AlignedCheckpoints) -> None:
    """A body alone can merge, and neither be adapted nor scored on data."""
    with_data = [task for task, entry in recipe.experts.items() if entry.task and entry.task.data is not None]
    bodies = [task for task in with_data if not network.heads[task] and no_classifier(experts[task].config, _said(recipe.tasks[task], experts[task]), head=False)]  # fmt: skip
    _refuse([_no_classifier(task, experts[task]) for task in bodies])


def _said(task: TaskSpec, expert: Checkpoint) -> str | None:
    """The kind of a task as the recipe says it, or the folder's list of modules: that of a sentence encoder."""
    return task.kind or (SentenceEncoders.kind if expert.modules else None)


def kind_of_task(task: TaskSpec, expert: Checkpoint) -> str | None:
    """The kind of a task: as the recipe says it, else as its expert's folder or its tensors' names tell; None if nothing does."""
    return _said(task, expert) or kind_of(expert.config) or kind_by_names(expert.tensors)


def _no_classifier(task: str, expert: Checkpoint, kind: str | None = None) -> str:
    lacks = (
        f"which is no model of {kind}" if kind is not None and named_alone(kind) else "without the head of a classifier"
    )
    return (
        f"models: the expert of task '{task}' ({expert.label}) is a {classes_of(expert.config)} by its config.json, {lacks}. "
        f"Tasks are of {', '.join(FAMILIES)}: give the model that was fine-tuned as one, or no task, as models merge without tasks too."
    )


def _refuse(problems: list[str]) -> None:
    if problems:
        heading = f"recipe: {len(problems)} problem(s)."
        raise RecipeError(problems[0] if len(problems) == 1 else itemise(heading, problems))
