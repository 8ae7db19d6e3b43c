"""A recipe with mistakes in it, as far as it can be read: what it names is checked all the same, so that all problems come at once."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from adarank.data.spec import TaskSpec
from adarank.errors import Problems
from adarank.recipe.schema import Recipe
from adarank.settings import refusal

METHOD = "merge_method"


@dataclass(frozen=True)
class Draft:
    """A recipe as far as it can be read.

    Attributes:
        recipe: it, without what is wrong.
        left_out: its keys of which something was left out.
        sound: nothing is wrong with it, as far as it alone tells.
        stages: name -> stage that is merged before, each after those that it names; None for what cannot be read at all.
        downloads: its models may be downloaded. Not if another stage of its file is wrong.
    """

    recipe: Recipe
    left_out: frozenset[str] = frozenset()
    sound: bool = True
    stages: Mapping[str, Draft | None] = field(default_factory=dict)
    downloads: bool = True

    @classmethod
    def of(cls, recipe: Recipe) -> Draft:
        """A recipe without mistakes."""
        return cls(recipe, stages={name: cls(stage) for name, stage in recipe.stages.items()})


def salvaged(values: Mapping[str, Any], where: str, problems: Problems) -> Draft | None:
    """The recipe that is left of values without those that are refused, which are noted; None if nothing is."""
    try:
        return Draft(Recipe.model_validate(dict(values)))
    except ValidationError as error:
        problems.errors.append(refusal(Recipe, error, where))
        places = [problem["loc"] for problem in error.errors()]
    if not all(places):  # wrong as a whole, as where a key is no text: no part can be left out
        return None
    rest = _without(values, places)
    try:
        recipe = Recipe.model_validate(rest)
    except ValidationError:
        return None
    left_out = frozenset(str(place[0]) for place in places if place)
    return Draft(with_stand_in(recipe) if METHOD in left_out else recipe, left_out, sound=False)


def with_stand_in(recipe: Recipe) -> Recipe:
    """A recipe with a method that takes any models, where it names none that is known: its models can be compared then."""
    method = "average" if recipe.base_model is None else "task_arithmetic"
    return recipe.model_copy(update={METHOD: method})


def _without(values: Mapping[str, Any], places: Iterable[tuple[int | str, ...]]) -> dict[str, Any]:
    """A copy without what is refused: a whole key; of `models` an entry, or a part of it."""
    rest = copy.deepcopy(dict(values))
    entries = rest.get("models")
    lost: set[int] = set()
    for key, *inside in places:
        if key != "models" or not inside or not isinstance(entries, list):
            rest.pop(str(key), None)
        elif len(inside) == 1 or inside[1] in ("model", "task") or not isinstance(entries[int(inside[0])], dict):
            lost.add(int(inside[0]))
        else:
            entries[int(inside[0])].pop(str(inside[1]), None)
    if isinstance(rest.get("models"), list):
        rest["models"] = [
            entry for number, entry in enumerate(entries or []) if number not in lost or _keep_model(entry)
        ]
    rest.setdefault(METHOD, "average")
    return rest


def _keep_model(entry: Any) -> bool:
    """Take the task off an entry whose task is wrong; False if its model is wrong too, so that nothing is left of it."""
    if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
        return False
    task = entry.pop("task", None)
    task = task if isinstance(task, dict) else {}
    kept = {key: task[key] for key in ("name", "kind") if key in task}
    try:
        TaskSpec.model_validate(kept)
    except ValidationError:
        return True
    entry["task"] = kept
    return True


def with_models(recipe: Recipe, tasks: Collection[str], with_base: bool) -> Recipe:
    """A recipe of some of its experts alone, which keep their names."""
    entries = [
        entry.model_copy(update={"task": (entry.task or TaskSpec()).model_copy(update={"name": task})})
        for task, entry in recipe.experts.items()
        if task in tasks
    ]
    return recipe.model_copy(update={"models": tuple(entries), "base_model": recipe.base_model if with_base else None})
