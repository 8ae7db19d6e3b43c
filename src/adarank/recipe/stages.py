"""Recipes of several stages in one file, as mergekit-multi reads them: what one merges is a model of those that name it.

name: first                     merged before what names it, whatever the order in the file
…
---
merge_method: ties              the output: the stage without a name, or, if all have one, the last
models: [{model: first}, …]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from adarank.errors import RecipeError, itemise, listed
from adarank.recipe.schema import Recipe

Parse = Callable[[Mapping[str, Any], str], Recipe]


def parse_stages(documents: Sequence[Mapping[str, Any]], parse: Parse, where: str) -> Recipe:
    """The recipe of the output, with the stages that are merged before it.

    Arguments:
        documents: what the file holds, a mapping for each stage.
        parse: makes a recipe of a mapping and of what to call it in errors.
        where: the file, for errors.

    Raises:
        RecipeError: names are missing or not unique, stages name one another in a circle, or a stage has problems.
    """
    names = [document.get("name") for document in documents]
    output = names.index(None) if None in names else len(names) - 1
    _check_names(names, where)
    recipes, problems = {}, []
    for number, (name, document) in enumerate(zip(names, documents, strict=True)):
        label = f"{where}, stage {number + 1}" + (f" ('{name}')" if name else "")
        try:
            recipes[name] = parse({key: value for key, value in document.items() if key != "name"}, label)
        except RecipeError as error:
            problems += listed(error)
    if problems:
        raise RecipeError(itemise(f"{where}: {len(problems)} problem(s) in {len(documents)} stages.", problems))
    order = _order({name: recipe.references & recipes.keys() for name, recipe in recipes.items()}, where)
    needed = _needed(names[output], recipes)
    before = {name: recipes[name] for name in order if name in needed and name != names[output]}
    unread = tuple(name for name in names if name is not None and name not in needed)
    return recipes[names[output]].after(before, unread)


def _check_names(names: Sequence[Any], where: str) -> None:
    problems = [f"name: {name!r} is no text." for name in names if not isinstance(name, str | None) or name == ""]
    times = Counter(name for name in names if isinstance(name, str) and name)
    problems += [f"name: {count} stages are called '{name}'. Give each another name." for name, count in times.items() if count > 1]  # fmt: skip
    nameless = [str(number + 1) for number, name in enumerate(names) if name is None]
    if len(nameless) > 1:
        problems.append(f"name: stages {', '.join(nameless)} have none. Only one may be without, and is the output; name the others.")  # fmt: skip
    if problems:
        raise RecipeError(itemise(f"{where}: {len(problems)} problem(s).", problems))


def _order(named: Mapping[Any, set[str]], where: str) -> list[Any]:
    """Stages, each after those that it names."""
    try:
        return list(TopologicalSorter(named).static_order())
    except CycleError as error:
        circle = " → ".join(str(name or "the output") for name in reversed(error.args[1]))
        raise RecipeError(f"{where}: stages name one another in a circle ({circle}). Remove one of the references.") from None  # fmt: skip


def _needed(name: Any, recipes: Mapping[Any, Recipe]) -> set[Any]:
    needed, left = set(), [name]
    while left:
        current = left.pop()
        if current not in needed:
            needed.add(current)
            left += recipes[current].references & recipes.keys()
    return needed
