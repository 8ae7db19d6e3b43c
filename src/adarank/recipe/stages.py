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
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from typing import Any

from adarank.errors import Problems, RecipeError, itemise
from adarank.recipe.draft import Draft

Read = Callable[[Mapping[str, Any], str, Problems], Draft | None]


def draft_stages(documents: Sequence[Mapping[str, Any]], read: Read, where: str, problems: Problems) -> Draft | None:
    """The recipe of the output, with the stages that are merged before it; None if nothing can be said of these.

    Arguments:
        documents: what the file holds, a mapping for each stage.
        read: reads a recipe from a mapping, and from what to call it in errors.
        where: the file, for errors.
        problems: what is wrong is noted there: names that are missing or not unique, stages that name one another in a
            circle, and what is wrong with each stage.
    """
    names = [document.get("name") for document in documents]
    known = len(problems.errors)
    with problems.noted():
        _check_names(names, where)
    unique = len(problems.errors) == known
    drafts: dict[Any, Draft | None] = {}
    for number, (name, document) in enumerate(zip(names, documents, strict=True)):
        label = f"{where}, stage {number + 1}" + (f" ('{name}')" if name else "")
        draft = read({key: value for key, value in document.items() if key != "name"}, label, problems)
        if unique:
            drafts[name] = draft
    output = names[-1] if unique and None not in names else None
    if drafts.get(output) is None:
        return None
    named = {name: draft.recipe.references & drafts.keys() if draft else set() for name, draft in drafts.items()}
    with problems.noted():
        _refuse_circles(named, where)
    whole = len(problems.errors) == known
    return _whole(output, {name: draft and replace(draft, downloads=whole) for name, draft in drafts.items()}, named)


def _whole(output: Any, drafts: Mapping[Any, Draft | None], named: Mapping[Any, set[str]]) -> Draft:
    """The draft of the output, with those of the stages that it needs, each after those that it names."""
    needed = _needed(output, named)
    before = {name: drafts[name] for name in _order(named) if name in needed and name != output}
    unread = tuple(name for name in drafts if name is not None and name not in needed)
    last = drafts[output]
    assert last is not None
    recipe = last.recipe.after({name: draft.recipe for name, draft in before.items() if draft}, unread)
    return replace(last, recipe=recipe, stages=before)


def _check_names(names: Sequence[Any], where: str) -> None:
    problems = [f"name: {name!r} is no text." for name in names if not isinstance(name, str | None) or name == ""]
    times = Counter(name for name in names if isinstance(name, str) and name)
    problems += [f"name: {count} stages are called '{name}'. Give each another name." for name, count in times.items() if count > 1]  # fmt: skip
    nameless = [str(number + 1) for number, name in enumerate(names) if name is None]
    if len(nameless) > 1:
        problems.append(f"name: stages {', '.join(nameless)} have none. Only one may be without, and is the output; name the others.")  # fmt: skip
    if problems:
        raise RecipeError(itemise(f"{where}: {len(problems)} problem(s).", problems))


def _refuse_circles(named: Mapping[Any, set[str]], where: str) -> None:
    try:
        TopologicalSorter(named).prepare()
    except CycleError as error:
        circle = " → ".join(str(name or "the output") for name in reversed(error.args[1]))
        raise RecipeError(f"{where}: stages name one another in a circle ({circle}). Remove one of the references.") from None  # fmt: skip


def _order(named: Mapping[Any, set[str]]) -> list[Any]:
    """Stages, each after those that it names; as they come if there is no such order."""
    try:
        return list(TopologicalSorter(named).static_order())
    except CycleError:
        return list(named)


def _needed(name: Any, named: Mapping[Any, set[str]]) -> set[Any]:
    needed, left = set(), [name]
    while left:
        current = left.pop()
        if current not in needed:
            needed.add(current)
            left += named[current]
    return needed
