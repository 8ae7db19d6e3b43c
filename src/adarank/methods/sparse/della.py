"""DELLA with TIES' election as mergekit's `della`.

    s_t = τ_t ∘ m_t as in `della_linear`
    γ = sign(Σ_t w_t s_t)
    merged = base + λ · Σ_t w_t [sign(w_t s_t) = γ] s_t / Σ_t w_t [sign(w_t s_t) = γ]

Deep et al., "DELLA-Merging", arXiv:2406.11617.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from adarank.methods.base import Flag, flag
from adarank.methods.sparse.della_linear import DellaLinear


class Della(DellaLinear):
    """Drop at random, small entries more often, restore the norm, elect signs, weighted mean of what agrees.

    What is dropped depends on the seed, the task's name and the tensor's name alone.
    """

    name: ClassVar[str] = "della"
    formula: ClassVar[str] = (
        "W = W₀ + λ Σ_t w_t a_t∘s_t / Σ_t w_t a_t; s_t as in della_linear, a_t = [sign(w_t s_t) = sign(Σ w s)]"
    )
    source: ClassVar[str] = "mergekit's della; Deep et al. 2024, arXiv:2406.11617"
    elects: ClassVar[bool] = True

    normalize: Flag = Field(flag(True), description="divide by the sum of the weights")
