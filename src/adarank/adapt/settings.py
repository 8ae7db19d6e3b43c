"""The settings of adaptation: what is minimised, how steps are taken, how they are judged, what is kept."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from adarank.adapt.agreement import Signal
from adarank.adapt.objectives import OBJECTIVES, Filter, SelfLabel, Weights, as_weights, check_objective
from adarank.settings import Settings

AUTO: Literal["auto"] = "auto"
StepUnit = Literal["weights", "mask"]
Precision = Literal["float32", "bfloat16"]
_NAMES = ", ".join(OBJECTIVES.built_in)


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
        lr_masks, lr_lambda: Adam step sizes of mask logits and of λ. `lr_masks: auto` is 0.01 where steps count in weights
            and 0.005 elsewhere.
        step_unit: for soft masks, what a step changes equally for all components of a matrix and task: the `weights`, in units
            of the root mean square of the singular values; or the `mask`, which changes weights less along small components.
        objective: what every task minimises: a name, or a mapping from names to weights.
        objectives: task -> its objective, instead of `objective`.
        self_label, filter: settings of the objectives `self-label` and `filtered-entropy`.
        top_logits: of generating models: how many logits of the expert are kept of each token that counts, the largest; all
            other tokens of the vocabulary are one more, with the probability that is left.
        learn_heads: learn each task's head, too, after masks and λ: towards its expert's predictions, kept if it then agrees
            with the expert more often on inputs held out. `auto`: where the task's objective compares with the expert.
        balance: κ: how much more a task's loss counts, the more it has risen since the start; 0 is the papers' sum.
        momentum: of the running mean prediction that `infomax` and `filtered-entropy` look at.
        schedule: `cosine` or `linear` down to zero, or `constant` (the papers').
        warmup: share of the steps over which step sizes first rise linearly.
        betas: Adam's decay rates.
        temperature: τ of a binary mask's sigmoid.
        logit: mask logits start at plus and minus this; a soft mask is 1 and 0 there, and linear.
        clamp: λ is used clamped to this range.
        precision: of the products with singular components while soft masks are learned. `bfloat16` is about three times as fast
            where the processor has units for it and matrices have a few hundred rows; it takes half as much memory again for components. What is
            written is composed in float32 in either.
        save_every: steps between two saves of the state.
        check_every: steps between two judgements; `auto` is 40, or two passes over the inputs of the task with the fewest
            where that is less, 5 at least.
        check_inputs: inputs per task that a judgement looks at, at most.
        keep: `best`: of the judged steps at which no task agrees less with its expert than at the start, within the
            `tolerance`, the one nearest to the experts; the start if there is none. `last`: the last step, as in the papers.
        signal: how nearness to the experts is measured. `agreement` is what `keep: best` promises, weighs tasks equally
            whatever their number of classes, and does not depend on how sure predictions are; `divergence` is finer.
        tolerance: how many standard errors a task's agreement may fall below the start's; with 0 it may not fall at all.
        patience: stop after so many judgements in a row that are no nearer to the experts; `keep: last` takes all steps.
        repair: rounds of further steps, each of a quarter of `check_every` (at least 5 steps, but no more than
            `check_every`). They start at the latest judged step that is as near to the experts as any, if it leaves some
            task behind its start; tasks left behind count most.
        retreat: points of the line search towards the start, if the repair fails: on the lines from the start to that step and
            to the end of the repair. 4 are 0.8, 0.6, 0.4 and 0.2 of the way; the first that leaves no task behind ends it.

    Raises:
        RecipeError: from a mapping or a recipe, for an unknown setting or a value out of range.

    Example:
        settings = adarank.AdaptSettings(steps=100, objective={"self-label": 1.0, "entropy": 0.1}, tolerance=0)
        base, a, b = (torch.nn.Linear(8, 4) for _ in range(3))
        batches = {task: [torch.randn(16, 8)] for task in "ab"}
        adapted = adarank.adapt(base, {"a": a, "b": b}, batches, settings=settings)
    """

    by: Literal["model", "block"] = Field("model", description="what is learned at a time; a block needs less memory")
    steps: int = Field(200, ge=0, description="Adam steps; by block so many for each")
    batch_size: int = Field(8, ge=1, description="inputs per task and step")
    lr_masks: Annotated[float | Literal["auto"], BeforeValidator(_at_least_zero_or_auto)] = Field(
        AUTO, description="Adam step size of the mask logits; auto: 0.01 where steps count in weights, 0.005 elsewhere"
    )
    step_unit: StepUnit = Field("weights", description="for soft masks: what a step changes equally for all components")
    lr_lambda: float = Field(2e-2, ge=0, description="Adam step size of λ")
    objective: str | Weights = Field(
        "self-label", description=f"what is minimised: {_NAMES}; or name: weight of several"
    )
    objectives: dict[str, str | Weights] = Field({}, description="task: its own objective")
    self_label: SelfLabel = SelfLabel()
    filter: Filter = Filter()
    top_logits: int = Field(
        64, ge=1, description="of generating models: logits of the expert that are kept of each token, the largest"
    )
    learn_heads: bool | Literal["auto"] = Field(
        AUTO, description="learn heads on the merged body afterwards; auto: where the objective looks at the expert"
    )
    balance: float = Field(
        4.0, ge=0, description="κ: how much more tasks count whose loss has risen; 0 is the papers' sum"
    )
    momentum: float = Field(
        0.9, ge=0, lt=1, description="of the running mean prediction of infomax and filtered-entropy"
    )
    schedule: Literal["constant", "cosine", "linear"] = Field("cosine", description="of all step sizes")
    warmup: float = Field(0.0, ge=0, le=1, description="share of the steps over which step sizes first rise linearly")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Adam's decay rates")
    temperature: float = Field(10.0, gt=0, description="τ of a binary mask's sigmoid")
    logit: float = Field(0.1, gt=0, description="mask logits start at ±this")
    clamp: tuple[float, float] | None = Field(None, description="range in which λ is used")
    precision: Precision = Field(
        "float32", description="of the products with singular components while soft masks are learned"
    )
    save_every: int = Field(25, ge=1, description="steps between two saves of the state")
    check_every: int | Literal["auto"] = Field(
        AUTO, description="steps between two judgements without labels; auto: 40, fewer where inputs are few"
    )
    check_inputs: int = Field(256, ge=1, description="inputs per task that a judgement looks at, at most")
    keep: Literal["best", "last"] = Field("best", description="which step's weights are written")
    signal: Signal = Field("agreement", description="how nearness to the experts is measured")
    tolerance: float = Field(
        1.0, ge=0, description="standard errors that a task's agreement may fall below the start's"
    )
    patience: int | None = Field(
        5, ge=1, description="stop after so many judgements in a row that are no nearer to the experts; null: never"
    )
    repair: int = Field(
        8, ge=0, description="rounds of further steps, if the nearest step leaves some task behind its start"
    )
    retreat: int = Field(
        4, ge=0, description="points of the line search towards the start that are judged, if the repair fails"
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
        if self.clamp is not None and self.clamp[0] > self.clamp[1]:
            raise ValueError(f"clamp: {self.clamp[0]} is above {self.clamp[1]}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: both must be in [0, 1), got {self.betas}")
        return self

    def mask_step(self, in_weights: bool) -> float:
        """`lr_masks`, or what `auto` stands for."""
        if self.lr_masks == AUTO:
            return 0.01 if in_weights else 0.005
        return self.lr_masks

    def factor(self, step: int) -> float:
        """What step sizes are multiplied by at a step, counted from 0."""
        rise = round(self.warmup * self.steps)
        if step < rise:
            return (step + 1) / rise
        done, whole = step - rise, max(1, self.steps - rise)
        falls = {"constant": 1.0, "linear": 1 - done / whole, "cosine": 0.5 * (1 + math.cos(math.pi * done / whole))}
        return falls[self.schedule]

    def weights(self, task: str) -> Weights:
        """objective -> weight, for one task."""
        return as_weights(self.objectives.get(task, self.objective))
