"""Recipes: mergekit's YAML dialect, extended by what adaptation and evaluation need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import Field, field_validator

from adarank.adapt.methods import ADAPTIVE, AdaptiveMethod, with_preset
from adarank.adapt.settings import AdaptSettings
from adarank.data.spec import DataSettings, TaskSpec
from adarank.errors import RecipeError, itemise
from adarank.masks import MaskFile
from adarank.methods import METHODS, Method
from adarank.methods.weights import resolve
from adarank.modular import MODULAR, Modular, Surgery
from adarank.modular.base import settled
from adarank.multitask import Multitask
from adarank.select import Select
from adarank.settings import Settings, nearest, parse

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
_Dtype = Literal["float32", "float16", "bfloat16", "float64"]
# What mergekit's dialect has and this tool does not do: named, so that the error says more than "unknown key".
_NOT_DONE = {
    "slices": "Layers are not rearranged here (frankenmerging): give one slice of all layers, or list whole models under models.",
    "modules": "Module-wise recipes are not merged here; list whole models under models.",
    "tokenizer": "Vocabularies are never resized here; all models must share the base's.",
    "chat_template": "Edit tokenizer_config.json of the output instead.",
    "tokenizer_source": "Only 'base': vocabularies are never resized here; all models must share the base's.",
}
# mergekit's methods that this tool has not, and the nearest that it has.
_NOT_HERE = {
    "passthrough": "It copies layers and merges nothing; copy the model, or use mergekit for layer slices.",
}


def _empty_if_none(value: Any) -> Any:
    """YAML reads a key without a value as None: no parameters are meant."""
    return {} if value is None else value


class ModelEntry(Settings):
    """One expert: where it is, its own parameters, and its task."""

    _nothing = field_validator("parameters", mode="before")(_empty_if_none)

    model: str
    parameters: dict[str, Any] = Field({}, description="settings")
    task: TaskSpec | None = None


class AdaptBlock(AdaptSettings):
    """The `adapt` block: the loop's settings and perhaps a preset that gives their defaults."""

    preset: str | None = Field(None, description="released settings to start from")


class Recipe(Settings):
    """A whole recipe. `folder` is where its relative paths count from."""

    _nothing = field_validator("parameters", mode="before")(_empty_if_none)

    merge_method: str
    models: tuple[ModelEntry, ...]
    base_model: str | None = None
    parameters: dict[str, Any] = Field({}, description="settings")
    select: Select = Select()
    dtype: _Dtype | None = None
    out_dtype: _Dtype | None = None
    tokenizer_source: Literal["base"] | None = None
    adapt: AdaptBlock | None = None
    data: DataSettings = DataSettings()
    seed: int = Field(0, ge=0, lt=2**63)
    device: str = "auto"
    folder: Path = Field(Path("."), exclude=True)
    layer_range: tuple[int, int] | None = None  # of the one slice that the models were given in: it must be all layers

    @property
    def merges_base(self) -> bool:
        """True if a base that is listed among the models is merged as they are."""
        kind = METHODS.get(self.merge_method)
        return kind is not None and kind.merges_base

    @property
    def adaptive(self) -> bool:
        return self.merge_method in ADAPTIVE

    @property
    def modular(self) -> bool:
        """True if small modules are trained beside the weights: adapters, routers."""
        return self.merge_method in MODULAR

    @property
    def trains(self) -> bool:
        """True for the reference that is trained on labels: no merge at all."""
        return self.merge_method == Multitask.name

    @property
    def learns(self) -> bool:
        """True if what is written is learned step by step: λ and masks, modules, or a whole network."""
        return self.adaptive or self.modular or self.trains

    @property
    def needs_data(self) -> bool:
        """Whether merging reads the tasks' data."""
        return self.learns or bool(METHODS[self.merge_method].data)

    @property
    def experts(self) -> dict[str, ModelEntry]:
        """Task name -> model. The base, if it is listed among the models as mergekit allows, is no expert."""
        uses_base = not self.merges_base
        entries = [m for m in self.models if not (uses_base and m.model == self.base_model and m.task is None)]
        return dict(zip(_task_names(entries), entries, strict=True))

    @property
    def kinds(self) -> set[str]:
        """Kinds that the recipe itself gives its tasks."""
        return {entry.task.kind for entry in self.experts.values() if entry.task and entry.task.kind}

    def output_dtype(self) -> torch.dtype | None:
        """The dtype of the output, or None for each tensor's own in the base."""
        name = self.out_dtype or self.dtype
        return DTYPES[name] if name else None

    def adaptation(self) -> tuple[AdaptiveMethod, AdaptSettings]:
        """The adaptive method and its loop's settings."""
        return with_preset(self.merge_method, self.parameters, *self._adapt())

    def modules(self) -> tuple[Modular, AdaptSettings]:
        """The modular method and its loop's settings."""
        return settled(MODULAR[self.merge_method], self.parameters, *self._adapt())

    def start(self) -> Recipe | None:
        """What the modules of this recipe are put on, as a recipe of its own; None if the method settles it itself."""
        method = self.modules()[0] if self.modular else None
        if not isinstance(method, Surgery):
            return None
        given = method.start
        adapt = None if given.adapt is None else parse(AdaptBlock, given.adapt, "parameters.start.adapt")
        return self.model_copy(
            update={"merge_method": given.merge_method, "parameters": dict(given.parameters), "adapt": adapt}
        )

    def _adapt(self) -> tuple[dict[str, Any], str | None]:
        """What the adapt block says itself, and its preset."""
        if self.adapt is None:
            return {}, None
        return self.adapt.model_dump(exclude_unset=True, exclude={"preset"}), self.adapt.preset

    def training(self) -> Multitask:
        """The settings of multi-task training."""
        return parse(Multitask, self.parameters, f"parameters of '{self.merge_method}'")

    def method(self, names: list[str]) -> Method:
        """The method, if it is not adaptive, with its settings; `names` are the tensors that it merges."""
        kind = METHODS[self.merge_method]
        values = resolve(kind, self.parameters, {t: e.parameters for t, e in self.experts.items()}, names)
        if "seed" in kind.model_fields:
            values.setdefault("seed", self.seed)
        if self.merge_method == "masked" and isinstance(values.get("masks"), str):
            values["masks"] = MaskFile.load(self.folder / values["masks"])
        return parse(kind, values, f"parameters of '{self.merge_method}'")


RecipeLike = Recipe | str | Path | Mapping[str, Any]
"""A recipe, its file, or what would be in its file."""


def load_recipe(given: RecipeLike) -> Recipe:
    """Read and validate a recipe.

    Arguments:
        given: its file; or what would be in it, with paths from the working folder. A `Recipe` comes back as it is.

    Raises:
        RecipeError: it is missing, no YAML, or has problems; all of them are listed.
    """
    if isinstance(given, Recipe):
        return given
    if isinstance(given, Mapping):
        return parse_recipe(given, Path.cwd())
    path = Path(given)
    values = _read_yaml(path, ())
    return parse_recipe(values, path.resolve().parent, str(path))


def _read_yaml(path: Path, inside: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping in a recipe file. `extends: other.yaml` gives the keys that the file itself does not."""
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe. Give a YAML file.")
    if path.resolve() in inside:
        raise RecipeError(f"{path}: extends itself, by way of {inside[-1]}. Remove one of the extends lines.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not readable YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a mapping of settings was needed, got {type(values).__name__}.")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str) or (path.parent / parent).resolve().parent != path.resolve().parent:
        raise RecipeError(f"{path}: extends must name a recipe in the same folder, got {parent!r}.")
    return {**_read_yaml(path.parent / parent, (*inside, path.resolve())), **values}


def parse_recipe(values: Mapping[str, Any], folder: Path, where: str = "recipe") -> Recipe:
    """Validate a recipe given as a mapping."""
    values = _of_one_slice({key: value for key, value in values.items() if value is not None or key not in _NOT_DONE})
    asked = [key for key, value in values.items() if (key, value) != ("tokenizer_source", "base")]
    refused = [f"'{key}' is not supported. {reason}" for key, reason in _NOT_DONE.items() if key in asked]
    if refused:
        raise RecipeError(f"{where}: {refused[0]}" if len(refused) == 1 else itemise(f"{where}:", refused))
    recipe = parse(Recipe, {**values, "folder": folder}, where)
    if recipe.device == "auto":
        recipe = recipe.model_copy(update={"device": "cuda" if torch.cuda.is_available() else "cpu"})
    else:
        _check_device(recipe.device, where)
    known = [*METHODS, *ADAPTIVE, *MODULAR, Multitask.name]
    if recipe.merge_method in _NOT_HERE:
        raise RecipeError(
            f"{where}: mergekit's merge_method '{recipe.merge_method}' is not here. {_NOT_HERE[recipe.merge_method]}"
        )
    if recipe.merge_method not in known:
        raise RecipeError(
            f"{where}: unknown merge_method '{recipe.merge_method}'.{nearest(recipe.merge_method, known)}"
        )
    _check(recipe, where)
    return recipe


def _of_one_slice(values: dict[str, Any]) -> dict[str, Any]:
    """mergekit's other way to list whole models: one slice of the same layers of each. Anything else as it is."""
    slices = values.get("slices")
    if "models" in values or not (isinstance(slices, list) and len(slices) == 1 and isinstance(slices[0], dict)):
        return values
    sources = slices[0].get("sources")
    if not isinstance(sources, list) or not all(
        isinstance(s, dict) and {"model", "layer_range"} <= s.keys() for s in sources
    ):
        return values
    ranges = [source["layer_range"] for source in sources]
    if not ranges or any(own != ranges[0] for own in ranges) or slices[0].keys() - {"sources", "parameters"}:
        return values
    own = {
        "models": [{key: value for key, value in source.items() if key != "layer_range"} for source in sources],
        "parameters": {**(values.get("parameters") or {}), **(slices[0].get("parameters") or {})},
        "layer_range": ranges[0],
    }
    return {key: value for key, value in values.items() if key != "slices"} | own


def _check_device(name: str, where: str) -> None:
    try:
        kind, number = torch.device(name).type, torch.device(name).index
    except RuntimeError:
        raise RecipeError(f"{where}: device: '{name}' is none. Give auto, cpu, cuda or cuda:N.") from None
    if kind not in ("cpu", "cuda"):
        raise RecipeError(f"{where}: device: '{name}' is not supported. Give auto, cpu, cuda or cuda:N.")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and (number or 0) >= there:
        raise RecipeError(
            f"{where}: device: '{name}' was asked for, and PyTorch sees {there} CUDA device(s). Give auto or cpu."
        )


def _check(recipe: Recipe, where: str) -> None:
    """What single fields cannot know of each other. All problems at once."""
    problems = _problems(recipe)
    if problems:
        raise RecipeError(itemise(f"{where}: {len(problems)} problem(s).", problems))


def _problems(recipe: Recipe) -> list[str]:
    problems = []
    problems += [f"models: '{task}' cannot name a task here (a folder heads/{task} is made, and 'base' is the base). Give task: name." for task in recipe.experts
                 if task in ("", ".", "..") or (task == "base" and recipe.base_model) or "/" in task or "\\" in task]  # fmt: skip
    given = Counter(m.task.name for m in recipe.models if m.task and m.task.name)
    problems += [f"models: {times} tasks are called '{name}'. Give each a name of its own."
                 for name, times in given.items() if times > 1]  # fmt: skip
    if recipe.merges_base and recipe.base_model not in (None, *(m.model for m in recipe.models)):
        problems.append(
            f"base_model: '{recipe.merge_method}' merges the models alone. List the base among the models too, or remove base_model."
        )
    if not recipe.experts:
        problems.append("models: no expert is given. A merge needs at least one.")
    if recipe.adapt is not None and not (recipe.adaptive or recipe.modular):
        problems.append(
            f"adapt: '{recipe.merge_method}' does not adapt. Remove the block, or use one of {', '.join([*ADAPTIVE, *MODULAR])}."
        )
    allowed = () if recipe.learns else METHODS[recipe.merge_method].per_model
    for task, entry in recipe.experts.items():
        for key in entry.parameters:
            if key not in allowed:
                problems.append(
                    f"models: '{task}' has parameter '{key}', which '{recipe.merge_method}' does not take.{nearest(key, allowed) if allowed else ''}"
                )
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


def _task_names(entries: list[ModelEntry]) -> list[str]:
    """Each expert's task name: as given, else the last part of its path; made unique by a number."""
    names = [e.task.name if e.task and e.task.name else Path(e.model.split("@")[0]).name for e in entries]
    counts = Counter(names)
    taken = {name for name in names if counts[name] == 1}
    unique = []
    for name in names:
        if counts[name] > 1:
            name = next(n for n in (f"{name}-{i}" for i in count(1)) if n not in taken)
            taken.add(name)
        unique.append(name)
    return unique
