"""What the parts of a recipe cannot know of each other. All problems at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from adarank.adapt.methods import ADAPTIVE
from adarank.errors import RecipeError, itemise
from adarank.methods import METHODS
from adarank.modular import MODULAR
from adarank.recipe.mergekit import with_effect
from adarank.recipe.schema import Recipe
from adarank.settings import nearest


def check(recipe: Recipe, where: str) -> None:
    """What single fields cannot know of each other. All problems at once."""
    problems = _problems(recipe)
    if problems:
        raise RecipeError(itemise(f"{where}: {len(problems)} problem(s).", problems))


def _problems(recipe: Recipe) -> list[str]:
    problems = []
    problems += [f"models: '{task}' cannot name a task here (a folder heads/{task} is made, and 'base' is the base). Give another one under task: name." for task in recipe.experts
                 if task in ("", ".", "..") or (task == "base" and recipe.base_model) or "/" in task or "\\" in task]  # fmt: skip
    given = Counter(m.task.name for m in recipe.models if m.task and m.task.name)
    problems += [f"models: {times} tasks are called '{name}'. Give each a name of its own."
                 for name, times in given.items() if times > 1]  # fmt: skip
    problems += _problems_of_base(recipe)
    if not recipe.experts:
        problems.append("models: no expert is given. A merge needs at least one.")
    if recipe.adapt is not None and not (recipe.adaptive or recipe.modular):
        problems.append(
            f"adapt: '{recipe.merge_method}' does not adapt. Remove the block, or use one of {', '.join([*ADAPTIVE, *MODULAR])}."
        )
    allowed = () if recipe.learns else METHODS[recipe.merge_method].per_model
    for task, entry in recipe.experts.items():
        problems += [
            f"models: '{task}' has parameter '{key}', which '{recipe.merge_method}' does not take.{nearest(key, allowed) if allowed else ''}"
            for key in with_effect(recipe.merge_method, entry.parameters, allowed)
            if key not in allowed
        ]
    if len(recipe.kinds) > 1:
        problems.append(different_kinds(recipe.kinds))
    needs_base = recipe.learns or getattr(METHODS[recipe.merge_method], "origin", None) == "pretrained"
    if needs_base and recipe.base_model is None:
        problems.append(f"base_model: '{recipe.merge_method}' needs the model that the experts were fine-tuned from.")
    if recipe.needs_data:
        use = "trains on" if recipe.trains else "adapts on" if recipe.learns else "takes statistics of"
        problems += [f"models: '{t}' has no task with data, and '{recipe.merge_method}' {use} its inputs." for t, e in recipe.experts.items()
                     if e.task is None or e.task.data is None]  # fmt: skip
    if recipe.trains:
        problems += _training_problems(recipe)
    if recipe.modular:
        problems += _modular_problems(recipe)
    if recipe.adaptive:
        try:
            strangers = [task for task in recipe.adaptation()[1].objectives if task not in recipe.experts]
            problems += [f"adapt.objectives: unknown task '{t}'.{nearest(t, recipe.experts)}" for t in strangers]
        except RecipeError as error:
            problems += _listed(error)
    return problems


def _problems_of_base(recipe: Recipe) -> list[str]:
    """Of a base that is one of the models without being listed, and of a listed one."""
    name = recipe.merge_method
    problems = [
        f"models: the base has parameter '{key}', which '{name}' does not take."
        for entry in recipe.models
        if recipe.is_base(entry)
        for key in with_effect(name, entry.parameters, ())
    ]
    if recipe.adds_base and "weight" in METHODS[name].per_model and "weight" not in recipe.parameters:
        problems.append(
            f"base_model: '{name}' merges the models alone, and would merge the base as one of them, of no weight. "
            "List the base among the models with its weight, or remove base_model."
        )
    return problems


def _listed(error: RecipeError) -> list[str]:
    """The problems that an error lists, each with what its heading names."""
    heading, *lines = str(error).split("\n")
    return [f"{heading.split(':')[0]}: {line.strip()}" for line in lines] or [heading]


def _modular_problems(recipe: Recipe) -> list[str]:
    """Of settings, and of the start that modules are put on."""
    try:
        strangers = [task for task in recipe.modules()[1].objectives if task not in recipe.experts]
        start = recipe.start()
    except RecipeError as error:
        return _listed(error)
    problems = [f"adapt.objectives: unknown task '{t}'.{nearest(t, recipe.experts)}" for t in strangers]
    if start is None:
        return problems
    one_model = [name for name, kind in METHODS.items() if not kind.task_aware]
    if start.merge_method not in (*one_model, *ADAPTIVE):
        hint = nearest(start.merge_method, [*one_model, *ADAPTIVE])
        return [*problems, f"parameters.start: '{start.merge_method}' gives no single merged model.{hint}"]
    return problems + [f"parameters.start: {problem}" for problem in _problems(start)]


def _training_problems(recipe: Recipe) -> list[str]:
    problems = []
    if recipe.data.protocol == "transductive":
        problems.append(
            f"data.protocol: '{recipe.merge_method}' reads labels, and under 'transductive' they would be those that are scored. Use disjoint."
        )
    try:
        recipe.training()
    except RecipeError as error:
        problems += _listed(error)
    return problems


def different_kinds(kinds: Iterable[str]) -> str:
    """The sentence that refuses tasks of more than one kind."""
    return f"models: tasks of different kinds ({', '.join(sorted(kinds))}) cannot share one network."
