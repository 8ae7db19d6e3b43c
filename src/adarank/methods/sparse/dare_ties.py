"""DARE with TIES' election as mergekit's `dare_ties`.

    s_t = τ_t ∘ m_t, m_t ~ Bernoulli(density), times ‖τ_t‖₁ / ‖τ_t ∘ m_t‖₁
    γ = sign(Σ_t w_t s_t)
    merged = base + λ · Σ_t w_t [sign(w_t s_t) = γ] s_t

Yu et al., "Language Models are Super Mario", arXiv:2311.03099.
"""

from __future__ import annotations

from typing import ClassVar

from adarank.methods.sparse.dare_linear import DareLinear


class DareTies(DareLinear):
    """Drop at random, restore the norm, elect signs, weighted sum of what agrees (mergekit's DARE TIES).

    What is dropped depends on the seed, the task's name and the tensor's name alone.
    """

    name: ClassVar[str] = "dare_ties"
    formula: ClassVar[str] = (
        "W = W₀ + λ Σ_t w_t a_t∘s_t; s_t = c_t m_t∘τ_t, m_t ~ Bernoulli(density), a_t = [sign(w_t s_t) = sign(Σ w s)]"
    )
    source: ClassVar[str] = "mergekit's dare_ties; Yu et al. 2024, arXiv:2311.03099"
    elects: ClassVar[bool] = True
