"""Model Breadcrumbs as mergekit's `breadcrumbs`: neither the largest entries of a task vector nor the smallest.

    s_t = τ_t without its ⌊gamma · n⌋ largest entries and without the smallest, so that ⌊density · n⌋ are left
    merged = base + λ · Σ_t w_t s_t

Davari and Belilovsky, "Model Breadcrumbs", arXiv:2312.06795. The ranks are those within one tensor, as in the paper.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from adarank.methods.base import PerTensor, rest
from adarank.methods.sparse.base import SparseSum
from adarank.sparsify.drop import middle


class Breadcrumbs(SparseSum):
    """Outliers and small entries removed within each tensor, then the weighted sum."""

    name: ClassVar[str] = "breadcrumbs"
    formula: ClassVar[str] = (
        "W = W₀ + λ Σ_t w_t s_t; s_t = τ_t less its ⌊gamma·n⌋ largest and its smallest entries, ⌊density·n⌋ kept"
    )
    source: ClassVar[str] = "mergekit's breadcrumbs; Davari and Belilovsky 2023, arXiv:2312.06795"
    per_model: ClassVar[tuple[str, ...]] = ("weight", "density", "gamma")
    ranks: ClassVar[int] = 1

    gamma: PerTensor = Field(
        rest(0.01), ge=0, le=1, description="share of largest entries removed; per model, as weight"
    )

    def kept(self, delta: Tensor, density: float, task: str, name: str) -> Tensor:
        """Mask of the entries kept, of the task vector's shape."""
        return middle(delta, density, self.gamma.of(task, name))
