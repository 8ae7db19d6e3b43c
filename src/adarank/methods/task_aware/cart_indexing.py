"""CART-indexing: the weight average, and for each task the top singular components of its deviation from it.

    W̄ = mean_t W_t
    W_t = W̄ + λ · SVD_k(W_t - W̄)        matrices, k = max(1, ⌊rank · r⌋)
    W_t = W̄ + λ · (W_t - W̄)             all other tensors

At full rank and λ = 1 every task has its expert. Needs no base.

Choi, Kim, Lee, Hong, "Revisiting Weight Averaging for Model Merging", arXiv:2412.12153: CART for the one task asked.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from adarank.methods.base import OriginKind
from adarank.methods.task_aware.low_rank import LowRank
from adarank.sparsify.threshold import top_count


class CARTIndexing(LowRank):
    """The weight average and each task's low-rank deviation from it. Needs no data, but each input's task.

    Arguments:
        rank: share of each matrix's singular components that a task keeps, in (0, 1].
        scale: λ, multiplies the task's deviation.
    """

    name: ClassVar[str] = "cart_indexing"
    origin: ClassVar[OriginKind] = "average"
    formula: ClassVar[str] = "W_t = W̄ + λ SVD_k(W_t - W̄)"
    source: ClassVar[str] = "Choi et al. 2024, arXiv:2412.12153"

    rank: float = Field(0.08, gt=0, le=1, description="share of singular components kept")
    scale: float = Field(1.0, alias="lambda", description="λ")

    def kept(self, rank: int, tasks: int) -> int:
        """k: how many of a matrix's components are kept."""
        return top_count(self.rank, rank)

    def factor(self) -> float:
        """λ."""
        return self.scale
