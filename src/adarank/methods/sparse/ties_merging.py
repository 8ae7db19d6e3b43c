"""TIES-Merging as in the paper: trim over the whole model, elect signs, add or average what agrees.

    s_t = τ_t where |τ_t| ≥ θ_t, else 0           θ_t: the ⌊density · d⌋-th largest |τ_t| of the model's d entries
    γ = sign(Σ_t s_t)
    merged = base + λ · Σ_t [sign(s_t) = γ] s_t                            sum
    merged = base + λ · Σ_t [sign(s_t) = γ] s_t / Σ_t [sign(s_t) = γ]      mean

θ_t is exact. All entries equal to θ_t are kept, so that neither their order nor that of the tensors matters. Where the
s_t cancel exactly, γ is 0 and nothing is added. (The authors' code keeps one entry more than the formula, and takes the
model's overall majority of signs where they cancel.) `d` counts the tensors that the recipe merges.

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", arXiv:2306.01708, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from adarank.methods.base import AlignedCheckpoints, Deltas, Method, OriginKind
from adarank.sparsify.sign_election import Election
from adarank.sparsify.threshold import global_thresholds, trimmed


class TiesMerging(Method):
    """Trim by magnitude over the whole model, elect signs, sum or mean of what agrees (the paper's TIES).

    Arguments:
        density: share of the model's entries that are kept of each task vector.
        combine: `sum`, as AdaMerging and most benchmarks use it, or `mean`, as the paper.
        scale: λ. If not given: 0.3 for `sum`, 1 for `mean`.
    """

    name: ClassVar[str] = "ties_merging"
    origin: ClassVar[OriginKind] = "pretrained"
    formula: ClassVar[str] = (
        "W = W₀ + λ Σ_t a_t∘s_t (/ Σ_t a_t); s_t = top_density(τ_t) of the model, a_t = [sign(s_t) = sign(Σ s)]"
    )
    source: ClassVar[str] = "Yadav et al. 2023, arXiv:2306.01708"
    elementwise: ClassVar[bool] = True
    passes: ClassVar[int] = 3

    density: float = Field(0.2, gt=0, le=1, description="share of the model's entries kept")
    combine: Literal["sum", "mean"] = Field("sum", description="of the entries that agree")
    scale: float | None = Field(None, alias="lambda", description="λ: 0.3 for sum, 1 for mean")
    _thresholds: Mapping[str, float] = PrivateAttr(default_factory=dict)

    def prepare(self, network: AlignedCheckpoints, device: torch.device | str) -> TiesMerging:
        """A copy of the method that knows what it needs of the whole model."""
        prepared = self.model_copy()
        change = None if self.by_entry else self.changed
        prepared._thresholds = global_thresholds(network, "pretrained", self.density, device, change)
        return prepared

    def changed(self, task: str, name: str, delta: Tensor) -> Tensor:
        """The task vector that is trimmed: here as it is."""
        return delta

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        default = 0.3 if self.combine == "sum" else 1.0
        return origin + (default if self.scale is None else self.scale) * self.elected(name, origin, deltas)

    def elected(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """The merged task vector before λ."""
        election = Election(origin, zero_is_positive=False)
        for task in deltas:
            election.add(trimmed(self.changed(task, name, deltas[task]), self._thresholds[task]))
        total, voters = election.result()
        return total if self.combine == "sum" else total / voters.clamp(min=1)

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return 10  # an election's five sums, and what trims
