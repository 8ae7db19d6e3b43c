"""Model Breadcrumbs with TIES' election as mergekit's `breadcrumbs_ties`.

    s_t = τ_t without its ⌊gamma · n⌋ largest entries and without the smallest, so that ⌊density · n⌋ are left
    γ = sign(Σ_t w_t s_t)
    merged = base + λ · Σ_t w_t [sign(w_t s_t) = γ] s_t

Davari and Belilovsky, "Model Breadcrumbs", arXiv:2312.06795; Yadav et al., arXiv:2306.01708.
"""

from __future__ import annotations

from typing import ClassVar

from adarank.methods.sparse.breadcrumbs import Breadcrumbs


class BreadcrumbsTies(Breadcrumbs):
    """Outliers and small entries removed within each tensor, signs elected, weighted sum of what agrees."""

    name: ClassVar[str] = "breadcrumbs_ties"
    formula: ClassVar[str] = "W = W₀ + λ Σ_t w_t a_t∘s_t; s_t as in breadcrumbs, a_t = [sign(w_t s_t) = sign(Σ w s)]"
    source: ClassVar[str] = "mergekit's breadcrumbs_ties; Davari and Belilovsky 2023, arXiv:2312.06795"
    elects: ClassVar[bool] = True
