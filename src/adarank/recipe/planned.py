"""All stages of a recipe, opened before any is merged: a stage that is to come is known by its headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.errors import AdaRankError, RecipeError, itemise
from adarank.io.checkpoint import Checkpoint, TensorInfo
from adarank.io.hub import is_hub_id, local_path
from adarank.recipe.job import Job, open_job
from adarank.recipe.schema import Recipe
from adarank.settings import nearest


class PlannedCheckpoint(Checkpoint):
    """What a stage will give: its tensors' shapes and dtypes, its configuration, and the files that it will copy.

    Its tensors are not there yet. `read` gives what decides how they are paired (integers, and which tables are tied): those
    of the model that the stage keeps such tensors from.
    """

    def __init__(self, name: str, job: Job) -> None:
        root = job.tokenizer.source if job.tokenizer else job.root
        self.path: Path = root.path
        self.folder: Path = root.folder
        self.label = f"stage '{name}'"
        self.files: list[Path] = []
        self.tensors = {n: TensorInfo(n, shape, dtype, self.label) for n, (shape, dtype) in job.layout().items()}
        self.aliases: dict[str, str] = {}
        self.config: dict[str, Any] = dict(job.config)
        self.modules = job.root.modules
        self._networks: list[AlignedCheckpoints] = job.networks

    def read(self, name: str) -> Tensor:
        """A tensor as the stage's own first model has it, in the stage's dtype."""
        network = next(each for each in self._networks if name in each.tensors)
        member = network.reference()
        return member.source.read(member.names[name]).to(self.tensors[name].dtype)

    def check_bytes(self) -> None:
        """Nothing is stored yet."""

    @property
    def quantisation(self) -> str | None:
        """None: stages write floats."""
        return None

    def sha256(self) -> dict[str, str]:
        """Nothing is stored yet."""
        return {}


@dataclass(frozen=True)
class Stages:
    """A recipe's jobs.

    Attributes:
        before: name -> what is merged before the output, in that order.
        output: the last.
    """

    before: Mapping[str, Job]
    output: Job

    @property
    def jobs(self) -> list[Job]:
        """All, in the order in which they are merged."""
        return [*self.before.values(), self.output]


def open_stages(recipe: Recipe) -> Stages:
    """Open and align all that a recipe's stages name.

    Raises:
        AdaRankError: as `open_job`, of all stages that can be looked at.
    """
    planned: dict[str, Checkpoint] = {}
    names = [*recipe.stages, *recipe.unread]
    before: dict[str, Job] = {}
    errors: list[AdaRankError] = []
    for name, stage in recipe.stages.items():
        if stage.references & (recipe.stages.keys() - planned.keys()):
            continue  # of a stage that cannot be merged nothing is known
        try:
            _check_references(stage, names)
            before[name] = open_job(stage, planned)
            planned[name] = _planned(name, before[name])
        except AdaRankError as error:
            errors.append(_of_stage(name, error))
    if recipe.references & (recipe.stages.keys() - planned.keys()):
        raise _together(errors)
    try:
        _check_references(recipe, names)
        output = open_job(recipe, planned)
    except AdaRankError as error:
        errors.append(_of_stage("", error) if recipe.stages else error)
    if errors:
        raise _together(errors)
    return Stages(before, output)


def _planned(name: str, job: Job) -> Checkpoint:
    if job.method.in_use:
        raise RecipeError(
            f"'{job.recipe.merge_method}' writes a network for each task, and a stage is one model. Merge it last, or apart."
        )
    if job.tokenizer and job.tokenizer.made is not None:
        raise RecipeError(
            "tokenizer: tokens are added to it, and the next stage reads it before it is written. Give the tokenizer key to the last stage, or merge this one apart."
        )
    return PlannedCheckpoint(name, job)


def _check_references(recipe: Recipe, stages: Sequence[str]) -> None:
    """A name that is neither a stage, a path nor a hub id is most likely a stage's, mistyped."""
    unknown = [
        name
        for name in sorted(recipe.references - set(stages) if stages else ())
        if not is_hub_id(name) and not local_path(name, recipe.folder).exists() and "/" not in name
    ]  # fmt: skip
    if unknown:
        lines = [f"'{name}' is neither a stage of this file nor a model's folder.{nearest(name, stages)}" for name in unknown]  # fmt: skip
        raise RecipeError(lines[0] if len(lines) == 1 else itemise("models:", lines))


def _of_stage(name: str, error: AdaRankError) -> AdaRankError:
    label = f"stage '{name}'" if name else "the output's stage"
    return type(error)(f"{label}: {error}")


def _together(errors: list[AdaRankError]) -> AdaRankError:
    if len(errors) == 1:
        return errors[0]
    return type(errors[0])(itemise(f"{len(errors)} stages cannot be merged:", ["\n  ".join(str(e).split("\n")) for e in errors]))  # fmt: skip
