"""The settings of adaptation: what is minimised, how steps are taken, how they are judged, what is kept."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from adarank.adapt.objectives import NEED_FEATURES, OBJECTIVES, SelfLabel, Weights, as_weights, check_objective
from adarank.settings import Settings

AUTO: Literal["auto"] = "auto"
EVERY = 40  # steps between two judgements, at most
PASSES = 2  # over the inputs of the task that has fewest: from few inputs a model learns, and overfits, sooner
SHORTEST = 5  # steps between two judgements, at least
_NAMES = ", ".join(OBJECTIVES.built_in)

# Settings that are no more -> what stands in their place.
_REPLACED = {
    "precision": "is a parameter of the method: parameters: {precision: bfloat16}",
    "top_logits": "is a setting of self-labels: self_label: {top_logits}",
    "balance": "tasks count equally in every step, and a step that leaves one behind its start is not kept (keep: best)",
    "patience": "all `steps` are taken, and the best judged one is kept. Set fewer `steps`",
    "repair": "there is none: where the best step leaves a task behind, the line from the start to it is searched",
    "retreat": "the line from the start to the best step is searched at 0.8, 0.6, 0.4 and 0.2 of the way where that step leaves a task behind",
    "signal": "nearness to the experts is the agreement of their predictions",
    "step_unit": "steps of soft masks count in weights, as by default before",
    "warmup": "step sizes begin where they are set. A smaller lr_masks and lr_lambda does the same for the first steps",
    "betas": "they are Adam's usual 0.9 and 0.999",
    "temperature": "τ of a binary mask's sigmoid is the paper's 10. The temperature of self-labels is self_label: {temperature}",
    "logit": "mask logits start at ±0.1, as released",
    "clamp": "the range of λ is a parameter of the method: parameters: {clamp: [0, 1]}",
    "save_every": "the state is saved at every judgement (check_every), and at least once a minute",
    "momentum": "running mean predictions forget by 0.9",
    "filter": "filtered-entropy leaves out inputs above 0.4 of log(classes) and those whose cosine with the mean prediction is above 0.95",
}


def _at_least_zero_or_auto(given: Any) -> Any:
    number = isinstance(given, (int, float)) and not isinstance(given, bool) and given >= 0
    if not number and given != AUTO:
        raise ValueError("a number of at least 0, or auto, was needed")
    return given


class AdaptSettings(Settings):
    """How adaptation runs. The defaults were chosen without labels (docs/adaptation.md); `preset: paper` has the papers'.

    Arguments:
        by: what is learned at a time: all of the `model`, by its predictions; or a `block`, so that it gives what the experts'
            blocks give, which needs the memory of one block (docs/blocks.md).
        steps: Adam steps; each sees one batch of every task. By block so many for each.
        batch_size: inputs per task and step.
        lr_masks, lr_lambda: Adam step sizes of mask logits and of λ. `lr_masks: auto` is 0.01 for soft masks and 0.005 for
            binary ones.
        schedule: of the step sizes: `cosine` or `linear` down to zero, or `constant` (the papers').
        objective: what every task minimises: a name, or a mapping from names to weights.
        objectives: task -> its objective, instead of `objective`.
        self_label: settings of the objective `self-label`.
        learn_heads: learn each task's head, too, after masks and λ: towards its expert's predictions, kept if it then agrees
            with the expert more often on inputs held out. `auto`: where the task's objective compares with the expert.
        check_every: steps between two judgements, at which the state is saved, too; `auto` is 40, or two passes over the inputs
            of the task with the fewest where that is less, 5 at least.
        check_inputs: inputs per task that a judgement looks at, at most.
        keep: `best`: of the judged steps at which no task is behind its start, within the `tolerance`, the latest that is as near
            to the experts as any; the start if there is none. `last`: the last step, as in the papers.
        tolerance: how many standard errors a task's agreement may fall below the start's; with 0 it may not fall at all.

    Raises:
        RecipeError: from a mapping or a recipe, for an unknown setting or a value out of range.

    Example:
        settings = adarank.AdaptSettings(steps=100, objective={"self-label": 1.0, "entropy": 0.1}, tolerance=0)
        base, a, b = (torch.nn.Linear(8, 4) for _ in range(3))
        batches = {task: [torch.randn(16, 8)] for task in "ab"}
        adapted = adarank.adapt(base, {"a": a, "b": b}, batches, settings=settings)
    """

    by: Literal["model", "block"] = Field("model", description="what is learned at a time; a block needs less memory")
    steps: int = Field(150, ge=0, description="Adam steps; by block so many for each")
    batch_size: int = Field(16, ge=1, description="inputs per task and step")
    lr_masks: Annotated[float | Literal["auto"], BeforeValidator(_at_least_zero_or_auto)] = Field(
        AUTO, description="Adam step size of the mask logits; auto: 0.01 for soft masks, 0.005 for binary ones"
    )
    lr_lambda: float = Field(2e-2, ge=0, description="Adam step size of λ")
    schedule: Literal["constant", "cosine", "linear"] = Field("cosine", description="of all step sizes")
    objective: str | Weights = Field(
        "self-label", description=f"what is minimised: {_NAMES}; or name: weight of several"
    )
    objectives: dict[str, str | Weights] = Field({}, description="task: its own objective")
    self_label: SelfLabel = SelfLabel()
    learn_heads: bool | Literal["auto"] = Field(
        AUTO, description="learn heads on the merged body afterwards; auto: where the objective looks at the expert"
    )
    check_every: int | Literal["auto"] = Field(
        AUTO, description="steps between two judgements without labels; auto: 40, fewer where inputs are few"
    )
    check_inputs: int = Field(256, ge=1, description="inputs per task that a judgement looks at, at most")
    keep: Literal["best", "last"] = Field("best", description="which step's weights are written")
    tolerance: float = Field(
        1.0, ge=0, description="standard errors that a task's agreement may fall below the start's"
    )

    @field_validator("objective", mode="before")
    @classmethod
    def _objective(cls, given: Any) -> Any:
        return check_objective(given)

    @field_validator("objectives", mode="before")
    @classmethod
    def _objectives(cls, given: Any) -> Any:
        for task, objective in given.items() if isinstance(given, dict) else ():
            try:
                check_objective(objective)
            except ValueError as error:
                raise ValueError(f"task '{task}': {error}") from None
        return given

    @model_validator(mode="after")
    def _ranges(self) -> AdaptSettings:
        if self.check_every != AUTO and self.check_every < 1:
            raise ValueError(f"check_every: needs at least one step, or auto, got {self.check_every}")
        minimised = [self.objective, *self.objectives.values()]
        if self.self_label.layers and not any(NEED_FEATURES & as_weights(each) for each in minimised):
            raise ValueError(
                "self_label.layers: they are compared by the objective features. Add it, such as objective: {self-label: 1.0, features: 0.1}, or remove them"
            )
        return self

    def mask_step(self, soft: bool) -> float:
        """`lr_masks`, or what `auto` stands for."""
        if self.lr_masks == AUTO:
            return 0.01 if soft else 0.005
        return self.lr_masks

    def factor(self, step: int) -> float:
        """What step sizes are multiplied by at a step, counted from 0."""
        done = step / max(1, self.steps)
        return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[self.schedule]

    def interval(self, one_pass: int | None = None) -> int:
        """Steps between two judgements: `check_every`, or what `auto` stands for.

        Arguments:
            one_pass: steps after which the task with the fewest inputs has seen each of them; None if that is not known.
        """
        if self.check_every != AUTO:
            return self.check_every
        return EVERY if one_pass is None else min(EVERY, max(SHORTEST, PASSES * one_pass))

    def weights(self, task: str) -> Weights:
        """objective -> weight, for one task."""
        return as_weights(self.objectives.get(task, self.objective))
