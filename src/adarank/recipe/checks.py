"""What the parts of a recipe cannot know of each other. All problems at once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from adarank.errors import RecipeError, itemise, listed
from adarank.io.hub import same_model
from adarank.method import Another, MergeMethod
from adarank.recipe.chat_templates import wrong_template
from adarank.recipe.mergekit import with_effect
from adarank.recipe.registry import METHODS
from adarank.recipe.schema import ModelEntry, Recipe, Slice
from adarank.settings import nearest

_TWO_TOKENIZERS = "tokenizer: given beside tokenizer_source, its older form. Keep one of them."


def check(recipe: Recipe, where: str, left_out: Collection[str] = ()) -> None:
    """What single fields cannot know of each other. All problems at once.

    Arguments:
        left_out: keys that were left out of the recipe as they are wrong: what is said of them would be of the gap.
    """
    if "slices" in left_out:
        return  # they are the models
    problems = _of_slices(recipe) if recipe.slices else [*_ranges_of_models(recipe), *_problems(recipe)]
    problems = [text for text in problems if not re.sub(r"^slices\.[^:]*: ", "", text).startswith(tuple(left_out))]
    if problems:
        raise RecipeError(itemise(f"{where}: {len(problems)} problem(s).", problems))


def _ranges_of_models(recipe: Recipe) -> list[str]:
    given = [entry.layer_range is not None for entry in recipe.models]
    problems = [] if all(given) or not any(given) else ["models: layer_range is given for some. Give it for all, or for none for whole models."]  # fmt: skip
    return [*problems, *_ranges(recipe.models, "models")]


def _ranges(sources: Sequence[ModelEntry], where: str) -> list[str]:
    """What is wrong with the layers that some models give to one slice."""
    ranges = [source.layer_range for source in sources if source.layer_range is not None]
    problems = [
        f"{where}: layer_range {list(layers)} is not a valid range. Give its first layer, counted from 0, and the one after its last."
        for layers in ranges
        if not 0 <= layers[0] <= layers[1]
    ]
    lengths = {stop - start for start, stop in ranges}
    if len(lengths) > 1 and not problems:
        counted = ", ".join(f"{stop - start} of {source.model}" for source, (start, stop) in zip(sources, ranges, strict=False))  # fmt: skip
        problems.append(f"{where}: the models of a slice give equally many layers, got {counted}.")
    return problems


def _of_slices(recipe: Recipe) -> list[str]:
    """What is wrong with a recipe of slices: each is a merge of its own."""
    kind = recipe.kind
    problems = ["slices: given beside models. Keep one of them."] if recipe.models else []
    if not kind.takes_slices():
        others = ", ".join(name for name, other in METHODS.built_in.items() if other.takes_slices())
        return [*problems, f"slices: '{kind.name}' merges whole models alone. List them under models, or use one of {others}."]  # fmt: skip
    if recipe.heads == "learn":
        problems.append("heads: learn is for tasks, and models of slices have none. Remove heads.")
    if recipe.select.head:
        problems.append("select: head is for tasks, and models of slices have none. Remove it, or use keep.")
    if recipe.tokenizer is not None and recipe.tokenizer_source is not None:
        problems.append(_TWO_TOKENIZERS)
    problems += _of_output(recipe)
    of_parts: dict[str, list[str]] = {}
    for number, (each, part) in enumerate(zip(recipe.slices, recipe.parts(), strict=True)):
        base = None if kind.merges_base else each.base_model or recipe.base_model
        for text in [*_of_slice(each, base, recipe.folder), *(_problems(part) if part.base_model == base or base is None else [])]:  # fmt: skip
            of_parts.setdefault(text, []).append(f"slices.{number}")
    return [*problems, *(f"{', '.join(where)}: {text}" for text, where in of_parts.items())]


def _of_slice(given: Slice, base: str | None, folder: Path) -> list[str]:
    problems = [] if given.sources else ["no source is given. Name a model and its layers."]
    problems += [f"layer_range of {source.model} is needed." for source in given.sources if source.layer_range is None]
    problems += [f"{source.model} has a task, and models of slices have none. Remove it." for source in given.sources if source.task]  # fmt: skip
    listed = sum(same_model(source.model, base, folder) for source in given.sources)
    if base is not None and listed != 1:
        problems.append(f"base_model '{base}' is {'not ' if not listed else f'{listed} times '}among the sources. List it once, with the layers that the others were fine-tuned from.")  # fmt: skip
    return problems if problems else _ranges(given.sources, "sources")


def _problems(recipe: Recipe, method: MergeMethod | None = None) -> list[str]:
    """All problems of a recipe.

    Arguments:
        method: its method, where that is parsed already.
    """
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
    problems += _of_heads(recipe)
    if kind.data or recipe.heads == "learn":
        use = f"'{kind.name}' {kind.use}" if kind.data else "heads: learn reads"
        problems += [f"models: '{t}' has no task with data, and {use} its inputs." for t, e in recipe.experts.items()
                     if e.task is None or e.task.data is None]  # fmt: skip
    if recipe.tokenizer is not None and recipe.tokenizer_source is not None:
        problems.append(_TWO_TOKENIZERS)
    problems += _of_output(recipe)
    if kind.labels and recipe.data.protocol == "transductive":
        problems.append(
            f"data.protocol: '{kind.name}' reads labels, and under 'transductive' they would be those that are scored. Use disjoint."
        )
    return problems + _of_settings(recipe, method)


def _of_output(recipe: Recipe) -> list[str]:
    """What is asked of one model's folder, and whether there is one."""
    kind = recipe.kind
    problems = [
        f"{key}: '{kind.name}' writes a network for each task, and {key} is for one model. Remove it."
        for key in ("chat_template", "max_shard_size")
        if kind.in_use and getattr(recipe, key) is not None
    ]
    if recipe.chat_template is not None:
        problems += wrong_template(recipe.chat_template)
    return problems + _of_lora_output(recipe)


def _of_heads(recipe: Recipe) -> list[str]:
    """Whether the method leaves heads to be learned."""
    kind = recipe.kind
    if recipe.heads == "expert":
        return []
    if kind.adapt_block is not None and not kind.in_use:
        return [f"heads: '{kind.name}' adapts, and learns heads as adapt: learn_heads says. Remove heads."]
    if "heads" in kind.model_fields:
        return [f"heads: '{kind.name}' writes heads of its own; learn is for its experts' heads. Remove heads."]
    return []


def _of_lora_output(recipe: Recipe) -> list[str]:
    """Whether the output can be an adapter."""
    if recipe.output.lora is None:
        return []
    kind = recipe.kind
    if recipe.slices:
        return ["output.lora: an adapter changes the layers that its base has, and slices put them into a new order. Remove output."]  # fmt: skip
    if recipe.max_shard_size is not None:
        return ["output.lora: an adapter is written as one file, and max_shard_size is for whole models. Remove it."]
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


def _of_settings(recipe: Recipe, method: MergeMethod | None) -> list[str]:
    """Of the method's settings, and of the method that it is put on."""
    if recipe.kind.by_tensor:
        return []
    try:
        method = method or recipe.method()
    except RecipeError as error:
        return listed(error)
    problems = method.check_recipe(recipe.experts)
    another = method.put_on()
    return problems if problems or another is None else _of_another(recipe, another)


def _of_another(recipe: Recipe, another: Another) -> list[str]:
    changes = {"merge_method": another.merge_method, "parameters": dict(another.parameters), "adapt": another.adapt}
    return [f"{another.key}: {problem}" for problem in _problems(recipe.model_copy(update=changes), another.method)]


def different_kinds(kinds: Iterable[str]) -> str:
    """The sentence that refuses tasks of more than one kind."""
    return f"models: tasks of different kinds ({', '.join(sorted(kinds))}) cannot share one network."
