"""TSV-Compress: each task keeps the top singular components of its own task vectors, 1/T of them.

    W_t = W₀ + SVD_k(τ_t)        matrices, k = max(1, ⌊rank · r⌋), rank = 1/T
    W_t                          all other tensors: the task's own, whole

The T tasks' components of a matrix together take about the room of one full-rank task vector's.

Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging", arXiv:2412.00081.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from adarank.methods.base import OriginKind
from adarank.methods.task_aware.low_rank import LowRank
from adarank.sparsify.threshold import top_count


class TSVC(LowRank):
    """Each task's own task vectors at low rank. Needs no data, but each input's task.

    Arguments:
        rank: share of each matrix's singular components that a task keeps, in (0, 1]. If not given, 1/T.
    """

    name: ClassVar[str] = "tsv_c"
    origin: ClassVar[OriginKind] = "pretrained"
    formula: ClassVar[str] = "W_t = W₀ + SVD_{r/T}(τ_t)"
    source: ClassVar[str] = "Gargiulo et al. 2024, arXiv:2412.00081"

    rank: float | None = Field(None, gt=0, le=1, description="share of singular components kept; 1/T if not given")

    def kept(self, rank: int, tasks: int) -> int:
        """k: how many of a matrix's components are kept."""
        return top_count(1 / tasks if self.rank is None else self.rank, rank)

    def factor(self) -> float:
        """λ."""
        return 1.0
