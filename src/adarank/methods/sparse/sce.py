"""SCE: select the entries in which the experts differ most, weigh experts by energy, erase the minority's signs.

    v = variance of the τ_t, entry by entry, over the tasks
    s_t = τ_t at the ⌊select_topk · n⌋ entries of largest v, of the n with v ≠ 0        all entries if select_topk = 1
    w_t = mean(s_t²) / Σ_u mean(s_u²)                                                   1/T if their sum is below 1e-6
    γ = sign(Σ_t s_t), 0 counted as +
    merged = base + Σ_t w_t [sign(s_t) = γ] s_t / Σ_t w_t [sign(s_t) = γ]

Wan et al., "FuseChat: Knowledge Fusion of Chat Models", arXiv:2408.07990.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adarank.methods.base import Deltas, Method, OriginKind, PerTensor, rest, weighted_sum
from adarank.sparsify.drop import largest


class SCE(Method):
    """Select by variance, weigh by energy, erase minority signs. Within each tensor; reads each expert four times."""

    name: ClassVar[str] = "sce"
    origin: ClassVar[OriginKind] = "pretrained"
    formula: ClassVar[str] = (
        "W = W₀ + Σ_t w_t a_t∘s_t / Σ_t w_t a_t; s_t = τ_t where var_t τ_t is largest, w_t ∝ mean(s_t²), a_t = [sign(s_t) = sign(Σ s)]"
    )
    source: ClassVar[str] = "mergekit's sce; Wan et al. 2024, arXiv:2408.07990"

    select_topk: PerTensor = Field(
        rest(1.0), ge=0, le=1, description="share of varying entries kept: a number, a list over the layers, or filters"
    )
    int8_mask: bool = Field(False, description="taken from mergekit's recipes; changes nothing")

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        total = weighted_sum(torch.zeros_like(origin), deltas, lambda task: 1.0)
        share = self.select_topk.of("", name)
        selected = _selected(origin, deltas, share) if share < 1 else torch.ones_like(origin).bool()
        energy = {task: float((deltas[task] * selected).square().mean()) for task in deltas}
        whole = sum(energy.values())
        positive = total >= 0
        merged, weights = torch.zeros_like(origin), torch.zeros_like(origin)
        for task in deltas:
            weight = energy[task] / whole if whole >= 1e-6 else 1 / len(deltas)
            agreeing = deltas[task] * selected
            agreeing *= torch.where(positive, agreeing > 0, agreeing < 0)
            merged.add_(agreeing, alpha=weight)
            weights.add_(agreeing != 0, alpha=weight)
        return origin + merged / weights.clamp(min=1e-6)

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return 10  # mean, variance and a deviation in float64


def _selected(origin: Tensor, deltas: Deltas, share: float) -> Tensor:
    """Mask of the entries of largest variance; of equals the first."""
    mean = weighted_sum(torch.zeros_like(origin, dtype=torch.float64), deltas, lambda task: 1.0) / len(deltas)
    variance = torch.zeros_like(mean)  # in float64, or equal task vectors would seem to vary
    for task in deltas:
        variance += (deltas[task] - mean).square()
    variance = variance.float()
    count = int(variance.count_nonzero() * share)  # in float32, as mergekit: 180 · 0.7 is 126 there, 125 in float64
    return largest(variance, count) & (variance > 0)
