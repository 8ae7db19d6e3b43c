"""A recipe with its opened, aligned checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adarank.alignment.align import align
from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.errors import RecipeError, itemise
from adarank.io.checkpoint import Checkpoint
from adarank.io.sentence import check_modules
from adarank.io.vocabulary import VocabularyReader
from adarank.io.writer import layout_bytes
from adarank.method import MergeMethod, Outline
from adarank.models import FAMILIES, Family, classes_of, foreign_code, kind_of, no_classifier
from adarank.models.compatibility import check_compatible
from adarank.recipe.chat_templates import ChatTemplate, choose_template
from adarank.recipe.checks import different_kinds
from adarank.recipe.lora_output import adapter_bytes, slots_of
from adarank.recipe.opening import adapter_notes, open_checkpoints
from adarank.recipe.schema import Recipe
from adarank.recipe.slices import Slices, open_slices, sliced
from adarank.recipe.tokenizers import OutputTokenizer, Tokens, settle_tokens


@dataclass(frozen=True)
class Job:
    """A validated recipe with its opened, aligned checkpoints.

    Attributes:
        folders: task -> folder of its expert.
        family: the kind of model, if the recipe's models have tasks.
        method: the method with all its settings, checked against the network.
        notes: how the models differ where that stops no merge, in sentences.
        tokenizer: what is written where the recipe names a tokenizer; else the root's files are.
        chat_template: what is written as such; None where it is the tokenizer's.
        slices: where the layers come from, if not from whole models.
    """

    recipe: Recipe
    base: Checkpoint | None
    experts: dict[str, Checkpoint]
    network: AlignedCheckpoints
    family: Family | None
    method: MergeMethod
    notes: tuple[str, ...] = ()
    tokenizer: OutputTokenizer | None = None
    chat_template: ChatTemplate | None = None
    slices: Slices | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        """The output's configuration, but for its dtype."""
        return self.slices.config if self.slices else self.root.config

    @property
    def networks(self) -> list[AlignedCheckpoints]:
        """The network, slice by slice if it has slices."""
        return [part.network for part in self.slices.method.parts] if self.slices else [self.network]

    @property
    def root(self) -> Checkpoint:
        """The base, or the first expert when there is none."""
        return self.base or next(iter(self.experts.values()))

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The output's tensors: name -> (shape, dtype). Floats take the recipe's dtype, by default the base's."""
        floats = self.recipe.output_dtype()
        return {
            name: (info.shape, floats if floats is not None and info.dtype.is_floating_point else info.dtype)
            for name, info in self.network.tensors.items()
        }

    def outline(self) -> Outline:
        """What headers tell of the merge."""
        made = self.recipe.dequantize or not all(expert.in_one_folder for expert in self.experts.values())
        return Outline(self.network, self.layout(), self.recipe.output_dtype(), self.family, made)

    def output_bytes(self) -> int:
        """Size of the output's tensors, heads not among them; of an adapter the most that it can be."""
        if self.recipe.output.lora is not None:
            return adapter_bytes(self.network, self.recipe.output.lora.rank)
        shared, of_tasks = self.method.output_layouts(self.outline())
        return layout_bytes(shared) + sum(layout_bytes(layout) for layout in of_tasks.values())

    def inputs(self) -> dict[str, dict[str, str]]:
        """SHA-256 of every input file, by checkpoint."""
        checkpoints = {**({"base": self.base} if self.base else {}), **self.experts}
        return {name: checkpoint.sha256() for name, checkpoint in checkpoints.items()}


def open_job(recipe: Recipe, stages: Mapping[str, Checkpoint] | None = None) -> Job:
    """Open and align everything that a recipe names. Reads headers, integers, and tables that may be tied.

    Arguments:
        recipe: what `load_recipe` returns.
        stages: name -> what an earlier stage of the recipe gave. A recipe of one stage needs none.

    Returns:
        The recipe with its opened checkpoints, its method, and what happens to each tensor (`job.network.choices`).

    Raises:
        AdaRankError: what cannot be opened or does not fit, all at once.

    Example:
        job = adarank.open_job(adarank.load_recipe("recipe.yaml"))
        for name, choice in job.network.choices.items():
            print(name, choice.action, choice.reason)
    """
    if recipe.stages and stages is None:
        raise RecipeError(
            f"recipe: it has {len(recipe.stages) + 1} stages, and only plan and merge take several. Give each a file of its own, and name its folder in the next."
        )
    base, opened = open_checkpoints(recipe, stages or {})
    of_adapters = adapter_notes(base, opened)
    reader = VocabularyReader()
    tokens = settle_tokens(recipe, base, opened, reader)
    base, opened = tokens.base, tokens.experts
    if tokens.aligned and recipe.output.lora is not None:
        raise RecipeError(
            "output.lora: an adapter changes tables as its base has them, and rows of tokens would be brought together. Give models of one vocabulary, or remove output."
        )
    template = _chat_template(recipe, tokens)
    by_name = {entry.model: opened[task] for task, entry in recipe.experts.items()}
    by_name |= {recipe.base_model: base} if recipe.base_model and base else {}
    recipe = sliced(recipe, by_name)
    if recipe.slices:
        return _open_sliced(recipe, tokens, template, by_name, reader, of_adapters)
    family = _family(recipe, opened)
    if family is not None and recipe.dequantize:
        raise RecipeError(
            "dequantize: true is for models without tasks: networks are loaded from their files. De-quantise the models first."
        )
    keep_embeddings = bool(family and family.keep_embeddings) and recipe.kind.keeps_embeddings
    kept: dict[str, str] = {}
    if family is not None:
        opened, kept = family.complete(base, opened, recipe.tasks, recipe.folder)
    else:
        check_modules(
            {checkpoint.label: checkpoint.modules for checkpoint in [*([base] if base else []), *opened.values()]}
        )
    network = align(base, opened, recipe.select, keep_embeddings, family is not None, kept)
    _note_unused(network, base, opened)
    _check_bodies(recipe, opened, network)
    compatibility = check_compatible(network, base, opened, tokens.aligned, reader)
    notes = _notes(tokens, template, [*of_adapters, *compatibility])
    method = _method(recipe, network)
    return Job(recipe, base, opened, network, family, method, notes, tokens.tokenizer, template)


def _method(recipe: Recipe, network: AlignedCheckpoints) -> MergeMethod:
    """The recipe's method, checked against the network, as is the form of its output: before anything is computed."""
    method = recipe.method(network.merged())
    method.check(network)
    if recipe.output.lora is not None:
        slots_of(network)
    return method


def _notes(tokens: Tokens, template: ChatTemplate | None, compatibility: Iterable[str]) -> tuple[str, ...]:
    return (*tokens.notes, *(template.notes if template else ()), *compatibility)


def _chat_template(recipe: Recipe, tokens: Tokens) -> ChatTemplate | None:
    """The chat template that the recipe asks for."""
    if recipe.chat_template is None:
        return None
    models = [*([tokens.base] if tokens.base else []), *tokens.experts.values()]
    written = tokens.tokenizer.source if tokens.tokenizer else models[0]
    return choose_template(recipe.chat_template, models, written, tokens.output_tokens)


def _open_sliced(
    recipe: Recipe,
    tokens: Tokens,
    template: ChatTemplate | None,
    by_name: Mapping[str, Checkpoint],
    reader: VocabularyReader,
    of_adapters: Iterable[str],
) -> Job:
    base, experts = tokens.base, tokens.experts
    check_modules({checkpoint.label: checkpoint.modules for checkpoint in by_name.values()})
    slices = open_slices(recipe, base or next(iter(experts.values())), by_name)
    _note_unused(slices.network, base, experts)
    compatibility = check_compatible(slices.network, base, experts, tokens.aligned, reader)
    notes = _notes(tokens, template, [*of_adapters, *compatibility])
    return Job(recipe, base, experts, slices.network, None, slices.method, notes, tokens.tokenizer, template, slices)


def _note_unused(network: AlignedCheckpoints, base: Checkpoint | None, experts: Mapping[str, Checkpoint]) -> None:
    """What is in the files and not among their tensors, with what alignment does not use."""
    for task, member in network.experts.items():
        member.dropped.update(experts[task].unused)
    if base is not None and network.base is not None:
        network.base.dropped.update(base.unused)


def _family(recipe: Recipe, experts: Mapping[str, Checkpoint]) -> Family | None:
    """The kind of the recipe's tasks: as it says, else as the experts' config.json tells. None if there are no tasks."""
    kinds = {name: task.kind or kind_of(experts[name].config) for name, task in recipe.tasks.items()}
    others = [name for name in recipe.tasks if no_classifier(experts[name].config)]
    problems = [_no_classifier(name, experts[name]) for name in others]
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


def _check_bodies(recipe: Recipe, experts: Mapping[str, Checkpoint], network: AlignedCheckpoints) -> None:
    """A body alone can merge, and neither be adapted nor scored on data."""
    with_data = [task for task, entry in recipe.experts.items() if entry.task and entry.task.data is not None]
    bodies = [task for task in with_data if not network.heads[task] and no_classifier(experts[task].config, head=False)]
    _refuse([_no_classifier(task, experts[task]) for task in bodies])


def _no_classifier(task: str, expert: Checkpoint) -> str:
    return (
        f"models: the expert of task '{task}' ({expert.label}) is a {classes_of(expert.config)} by its config.json, without the head of a classifier. "
        f"Tasks are of {', '.join(FAMILIES)}: give the model that was fine-tuned as one, or no task, as models merge without tasks too."
    )


def _refuse(problems: list[str]) -> None:
    if problems:
        heading = f"recipe: {len(problems)} problem(s)."
        raise RecipeError(problems[0] if len(problems) == 1 else itemise(heading, problems))
