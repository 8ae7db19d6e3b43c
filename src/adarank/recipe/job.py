"""A recipe with its opened, aligned checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from adarank.alignment.align import align
from adarank.alignment.task_vectors import Network
from adarank.errors import AdaRankError, CheckpointError, RecipeError, itemise
from adarank.io.checkpoint import Checkpoint
from adarank.io.hub import resolve
from adarank.io.writer import layout_bytes
from adarank.method import MergeMethod, Outline
from adarank.models import FAMILIES, Family, kind_of
from adarank.recipe.checks import different_kinds
from adarank.recipe.schema import Recipe


@dataclass(frozen=True)
class Job:
    """A validated recipe with its opened, aligned checkpoints.

    Attributes:
        folders: task -> folder of its expert.
        family: the kind of model, if the recipe's models have tasks.
        method: the method with all its settings, checked against the network.
    """

    recipe: Recipe
    base: Checkpoint | None
    experts: dict[str, Checkpoint]
    network: Network
    family: Family | None
    method: MergeMethod

    @property
    def root(self) -> Checkpoint:
        """The base, or the first expert when there is none."""
        return self.base or next(iter(self.experts.values()))

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The output's tensors: name -> (shape, dtype). Floats take the asked dtype, by default the base's own."""
        asked = self.recipe.output_dtype()
        return {
            name: (info.shape, asked if asked is not None and info.dtype.is_floating_point else info.dtype)
            for name, info in self.network.tensors.items()
        }

    def outline(self) -> Outline:
        """What headers tell of the merge."""
        return Outline(self.network, self.layout(), self.recipe.output_dtype(), self.family)

    def output_bytes(self) -> int:
        """Size of the output's tensors, heads not among them."""
        shared, of_tasks = self.method.output_layouts(self.outline())
        return layout_bytes(shared) + sum(layout_bytes(layout) for layout in of_tasks.values())

    def inputs(self) -> dict[str, dict[str, str]]:
        """SHA-256 of every input file, by checkpoint."""
        checkpoints = {**({"base": self.base} if self.base else {}), **self.experts}
        return {name: checkpoint.sha256() for name, checkpoint in checkpoints.items()}


def open_job(recipe: Recipe) -> Job:
    """Open and align everything that a recipe names. Reads headers only.

    Raises:
        AdaRankError: what cannot be opened or does not fit, all at once.
    """
    opened: dict[str, Checkpoint] = {}
    problems: list[str] = []
    wanted = {
        **({"base": recipe.base_model} if recipe.base_model else {}),
        **{t: e.model for t, e in recipe.experts.items()},
    }
    for name, reference in wanted.items():
        try:
            opened[name] = Checkpoint(resolve(reference, recipe.folder), reference)
        except AdaRankError as error:
            problems.append(str(error))
    if len(problems) == 1:
        raise CheckpointError(problems[0])
    if problems:
        raise CheckpointError(itemise(f"{len(problems)} checkpoints cannot be read:", problems))
    if recipe.layer_range is not None:
        _check_layers(recipe.layer_range, opened)
    base = opened.pop("base", None) if recipe.base_model else None
    family = _family(recipe, opened)
    keep_embeddings = bool(family and family.keep_embeddings) and recipe.kind.keeps_embeddings
    kept: dict[str, str] = {}
    if family is not None:
        tasks = {task: entry.task for task, entry in recipe.experts.items() if entry.task}
        opened, kept = family.complete(base, opened, tasks, recipe.folder)
    network = align(base, opened, recipe.select, keep_embeddings, family is not None, kept)
    for task, member in network.experts.items():
        member.dropped.update(opened[task].unused)
    method = recipe.method(network.merged())
    method.check(network)
    return Job(recipe, base, opened, network, family, method)


def _check_layers(wanted: tuple[int, int], opened: Mapping[str, Checkpoint]) -> None:
    """One slice stands for whole models if it has all their layers."""
    problems = []
    for own in opened.values():
        known = (own.config.get(key) for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"))
        count = next((found for found in known if found is not None), None)
        if count is None or tuple(wanted) != (0, count):
            has = f"{count} layers" if count is not None else "a number of layers that its config.json does not tell"
            problems.append(f"{own.label}: layer_range {list(wanted)} was given, and it has {has}.")
    if problems:
        raise RecipeError(
            itemise("slices: only whole models merge here. List them under models, without slices.", problems)
        )


def _family(recipe: Recipe, experts: Mapping[str, Checkpoint]) -> Family | None:
    """The kind of the recipe's tasks: as it says, else as the experts' config.json tells. None if there are no tasks."""
    tasks = {name: entry.task for name, entry in recipe.experts.items() if entry.task}
    kinds = {name: task.kind or kind_of(experts[name].config) for name, task in tasks.items()}
    untold = [
        f"models: the kind of task '{name}' cannot be told from {experts[name].folder / 'config.json'}. Give task: kind, one of {', '.join(FAMILIES)}."
        for name, kind in kinds.items()
        if kind is None
    ]
    known = {kind for kind in kinds.values() if kind}
    problems = untold + ([different_kinds(known)] if len(known) > 1 else [])
    if problems:
        raise RecipeError(
            problems[0] if len(problems) == 1 else itemise(f"recipe: {len(problems)} problem(s).", problems)
        )
    return FAMILIES[known.pop()] if known else None
