"""Consensus Task Arithmetic: the summed task vector, where enough tasks find it useful.

    τ = Σ_t τ_t
    m_t = [|τ_t| ≥ α_t · |τ - τ_t|]                 TALL mask of task t
    merged = base + λ · τ ∘ [Σ_t m_t ≥ k]

Wang et al., "Localizing Task Information for Improved Model Merging and Compression", arXiv:2405.07813. They choose α_t
(λ_t there) from 0.2, 0.3, … 0.6 for each task, and λ, on validation data.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adarank.methods.base import (
    AlignedCheckpoints,
    Deltas,
    Method,
    OriginKind,
    PerTensor,
    RecipeError,
    rest,
    weighted_sum,
)


class Consensus(Method):
    """Base of the consensus methods: of a merged task vector, what enough tasks find useful.

    Arguments:
        tall: α_t, per model. The larger, the fewer entries a task claims.
        agree: k, how many tasks must claim an entry. With 0 none is left out.
    """

    per_model: ClassVar[tuple[str, ...]] = ("tall",)

    tall: PerTensor = Field(rest(0.4), ge=0, description="α_t; per model: a number, a list over the layers, or filters")
    agree: int = Field(2, ge=0, description="k, tasks that must claim an entry")

    def useful(self, name: str, total: Tensor, deltas: Deltas) -> Tensor:
        """Mask of the entries of `total` that at least `agree` tasks claim by |τ_t| ≥ α_t·|total - τ_t|."""
        claims = torch.zeros(total.shape, dtype=torch.int16, device=total.device)
        for task in deltas:
            claims += margin(total, deltas[task], self.tall.of(task, name)) >= 0
        return claims >= self.agree

    def check(self, network: AlignedCheckpoints) -> None:
        """Raise a sentence if the settings do not fit these models."""
        if self.agree > len(network.experts):  # it would return the base
            raise RecipeError(
                f"{self.name}: agree must be at most the number of experts, {len(network.experts)}, got {self.agree}. Lower it."
            )


class ConsensusTA(Consensus):
    """Task Arithmetic without the entries that matter to fewer than k tasks.

    Arguments:
        scale: λ, multiplies the summed task vectors.
    """

    name: ClassVar[str] = "consensus_ta"
    origin: ClassVar[OriginKind] = "pretrained"
    formula: ClassVar[str] = "W = W₀ + λ τ∘[Σ_t m_t ≥ k]; τ = Σ_t τ_t, m_t = [|τ_t| ≥ α_t |τ - τ_t|]"
    source: ClassVar[str] = "Wang et al. 2024, arXiv:2405.07813"

    elementwise: ClassVar[bool] = True
    scale: float = Field(0.3, alias="lambda", description="λ")

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        total = weighted_sum(torch.zeros_like(origin), deltas, lambda task: 1.0)
        return origin + self.scale * total * self.useful(name, total, deltas)

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return 7


def margin(total: Tensor, delta: Tensor, tall: float) -> Tensor:
    """|τ_t| - α_t·|total - τ_t|: by how much an entry is the task's rather than the others'."""
    return delta.abs() - tall * (total - delta).abs()
