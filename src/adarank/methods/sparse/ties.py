"""TIES as mergekit's `ties`: within each tensor the largest entries, and of them those of the elected sign.

    s_t = the max(1, ⌊density · n⌋) entries of largest |τ_t|, of a tensor's n
    γ = sign(Σ_t w_t s_t)
    merged = base + λ · Σ_t w_t [sign(w_t s_t) = γ] s_t / Σ_t w_t [sign(w_t s_t) = γ]

Yadav et al., "TIES-Merging", arXiv:2306.01708, who trim over the whole model: that is `ties_merging`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adarank.methods.base import Flag, flag
from adarank.methods.sparse.base import SparseSum
from adarank.sparsify.drop import largest


class Ties(SparseSum):
    """Trim by magnitude within each tensor, elect signs, weighted mean of what agrees (mergekit's TIES)."""

    name: ClassVar[str] = "ties"
    formula: ClassVar[str] = (
        "W = W₀ + λ Σ_t w_t a_t∘s_t / Σ_t w_t a_t; s_t = top_density(τ_t), a_t = [sign(w_t s_t) = sign(Σ w s)]"
    )
    source: ClassVar[str] = "mergekit's ties; Yadav et al. 2023, arXiv:2306.01708"
    elects: ClassVar[bool] = True

    normalize: Flag = Field(flag(True), description="divide by the sum of the weights")

    def kept(self, delta: Tensor, density: float, task: str, name: str) -> Tensor:
        """Mask of the entries kept, of the task vector's shape."""
        if density <= 0:
            return torch.zeros_like(delta, dtype=torch.bool)
        return largest(delta, max(1, int(density * delta.numel())))
