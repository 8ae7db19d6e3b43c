"""All stages of a recipe, opened before any is merged: a stage that is to come is known by its headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.errors import Problems, RecipeError
from adarank.io.checkpoint import Checkpoint, TensorInfo
from adarank.io.hub import is_hub_id, local_path
from adarank.recipe.draft import Draft
from adarank.recipe.job import Job, Opened, open_draft
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
class Part:
    """A stage of a recipe, or its whole where it has no stages, as far as it could be opened.

    Attributes:
        name: the stage's; empty for the output's.
        label: what it is called before its problems; empty if the recipe has no other.
        draft: what the recipe says of it.
        opened: what that names.
    """

    name: str
    label: str
    draft: Draft
    opened: Opened


def open_parts(draft: Draft, problems: Problems) -> list[Part]:
    """Open and align all that a recipe's stages name, in the order in which they are merged; the output's is the last.

    What is wrong is noted, with the stage that it is of; of a stage that names one with problems the rest is checked.
    """
    planned: dict[str, Checkpoint | None] = dict.fromkeys(draft.stages)
    names = [*draft.stages, *draft.recipe.unread]
    parts = []
    for name, stage in [*draft.stages.items(), ("", draft)]:
        if stage is None:
            continue
        label = (f"stage '{name}'" if name else "the output's stage") if names else ""
        with problems.of(label) as here:
            mistyped = _mistyped(stage.recipe, names) if names else {}
            here.errors += [RecipeError(text) for text in mistyped.values()]
            opened = open_draft(stage, here, {**planned, **dict.fromkeys(mistyped)})
            if name and opened.job is not None:
                with here.noted():
                    planned[name] = _planned(name, opened.job)
            parts.append(Part(name, label, stage, opened))
    return parts


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


def _mistyped(recipe: Recipe, stages: Sequence[str]) -> Mapping[str, str]:
    """Reference -> what is wrong, of those that are neither a stage, a path nor a hub id: most likely a stage's, mistyped."""
    return {
        name: f"'{name}' is neither a stage of this file nor a model's folder.{nearest(name, stages)}"
        for name in sorted(recipe.references - set(stages))
        if not is_hub_id(name) and not local_path(name, recipe.folder).exists() and "/" not in name
    }
