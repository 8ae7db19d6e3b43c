"""Adaptive methods that are distillation: what they minimise compares with the experts alone.

prodistill   a coefficient for every entry, a block at a time       W = W₀ + Σ_t α_t ∘ τ_t
symerge      λ and each task's head, by labels of the experts       W = W₀ + Σ_t λ_t τ_t, h_t
samerging    λ, by the experts' predictions, in flat minima         W = W₀ + Σ_t λ_t τ_t
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from adarank.adapt.element_weights import ElementWeights
from adarank.adapt.joint_heads import WithHeads
from adarank.adapt.learner import LiveLearner
from adarank.adapt.live_weights import Learn
from adarank.adapt.methods import AdaMerging, AdaptiveMethod
from adarank.adapt.parameters import Number
from adarank.adapt.settings import AdaptSettings
from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.models import TaskModels
from adarank.spectral.bases import Basis
from adarank.spectral.blocks import Blocks

_OF_MASKS = frozenset({"lr_masks"})
_OF_PREDICTIONS = frozenset({"objective", "objectives", "self_label"})
_MOMENTS = 5  # of each entry of a task vector: itself, its coefficient, that one's gradient and Adam's two moments


class ProDistill(AdaptiveMethod):
    """Learns a coefficient for every entry of every task vector, a block at a time, towards the experts' blocks.

    What is outside of the blocks is merged by Task Arithmetic with `lambda`. One coefficient per tensor, learned so, is
    `adamerging` with `by: block`. There each task's distance counts relative to its start's, here too; in the paper they add up.
    """

    name: ClassVar[str] = "prodistill"
    formula: ClassVar[str] = (
        "W = W₀ + Σ_t α_t∘τ_t; α = argmin Σ_t ‖block(α; z_t) - block_t(e_t)‖², block after block; z: merged stream, e: the expert's"
    )
    source: ClassVar[str] = "Xu, Li, Zhang 2025, arXiv:2502.12706"
    fixed: ClassVar[frozenset[str]] = frozenset({"learn_masks", "learn_lambda", "rank", "lambda_per", "clamp"})
    unused: ClassVar[frozenset[str]] = _OF_MASKS | _OF_PREDICTIONS
    by_predictions: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Any]] = {"by": "block", "lr_lambda": 0.01}

    learn_masks: Literal[False] = Field(False, description="learn the masks")

    def shares_work(self) -> bool:
        """No: coefficients are as large as all task vectors, and a state holds them all."""
        return False

    @model_validator(mode="after")
    def _every_entry(self) -> ProDistill:
        if self.rank != 1 or self.lambda_per != "tensor" or self.clamp is not None or not self.learn_lambda:
            raise ValueError("every entry has its coefficient: leave out rank, lambda_per, clamp and learn_lambda")
        return self

    @classmethod
    def paper(cls, given: Mapping[str, Any], text: bool = False) -> dict[str, Any]:
        """λ 0.3 about the base."""
        return {**super().paper(given, text), "learn_masks": False}

    @classmethod
    def paper_loop(cls, text: bool) -> dict[str, Any]:
        """64 inputs a task, all in each of 100 steps."""
        return {"by": "block", "lr_lambda": 0.01, "batch_size": 64, "steps": 100}

    @classmethod
    def memory(cls) -> str:
        """What is held at a time."""
        return (
            "one network; of one block the task vectors, their coefficients, these ones' gradients and Adam's moments"
        )

    def check_adapt(self, settings: AdaptSettings, given: Mapping[str, Any]) -> list[str]:
        """Also refuses `by: model`."""
        whole = [f"adapt.by: '{self.name}' learns a block at a time. Leave it out."] if settings.by == "model" else []
        return whole + super().check_adapt(settings, given)

    def live(
        self, parameters: Mapping[str, Tensor], blocks: Mapping[str, Blocks], settings: AdaptSettings, basis: Basis
    ) -> LiveLearner:
        """Coefficients of some tensors at the method's start."""
        return ElementWeights(parameters, blocks, self.grid.scales[self.grid.first[1]])

    def stored_numbers(self, network: AlignedCheckpoints, name: str) -> int:
        """Task vectors, coefficients, gradients and moments."""
        return _MOMENTS * len(network.tasks) * network.tensors[name].numel


class SyMerge(AdaMerging):
    """Learns λ per task and tensor together with each task's head, by the labels that the experts give.

    Inputs count where merged model and expert give the same class, or the expert is surer of its own. A step is one of Adam's
    for all tasks together; the authors' takes one for each task in turn.

    Arguments:
        lr_heads: Adam step size of the heads.
    """

    name: ClassVar[str] = "symerge"
    formula: ClassVar[str] = (
        "W = W₀ + Σ_t λ_t τ_t, h_t; λ, h = argmin Σ_t mean -log p(ŷ_t(x)|x) over x with ŷ = ŷ_t or max p_t ≥ max p"
    )
    source: ClassVar[str] = "Jung et al. 2024, arXiv:2412.19098"
    unused: ClassVar[frozenset[str]] = _OF_MASKS | {"learn_heads"}
    defaults: ClassVar[Mapping[str, Any]] = {"objective": "trusted-label", "lr_lambda": 0.01, "learn_heads": False}
    joint_heads: ClassVar[bool] = True

    clamp: tuple[float, float] | None = Field((0.0, 1.0), description="range in which λ is used")
    lr_heads: float = Field(0.01, ge=0, description="Adam step size of the heads")

    def shares_work(self) -> bool:
        """No: heads are learned by the process that has their tasks."""
        return False

    @classmethod
    def paper(cls, given: Mapping[str, Any], text: bool = False) -> dict[str, Any]:
        """λ 0.3 about the base; heads by the same steps."""
        return {**super().paper(given, text), "clamp": (0.0, 1.0), "lr_heads": 0.01}

    @classmethod
    def paper_loop(cls, text: bool) -> dict[str, Any]:
        """500 steps of 32 inputs a task."""
        return {"objective": "trusted-label", "lr_lambda": 0.01, "batch_size": 32, "steps": 500}

    def check_adapt(self, settings: AdaptSettings, given: Mapping[str, Any]) -> list[str]:
        """Also refuses `by: block`."""
        if settings.by == "block":
            return [f"adapt.by: '{self.name}' learns heads by predictions, through the whole network. Use by: model."]
        return super().check_adapt(settings, given)

    def on(self, live: LiveLearner, models: TaskModels) -> LiveLearner:
        """The live weights with the heads of the tasks' networks."""
        return WithHeads(live, models.heads, self.lr_heads)


class SAMerging(AdaMerging):
    """Learns λ per task and tensor by the experts' predictions, with sharpness-aware steps.

    The gradient is taken at λ + ε, ε = ρ λ² ∘ g / ‖ |λ| ∘ g ‖, g being the gradient at λ (adaptive SAM).

    Arguments:
        sam: ρ.
    """

    name: ClassVar[str] = "samerging"
    formula: ClassVar[str] = "W = W₀ + Σ_t λ_t τ_t; λ = argmin max_(‖ε/λ‖ ≤ ρ) Σ_t KL(expert_t(x) ‖ f(W(λ + ε), x))"
    source: ClassVar[str] = "arXiv:2512.21288; adaptive SAM: Kwon et al. 2021, arXiv:2102.11600"
    unused: ClassVar[frozenset[str]] = _OF_MASKS
    defaults: ClassVar[Mapping[str, Any]] = {"self_label": {"temperature": 2.0}}

    scale: Number = Field(0.0, alias="lambda", description="λ at the start, or auto")
    sam: float = Field(0.07, ge=0, description="ρ, how far uphill the gradient is taken; 0: at λ itself")

    @classmethod
    def paper(cls, given: Mapping[str, Any], text: bool = False) -> dict[str, Any]:
        """λ 0 about the base."""
        return {**super().paper(given, text), "lambda": 0.0, "sam": 0.07}

    @classmethod
    def paper_loop(cls, text: bool) -> dict[str, Any]:
        """100 batches of 16 inputs a task, ten times."""
        labels = {"objective": "self-label", "self_label": {"temperature": 2.0}}
        return {**labels, "batch_size": 16, "steps": 1000, "lr_lambda": 1e-3}

    def learn(self) -> Learn:
        """What is learned, and how far uphill its gradient is taken."""
        return replace(super().learn(), sam=self.sam)


DISTILLED: dict[str, type[AdaptiveMethod]] = {m.name: m for m in (ProDistill, SyMerge, SAMerging)}
