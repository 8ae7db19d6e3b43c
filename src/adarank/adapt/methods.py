"""The adaptive methods: a start and two switches over one engine.

adamerging     λ only, task vectors about the base       W = W₀ + Σ_t λ_t τ_t
adamerging++   λ only, on what TIES leaves of them       W = W₀ + Σ_t λ_t τ̂_t
cart++         λ only, on CART                           W = W̄ + Σ_t λ_t SVD_k(W_t - W̄)
adarank        λ and masks, about either origin          W = W_o + Σ_t λ_t U_t diag(b_t∘s_t) V_tᵀ

Every tensor, layer or task has its λ, or the model has one (`lambda_per`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from adarank.adapt.base import Adapting
from adarank.adapt.factor_files import FactorFiles, Holding, has_room
from adarank.adapt.learner import LiveLearner
from adarank.adapt.live_weights import Learn, LiveWeights, Precision
from adarank.adapt.parameters import Number, OriginSetting, Share, block_problems, known_basis, with_its_origin
from adarank.adapt.presets import with_preset
from adarank.adapt.settings import AdaptSettings
from adarank.adapt.start_search import AUTO, Grid, grid_of
from adarank.adapt.tying import LambdaPer
from adarank.alignment.task_vectors import AlignedCheckpoints, OriginKind
from adarank.errors import RecipeError, itemise
from adarank.method import Context, Given, Outline, Result
from adarank.models import TaskModels
from adarank.sparsify.threshold import global_thresholds
from adarank.spectral.bases import BASES, Basis
from adarank.spectral.blocks import Blocks, build_blocks, factor_numbers
from adarank.spectral.masks import First, MaskKind

A = TypeVar("A", bound="AdaptiveMethod")


class AdaptiveMethod(Adapting):
    """Where adaptation starts and what it learns. What it minimises on unlabelled inputs is a setting of the loop.

    Class attributes:
        formula: ℓ stands for the loop's `objective`: entropy in the papers.
        joint_heads: heads are learned by the same steps.
        by_predictions: where a block is learned at a time and no head is, the last is learned towards the experts' predictions.

    Arguments:
        origin: what task vectors are counted from: `pretrained` (the base), `average` (the experts' mean), or `auto`: the one
            that agrees with the experts more often on unlabelled inputs.
        rank: share of singular components kept at the start, in (0, 1]; `auto`: searched for without labels.
        scale: λ at the start, for every task and tensor; `auto`: searched for without labels.
        lambda_per: what has its λ: every `tensor` of every task (what the papers call layer-wise); every
            `layer` of every task, as tensors' names number them; every layer for all tasks together (`shared-layer`, which
            is how AdaRank's Equation 5 is printed); every `task`; or only the `model`.
        clamp: range in which λ is used, such as AdaMerging's [0, 1]; none by default.
        learn_masks, learn_lambda: the two switches.
    """

    fixed: ClassVar[frozenset[str]] = frozenset({"learn_masks"})
    python: ClassVar[tuple[str, str]] = ("adapt", "adapts on data. Use adarank.adapt.")
    joint_heads: ClassVar[bool] = False
    by_predictions: ClassVar[bool] = True

    origin: OriginSetting = Field("pretrained", description="what task vectors are counted from")
    rank: Share = Field(1.0, description="share of components kept at the start, in (0, 1], or auto")
    scale: Number = Field(0.3, alias="lambda", description="λ at the start, or auto")
    lambda_per: LambdaPer = Field("tensor", description="what has a λ of its own, of each task or of all")
    clamp: tuple[float, float] | None = Field(None, description="range in which λ is used")
    learn_masks: bool = Field(True, description="learn the masks")
    learn_lambda: bool = Field(True, description="learn λ")

    @model_validator(mode="after")
    def _range(self: A) -> A:
        if self.clamp is not None and self.clamp[0] > self.clamp[1]:
            raise ValueError(f"clamp: {self.clamp[0]} is above {self.clamp[1]}")
        if self.origin == AUTO and (self.rank, self.scale) != (AUTO, AUTO):
            raise ValueError("origin: a rank and λ are of one origin: name it, or leave rank and lambda auto, too")
        return self

    @classmethod
    def paper(cls, given: Mapping[str, Any], text: bool = False) -> dict[str, Any]:
        """What the method's paper starts from, beside the settings given: every setting, so that no preset depends on a default.

        Arguments:
            given: what a recipe says itself.
            text: the tasks are of texts.
        """
        return {
            "origin": "pretrained", "rank": 1.0, "lambda": 0.3, "lambda_per": "tensor", "clamp": None,
            "learn_masks": True, "learn_lambda": True,
        }  # fmt: skip

    @classmethod
    def paper_loop(cls, text: bool) -> dict[str, Any]:
        """What `preset: paper` has of the method's loop beside what all papers have, on images or on texts."""
        return {}

    @property
    def spectra(self) -> bool:
        """False if every component stays kept, so that nothing needs decomposing."""
        return self.learn_masks or self.rank != 1

    @property
    def grid(self) -> Grid:
        """The starts that are left open. The climb begins at what the papers use about either origin."""
        return grid_of(self.rank, self.scale, (1.0, 0.3) if self.origin == "pretrained" else (0.08, 1.0))

    @property
    def planned_origin(self) -> OriginKind:
        """The origin, or while it is open the one that takes more memory."""
        return "average" if self.origin == "auto" else self.origin

    @classmethod
    def resolve(cls: type[A], given: Given) -> A:
        """The method with its settings and those of its loop: the preset's, then those that are given.

        Raises:
            RecipeError: an unknown preset, or settings that do not fit.
        """
        method, settings = with_preset(cls, cls.seeded(given), given.adapt or {}, given.preset, given.text)
        problems = method.check_adapt(settings, given.adapt or {})
        if problems:
            raise RecipeError(problems[0] if len(problems) == 1 else itemise("The adapt block does not fit:", problems))
        return method.with_settings(settings)

    def check_adapt(self, settings: AdaptSettings, given: Mapping[str, Any]) -> list[str]:
        """What in the `adapt` block means nothing to the method, or where a block is learned at a time; in sentences.

        Arguments:
            settings: the loop's, all.
            given: those that were given.
        """
        problems = [
            f"adapt.{key}: means nothing to '{self.name}'. Remove it." for key in sorted(self.unused & given.keys())
        ]
        if settings.by == "block":
            problems += block_problems(self.lambda_per, given.keys() - self.unused)
        return problems

    def on(self, live: LiveLearner, models: TaskModels) -> LiveLearner:
        """What is learned on the tasks' networks, where that is more than the merged weights."""
        return live

    def over(self: A, given: Given) -> A:
        """The method resolved anew: where the models are open it is known whether the tasks are of texts."""
        return type(self).resolve(given) if given.preset else self

    @classmethod
    def seeded(cls, given: Given) -> dict[str, Any]:
        """The settings given, with the recipe's seed where the method draws and none is given."""
        drawn = given.seed is not None and "seed" in cls.model_fields
        return {**({"seed": given.seed} if drawn else {}), **given.parameters}

    def shares_work(self) -> bool:
        """Several processes adapt together: each takes some tasks' batches and some matrices' factors."""
        return True

    @classmethod
    def memory(cls) -> str:
        """What is held at a time: all merged tensors, since networks are run."""
        parts = "spectra" if cls().spectra else "task vectors"
        return f"all merged tensors, their origins and gradients, their experts' {parts}, and one task's batch"

    @property
    def decomposes(self) -> bool:
        """Whether it decomposes matrices, as `spectra` says."""
        return self.spectra

    def held_bytes(self, outline: Outline) -> int:
        """Live weights, origins, gradients and factors of every merged tensor, what is kept, heads; see `factor_files`."""
        return Holding(self, outline).total()

    def factors_in_files(self, outline: Outline) -> bool:
        """Whether the outline's budget has no room for the factors."""
        return Holding(self, outline).in_files()

    def smaller(self, outline: Outline) -> dict[str, int]:
        """A block at a time, where it holds less."""
        if self.settings.by == "block" or block_problems(self.lambda_per, ()):
            return {}
        by_block = self.with_settings(self.settings.model_copy(update={"by": "block"})).held_bytes(outline)
        return {"adapt: {by: block}": by_block} if by_block < self.held_bytes(outline) else {}

    def stored_numbers(self, network: AlignedCheckpoints, name: str) -> int:
        """Numbers that all tasks' parts of a tensor take: factors, or task vectors."""
        whole = len(network.tasks) * network.tensors[name].numel
        if not (self.spectra and network.choices[name].action == "decompose"):
            return whole
        return factor_numbers(network, name, self.planned_origin) + whole * self.takes_wholes

    @property
    def takes_wholes(self) -> bool:
        """Whether whole task vectors of decomposed tensors are held too: binary masks that keep most components take away from them."""
        return not self.soft and max(self.grid.ranks) > 0.5

    @property
    def soft(self) -> bool:
        """Whether masks are any numbers; else components are kept or not."""
        return False

    def run(self, context: Context) -> Result:
        """Adapt, from a saved state if there is one. Reads no label."""
        return context.adapted(self)

    def decomposition(self, network: AlignedCheckpoints, device: torch.device | str) -> Basis:
        """How task vectors are decomposed into blocks. May read every tensor, one at a time."""
        return BASES["task_vectors"]

    def learn(self) -> Learn:
        """What is learned, and how its gradient is taken."""
        return Learn(self.learn_masks, self.learn_lambda, clamp=self.clamp, per=self.lambda_per)

    def start(
        self,
        network: AlignedCheckpoints,
        shared: Mapping[str, Tensor],
        settings: AdaptSettings,
        device: torch.device | str,
        factors: Path | None = None,
    ) -> LiveLearner:
        """The live weights at the method's start, over the parameters that the networks share.

        Arguments:
            factors: folder from whose files factors are mapped; None to hold them.
        """
        basis, whole = self.decomposition(network, device), has_room(self, network, device)
        files = FactorFiles(factors, self.takes_wholes) if factors else None
        blocks = build_blocks(network, self.planned_origin, device, self.spectra, basis, kept=files, whole=whole)
        return self.live({name: shared[name] for name in network.merged()}, blocks, settings, basis)

    def live(
        self, parameters: Mapping[str, Tensor], blocks: Mapping[str, Blocks], settings: AdaptSettings, basis: Basis
    ) -> LiveLearner:
        """The live weights of some tensors at the method's start."""
        rank, scale = self.grid.ranks[self.grid.first[0]], self.grid.scales[self.grid.first[1]]
        return LiveWeights(parameters, blocks, self.learn(), scale, rank, basis=basis)


class AdaRank(AdaptiveMethod):
    """Learns which singular components to keep, and λ, by test-time adaptation.

    Arguments:
        basis: what is decomposed into components. The bases of TSV-M, Iso-C and Iso-CTS are about the base, and start with
            all components, as their static methods do.
        returnable: components that are pruned at the start may come back. If not, adaptation chooses among the top
            ones that are kept there (the paper's ablation).
        first: which components the start keeps: the `top` ones of each matrix and task, or `random` ones, as many: a control
            that tells what their choice is worth. With `learn_masks: false` they stay.
        seed: of random ones; by default the recipe's.
        mask: `soft`: what a component is multiplied by is learned, from 1 where it is kept at the start and 0 where not.
            `binary`: whether it is kept, as in the paper.
        precision: of the products with singular components while soft masks are learned. `bfloat16` takes about half of the
            time where the processor has units for it, and memory for half as many components more. Written is float32.
    """

    name: ClassVar[str] = "adarank"
    formula: ClassVar[str] = (
        "W = W_o + Σ_t λ_t U_t diag(b_t∘s_t) V_tᵀ; b, λ = argmin Σ_t ℓ(f(W, x_t)), b binary or soft"
    )
    source: ClassVar[str] = "Lee et al. 2025, arXiv:2503.22178"

    fixed: ClassVar[frozenset[str]] = frozenset()

    basis: Annotated[str, AfterValidator(known_basis)] = Field(
        "task_vectors", description="what the components are of", json_schema_extra={"choices": list(BASES.built_in)}
    )
    origin: OriginSetting = Field(AUTO, description="what task vectors are counted from, or auto")
    rank: Share = Field(AUTO, description="share of components kept at the start, in (0, 1], or auto")
    scale: Number = Field(AUTO, alias="lambda", description="λ at the start, or auto")
    returnable: bool = Field(True, description="components pruned at the start may come back")
    first: First = Field("top", description="which components the start keeps: the top ones, or random ones, as many")
    seed: int = Field(0, description="of random ones; by default the recipe's seed")
    mask: MaskKind = Field("soft", description="any number for each component, or binary: kept or not, the paper's")
    precision: Precision = Field("float32", description="of products with components while soft masks are learned")

    @classmethod
    def paper(cls, given: Mapping[str, Any], text: bool = False) -> dict[str, Any]:
        """The static method of that basis or origin at its own settings; about the average ViT-B/32's, on texts RoBERTa's."""
        learned = {
            **super().paper(given, text), "basis": "task_vectors", "returnable": True, "mask": "binary", "first": "top",
            "seed": 0, "precision": "float32",
        }  # fmt: skip
        if given.get("basis", "task_vectors") != "task_vectors":
            return {**learned, "lambda": 1.0}
        if given.get("origin") == "pretrained":
            return learned
        start = {"rank": 0.04, "lambda": 1.6} if text else {"rank": 0.16, "lambda": 2.3}
        return {**learned, "origin": "average", **start}

    @classmethod
    def paper_loop(cls, text: bool) -> dict[str, Any]:
        """Step size and batch size of Appendix A, and as many steps as the released files have. Where these have another step
        size, 1e-4 of RoBERTa about the average, they are the presets named after them."""
        return {"steps": 5_000, "batch_size": 8, "lr_masks": 5e-5, "lr_lambda": 5e-5} if text else {"steps": 10_000}

    @classmethod
    def decomposes_kernels(cls, given: Given) -> bool:
        """Where masks are learned, but not with a preset: those of the papers decompose matrices alone."""
        return given.preset is None and given.parameters.get("learn_masks") is not False

    @model_validator(mode="before")
    @classmethod
    def _start_of_basis(cls, values: Any) -> Any:
        return with_its_origin(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _about_the_base(self) -> AdaRank:
        if self.basis != "task_vectors" and self.origin != "pretrained":
            raise ValueError(f"basis: '{self.basis}' is about the base; origin must be pretrained, got {self.origin}")
        return self

    @property
    def grid(self) -> Grid:
        """The starts that are left open; with a basis of another method the climb begins at that method's settings."""
        return grid_of(self.rank, self.scale, (1.0, 1.0)) if self.basis != "task_vectors" else super().grid

    @property
    def spectra(self) -> bool:
        """False if nothing needs decomposing; bases of other methods always do."""
        return super().spectra or self.basis != "task_vectors"

    @property
    def soft(self) -> bool:
        """Whether soft masks are learned."""
        return self.mask == "soft" and self.learn_masks

    def decomposition(self, network: AlignedCheckpoints, device: torch.device | str) -> Basis:
        """The basis that the settings name."""
        return BASES[self.basis]

    def learn(self) -> Learn:
        """What is learned: also which kind of mask, and whether pruned components may come back."""
        return replace(
            super().learn(), returnable=self.returnable, mask=self.mask, first=self.first, seed=self.seed, precision=self.precision
        )  # fmt: skip


class AdaMerging(AdaptiveMethod):
    """Learns λ per task and tensor about the base (layer-wise AdaMerging), or per task (task-wise)."""

    name: ClassVar[str] = "adamerging"
    formula: ClassVar[str] = "W = W₀ + Σ_t λ_t τ_t; λ = argmin Σ_t ℓ(f(W, x_t))"
    source: ClassVar[str] = "Yang et al. 2024, arXiv:2310.02575"

    learn_masks: Literal[False] = Field(False, description="learn the masks")

    @classmethod
    def paper(cls, given: Mapping[str, Any], text: bool = False) -> dict[str, Any]:
        """λ 0.3 about the base, without masks."""
        return {**super().paper(given, text), "learn_masks": False}


class AdaMergingPP(AdaMerging):
    """Learns λ per task and tensor, or per task, on what TIES leaves of each task vector (AdaMerging++).

    Arguments:
        density: share of the model's entries that are kept of each task vector before signs are elected.
    """

    name: ClassVar[str] = "adamerging++"
    formula: ClassVar[str] = (
        "W = W₀ + Σ_t λ_t a_t∘s_t; s_t = top_density(τ_t) of the model, a_t = [sign(s_t) = sign(Σ s)]; λ = argmin Σ_t ℓ(f(W, x_t))"
    )

    density: float = Field(0.2, gt=0, le=1, description="share of the model's entries kept")

    @classmethod
    def paper(cls, given: Mapping[str, Any], text: bool = False) -> dict[str, Any]:
        """As AdaMerging's, with the entries that TIES keeps."""
        return {**super().paper(given, text), "density": 0.2}

    def decomposition(self, network: AlignedCheckpoints, device: torch.device | str) -> Basis:
        """Task vectors above the magnitudes that leave `density` of the model's entries. Reads every tensor, one at a time."""
        thresholds = global_thresholds(network, self.planned_origin, self.density, device)
        return replace(BASES["task_vectors"], thresholds=thresholds)


class CARTpp(AdaptiveMethod):
    """Learns λ per task and tensor on CART's rank-reduced, centred task vectors (CART++, also CART+AdaMerging)."""

    name: ClassVar[str] = "cart++"
    formula: ClassVar[str] = "W = W̄ + Σ_t λ_t SVD_k(W_t - W̄); λ = argmin Σ_t ℓ(f(W, x_t))"
    source: ClassVar[str] = "Choi et al. 2024, arXiv:2412.12153, Eq. 6"

    origin: OriginSetting = Field("average", description="what task vectors are counted from")
    rank: Share = Field(0.08, description="share of components kept, in (0, 1], or auto")
    scale: Number = Field(1.0, alias="lambda", description="λ at the start, or auto")
    learn_masks: Literal[False] = Field(False, description="learn the masks")

    @classmethod
    def paper(cls, given: Mapping[str, Any], text: bool = False) -> dict[str, Any]:
        """The best rank of CART's paper (Fig. 5), with the experts' full deviations from their mean."""
        return {**super().paper(given, text), "origin": "average", "rank": 0.08, "lambda": 1.0, "learn_masks": False}


ADAPTIVE: dict[str, type[AdaptiveMethod]] = {m.name: m for m in (AdaRank, AdaMerging, AdaMergingPP, CARTpp)}
