"""A recipe with its opened, aligned checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adarank.alignment.align import align
from adarank.alignment.selection import matching
from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.errors import CheckpointError, Problems, RecipeError, itemise
from adarank.io.checkpoint import Checkpoint, check_any
from adarank.io.dequantise import Dequantised
from adarank.io.hub import resolve, resolve_without_download, same_model
from adarank.io.progress import stage
from adarank.io.quantised import quantisation, refuse_quantised
from adarank.io.sentence import check_modules
from adarank.io.writer import layout_bytes
from adarank.method import MergeMethod, Outline
from adarank.models import FAMILIES, Family, classes_of, foreign_code, kind_of, no_classifier
from adarank.models.compatibility import check_apart, check_compatible
from adarank.recipe.checks import different_kinds
from adarank.recipe.draft import METHOD, Draft, with_models
from adarank.recipe.schema import Recipe
from adarank.recipe.tokenizers import tokenizer_source


@dataclass(frozen=True)
class Job:
    """A validated recipe with its opened, aligned checkpoints.

    Attributes:
        folders: task -> folder of its expert.
        family: the kind of model, if the recipe's models have tasks.
        method: the method with all its settings, checked against the network.
        notes: how the models differ where that stops no merge, in sentences.
        tokenizer: the model whose tokenizer's files are written, where the recipe names one; else they are the root's.
    """

    recipe: Recipe
    base: Checkpoint | None
    experts: dict[str, Checkpoint]
    network: AlignedCheckpoints
    family: Family | None
    method: MergeMethod
    notes: tuple[str, ...] = ()
    tokenizer: Checkpoint | None = None

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
        return Outline(self.network, self.layout(), self.recipe.output_dtype(), self.family, self.recipe.dequantize)

    def output_bytes(self) -> int:
        """Size of the output's tensors, heads not among them."""
        shared, of_tasks = self.method.output_layouts(self.outline())
        return layout_bytes(shared) + sum(layout_bytes(layout) for layout in of_tasks.values())

    def inputs(self) -> dict[str, dict[str, str]]:
        """SHA-256 of every input file, by checkpoint."""
        checkpoints = {**({"base": self.base} if self.base else {}), **self.experts}
        files = [file for checkpoint in checkpoints.values() for file in checkpoint.files]
        with stage("Hashing the inputs", sum(file.stat().st_size for file in files)):
            return {name: checkpoint.sha256() for name, checkpoint in checkpoints.items()}


def open_job(recipe: Recipe) -> Job:
    """Open and align everything that a recipe names. Reads headers, integers, and tables that may be tied.

    Arguments:
        recipe: what `load_recipe` returns.

    Returns:
        The recipe with its opened checkpoints, its method, and what happens to each tensor (`job.network.choices`).

    Raises:
        AdaRankError: what cannot be opened or does not fit, all at once.

    Example:
        job = adarank.open_job(adarank.load_recipe("recipe.yaml"))
        for name, choice in job.network.choices.items():
            print(name, choice.action, choice.reason)
    """
    problems = Problems()
    opened = open_draft(Draft(recipe), problems)
    problems.refuse()
    assert opened.job is not None
    return opened.job


@dataclass(frozen=True)
class Opened:
    """What could be opened of a recipe.

    Attributes:
        job: all of it; None if something is wrong.
        recipe: with all its models, those that could not be opened too.
        sound: nothing is wrong with the recipe itself.
        experts: task -> expert, of those that could be opened.
        family: the kind of model, as far as it could be told.
    """

    job: Job | None
    recipe: Recipe
    sound: bool
    experts: Mapping[str, Checkpoint]
    family: Family | None


def open_draft(draft: Draft, problems: Problems) -> Opened:
    """Open and align what a recipe names. What is wrong is noted, and all is checked that it leaves possible."""
    before = len(problems.errors)
    base, experts = _open(draft, problems)
    recipe = with_models(draft.recipe, experts, with_base=base is not None)
    opening = _Opening(draft, recipe, base, experts, problems)
    job = opening.job()
    sound = draft.sound and len(problems.errors) == before
    if not sound and not draft.left_out & {METHOD, "parameters", "models", "adapt"}:
        _check_settings(draft.recipe, problems)
    return Opened(job if sound else None, draft.recipe, draft.sound, opening.experts, opening.family)


def _check_settings(recipe: Recipe, problems: Problems) -> None:
    """Note what is wrong with the method's settings, where that has not been said: they fit no models, or any."""
    said = "\n".join(map(str, problems.errors))
    here = Problems()
    with here.noted():
        recipe.method()
    problems.errors += [error for error in here.errors if str(error).split("\n")[-1].strip() not in said]


class _Opening:
    """The checks of opened models, in order. Each runs on what those before it left."""

    def __init__(
        self,
        draft: Draft,
        recipe: Recipe,
        base: Checkpoint | None,
        experts: Mapping[str, Checkpoint],
        problems: Problems,
    ) -> None:
        self.draft, self.problems = draft, problems
        self.base, self.experts = base, dict(experts)
        self.whole = len(experts) == len(draft.recipe.experts) and (base is None) == (draft.recipe.base_model is None)
        self.recipe = draft.recipe if self.whole else recipe
        self.family: Family | None = None

    def job(self) -> Job | None:
        """The job, if nothing is wrong."""
        if not self.experts:
            return None
        members = [*([self.base] if self.base else []), *self.experts.values()]
        if self.recipe.layer_range is not None:
            with self.problems.noted():
                _check_layers(self.recipe.layer_range, members)
        tokenizer = None
        if self._source_is_there():
            with self.problems.noted():
                tokenizer = tokenizer_source(self.recipe, self.base, self.experts)
        network = self._network(members)
        notes: list[str] = []
        with self.problems.noted():
            if network is None:
                check_apart(self.base, self.experts)
            else:
                notes = check_compatible(network, self.base, self.experts)
        if network is None or not self.whole or not self.draft.sound:
            return None
        with self.problems.noted():
            method = self.recipe.method(network.merged())
            method.check(network)
            return Job(self.recipe, self.base, self.experts, network, self.family, method, tuple(notes), tokenizer)
        return None

    def _source_is_there(self) -> bool:
        """False if the tokenizer is of a model that could not be opened, so that nothing can be said of it."""
        given, source = self.draft.recipe, self.draft.recipe.tokenizer_of
        if self.whole or source in (None, "union"):
            return True
        if source == "base":
            return self.base is not None or given.base_model is None
        lost = [entry.model for task, entry in given.experts.items() if task not in self.experts]
        lost += [given.base_model] if given.base_model is not None and self.base is None else []
        return not any(same_model(source, model, given.folder) for model in lost)

    def _network(self, members: Sequence[Checkpoint]) -> AlignedCheckpoints | None:
        """The models, aligned; None if they do not align, or if what is missing would be taken for their fault."""
        recipe, known = self.recipe, len(self.problems.errors)
        with self.problems.noted():
            self.family = _family(recipe, self.experts)
        if self.family is not None and recipe.dequantize:
            text = "dequantize: true is for models without tasks: networks are loaded from their files. De-quantise the models first."
            self.problems.errors.append(RecipeError(text))
        base_lost = self.base is None and self.draft.recipe.base_model is not None
        task_lost = self.family is None and "models" in self.draft.left_out
        if base_lost or task_lost or "select" in self.draft.left_out or len(self.problems.errors) > known:
            return None
        kept: dict[str, str] = {}
        with self.problems.noted():
            if self.family is not None:
                self.experts, kept = self.family.complete(self.base, self.experts, recipe.tasks, recipe.folder)
            else:
                check_modules({checkpoint.label: checkpoint.modules for checkpoint in members})
        if len(self.problems.errors) > known:
            return None
        with self.problems.noted():
            network = self._aligned(kept)
            _check_bodies(recipe, self.experts, network)
            return network
        return None

    def _aligned(self, kept: Mapping[str, str]) -> AlignedCheckpoints:
        """The models' tensors, paired."""
        family, select = self.family, self.recipe.select
        if not self.whole:  # a pattern may be meant for a model that is not here
            select = matching(select, [n for c in (self.base, *self.experts.values()) if c for n in c.tensors])
        keep_embeddings = bool(family and family.keep_embeddings) and self.recipe.kind.keeps_embeddings
        network = align(self.base, self.experts, select, keep_embeddings, family is not None, kept)
        for task, member in network.experts.items():
            member.dropped.update(self.experts[task].unused)
        if self.base is not None and network.base is not None:
            network.base.dropped.update(self.base.unused)
        return network


def _check_layers(wanted: tuple[int, int], opened: Sequence[Checkpoint]) -> None:
    """One slice stands for whole models if it has all their layers."""
    problems = []
    for checkpoint in opened:
        known = (checkpoint.config.get(key) for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"))
        count = next((number for number in known if number is not None), None)
        if count is None or tuple(wanted) != (0, count):
            has = f"{count} layers" if count is not None else "a number of layers that its config.json does not tell"
            problems.append(f"{checkpoint.label}: layer_range {list(wanted)} was given, and it has {has}.")
    if problems:
        raise RecipeError(
            itemise("slices: only whole models merge here. List them under models, without slices.", problems)
        )


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


def _open(draft: Draft, problems: Problems) -> tuple[Checkpoint | None, dict[str, Checkpoint]]:
    """Those of the recipe's base and experts that can be read and are not quantised, or turned into floats.

    For a recipe that will not run nothing is downloaded.
    """
    recipe, here = draft.recipe, Problems()
    find = resolve if draft.sound else resolve_without_download

    def opened(reference: str) -> list[Checkpoint]:
        with here.noted():
            path = find(reference, recipe.folder)
            if path is None:
                return []
            checkpoint = Checkpoint(path, reference)
            check_any(checkpoint)
            return [Dequantised(checkpoint) if recipe.dequantize and quantisation(checkpoint) else checkpoint]
        return []

    base = opened(recipe.base_model) if recipe.base_model else []
    experts = {task: each[0] for task, entry in recipe.experts.items() if (each := opened(entry.model))}
    with problems.noted():
        texts = [str(error) for error in here.errors]
        if texts:
            heading = f"{len(texts)} checkpoints cannot be read:"
            raise CheckpointError(texts[0] if len(texts) == 1 else itemise(heading, texts))
    if "dequantize" not in draft.left_out:
        with problems.noted():
            refuse_quantised([*base, *experts.values()])
    floats = {task: checkpoint for task, checkpoint in experts.items() if quantisation(checkpoint) is None}
    return next((checkpoint for checkpoint in base if quantisation(checkpoint) is None), None), floats


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
