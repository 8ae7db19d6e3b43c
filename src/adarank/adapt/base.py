"""What all methods that learn on unlabelled inputs have in common: an `adapt` block, read once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import Field, PrivateAttr

from adarank.adapt.objectives import NEED_MEAN
from adarank.adapt.outcomes import outcomes_of
from adarank.adapt.settings import AdaptSettings
from adarank.data.labels import Problem
from adarank.method import MergeMethod
from adarank.settings import Settings, nearest, parse

Self = TypeVar("Self", bound="Adapting")


class AdaptBlock(AdaptSettings):
    """The `adapt` block: the loop's settings and perhaps a preset that gives their defaults."""

    preset: str | None = Field(None, description="released settings to start from")

    def split(self) -> tuple[dict[str, Any], str | None]:
        """The settings that the block gives, and its preset."""
        return self.model_dump(exclude_unset=True, exclude={"preset"}), self.preset


def split_block(block: Mapping[str, Any] | None, where: str) -> tuple[dict[str, Any], str | None]:
    """The settings that an `adapt` block gives, and its preset; ({}, None) without a block.

    Raises:
        RecipeError: it has settings that do not fit.
    """
    return ({}, None) if block is None else parse(AdaptBlock, block, where).split()


class Adapting(MergeMethod):
    """Base of the methods that learn on unlabelled inputs: a method's settings with those of the loop beside them."""

    data: ClassVar[str] = "unlabelled inputs of each task"
    use: ClassVar[str] = "adapts on"
    of_classes: ClassVar[bool] = True
    takes_steps: ClassVar[bool] = True
    adapt_block: ClassVar[type[Settings] | None] = AdaptSettings
    not_searched: ClassVar[str] = "learns what it writes"

    _settings: AdaptSettings = PrivateAttr(default_factory=AdaptSettings)

    @property
    def settings(self) -> AdaptSettings:
        """The loop's settings."""
        return self._settings

    def with_settings(self: Self, settings: AdaptSettings) -> Self:
        """The same method with other settings of the loop."""
        changed = self.model_copy()
        changed._settings = settings
        return changed

    @classmethod
    def needs(cls) -> str:
        """Models and data: a base, experts and unlabelled inputs."""
        return f"base, experts and {cls.data}; no labels"

    @classmethod
    def passes_over(cls) -> str:
        """How often checkpoints and inputs are gone through."""
        return "the checkpoints to start and to merge; each expert's inputs once for its predictions; a batch of each task every step, forward and backward"

    def check_recipe(self, tasks: Collection[str]) -> list[str]:
        """Objectives of tasks that the recipe has not, one sentence each."""
        unknown = [task for task in self.settings.objectives if task not in tasks]
        return [f"adapt.objectives: unknown task '{task}'.{nearest(task, tasks)}" for task in unknown]

    def unfit_for(self, task: str, problem: Problem, outputs: int) -> list[str]:
        """Settings of the loop that need one class of each input, or outputs with an entropy, where the task has neither."""
        if self.of_inputs:
            return super().unfit_for(task, problem, outputs)
        weights, entropies = self.settings.weights(task), outcomes_of(problem, None).entropies
        unfit = [name for name in weights if NEED_MEAN & [name] or (name == "entropy" and not entropies)]
        texts = [f"adapt: objective '{name}' is of classes. Use self-label for the task, under adapt: objectives." for name in unfit]  # fmt: skip
        if self.settings.learn_heads is True:
            texts.append("adapt: learn_heads reads its outputs as shares of classes. Remove it: heads of classifiers are learned by default.")  # fmt: skip
        if problem == "regression" and outputs != 1:
            texts.append(f"adaptation is of one number an input, where it gives {outputs}. Leave its data out.")
        return texts

    def in_force(self) -> dict[str, Any]:
        """Every setting of the method and of its loop with its value, as a record has them."""
        return {**super().in_force(), "adapt": self.settings.model_dump(mode="json")}
