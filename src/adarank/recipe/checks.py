"""What the parts of a recipe cannot know of each other. All problems at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from adarank.adapt.base import AdaptBlock
from adarank.errors import RecipeError, itemise, listed
from adarank.method import Another
from adarank.recipe.mergekit import with_effect
from adarank.recipe.registry import METHODS
from adarank.recipe.schema import Recipe
from adarank.settings import nearest, parse


def check(recipe: Recipe, where: str) -> None:
    """What single fields cannot know of each other. All problems at once."""
    problems = _problems(recipe)
    if problems:
        raise RecipeError(itemise(f"{where}: {len(problems)} problem(s).", problems))


def _problems(recipe: Recipe) -> list[str]:
    kind = recipe.kind
    problems = [*_names(recipe), *_problems_of_base(recipe)]
    if not recipe.experts:
        problems.append("models: no expert is given. A merge needs at least one.")
    if recipe.adapt is not None and kind.adapt_block is None:
        adapting = ", ".join(name for name, other in METHODS.built_in.items() if other.adapt_block)
        problems.append(f"adapt: '{kind.name}' does not adapt. Remove the block, or use one of {adapting}.")
    problems += _per_model(recipe)
    if len(recipe.kinds) > 1:
        problems.append(different_kinds(recipe.kinds))
    if kind.needs_base() and recipe.base_model is None:
        problems.append(f"base_model: '{kind.name}' needs the model that the experts were fine-tuned from.")
    problems += [*_of_heads(recipe), *_of_output(recipe)]
    if kind.data or recipe.heads == "learn":
        use = f"'{kind.name}' {kind.use}" if kind.data else "heads: learn reads"
        problems += [f"models: '{t}' has no task with data, and {use} its inputs." for t, e in recipe.experts.items()
                     if e.task is None or e.task.data is None]  # fmt: skip
    if recipe.tokenizer is not None and recipe.tokenizer_source is not None:
        problems.append("tokenizer: given beside tokenizer_source, its older form. Keep one of them.")
    return problems + _of_settings(recipe)


def _of_heads(recipe: Recipe) -> list[str]:
    """Whether heads can be learned on what the method writes."""
    kind = recipe.kind
    if recipe.heads == "expert":
        return []
    if kind.adapt_block is not None and not kind.in_use:
        return [f"heads: '{kind.name}' adapts, and learns heads as adapt: learn_heads says. Remove heads."]
    if kind.in_use or "heads" in kind.model_fields:
        what = "a network for each task" if kind.in_use else "heads of its own"
        return [f"heads: '{kind.name}' writes {what}; learn is for one body under its experts' heads. Remove heads."]
    return []


def _of_output(recipe: Recipe) -> list[str]:
    """Whether the output can be an adapter."""
    if recipe.output.lora is None:
        return []
    kind = recipe.kind
    if kind.in_use:
        return [
            f"output.lora: '{kind.name}' writes a network for each task, and an adapter is one model's. Remove output."
        ]
    if recipe.base_model is None or kind.merges_base:
        why = (
            f"'{kind.name}' merges base_model as one of the models"
            if kind.merges_base
            else "the recipe names no base_model"
        )
        return [f"output.lora: an adapter changes a base, and {why}. Use a method about a base, or remove output."]
    return []


def _names(recipe: Recipe) -> list[str]:
    problems = [f"models: '{task}' cannot name a task here (a folder heads/{task} is made, and 'base' is the base). Give another one under task: name." for task in recipe.experts
                if task in ("", ".", "..") or (task == "base" and recipe.base_model) or "/" in task or "\\" in task]  # fmt: skip
    given = Counter(m.task.name for m in recipe.models if m.task and m.task.name)
    problems += [f"models: {times} tasks are called '{name}'. Give each another name."
                 for name, times in given.items() if times > 1]  # fmt: skip
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


def _per_model(recipe: Recipe) -> list[str]:
    """Settings of single models that the method does not take."""
    allowed = recipe.kind.per_model
    return [
        f"models: '{task}' has parameter '{key}', which '{recipe.kind.name}' does not take.{nearest(key, allowed) if allowed else ''}"
        for task, entry in recipe.experts.items()
        for key in with_effect(recipe.kind.name, entry.parameters, allowed)
        if key not in allowed
    ]


def _of_settings(recipe: Recipe) -> list[str]:
    """Of the method's settings, and of the method that it is put on."""
    try:
        problems = recipe.kind.check_recipe(recipe.given(), recipe.experts, recipe.data.protocol)
        another = recipe.kind.put_on(recipe.given())
        return problems if problems or another is None else _of_another(recipe, another)
    except RecipeError as error:
        return listed(error)


def _of_another(recipe: Recipe, another: Another) -> list[str]:
    block = None if another.adapt is None else parse(AdaptBlock, another.adapt, f"{another.key}.adapt")
    changes = {"merge_method": another.merge_method, "parameters": dict(another.parameters), "adapt": block}
    return [f"{another.key}: {problem}" for problem in _problems(recipe.model_copy(update=changes))]


def different_kinds(kinds: Iterable[str]) -> str:
    """The sentence that refuses tasks of more than one kind."""
    return f"models: tasks of different kinds ({', '.join(sorted(kinds))}) cannot share one network."
