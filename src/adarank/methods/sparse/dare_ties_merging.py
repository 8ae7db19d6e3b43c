"""DARE, then TIES-Merging of what is left.

    s_t = τ_t ∘ m_t / (1 - p)        m_t ~ Bernoulli(1 - p)
    merged = TIES-Merging of the s_t, trimmed over the whole model

Yu et al., "Language Models are Super Mario", arXiv:2311.03099, Section 4; `ties_merging` has TIES' formulas.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from adarank.methods.sparse.dare import thinned
from adarank.methods.sparse.ties_merging import TiesMerging


class DareTiesMerging(TiesMerging):
    """TIES-Merging of task vectors thinned at random (the paper's DARE with TIES).

    What is dropped depends on the seed, the task's name and the tensor's name alone.
    """

    name: ClassVar[str] = "dare_ties_merging"
    formula: ClassVar[str] = "ties_merging of m_t∘τ_t / (1 - p); m_t ~ Bernoulli(1 - p)"
    source: ClassVar[str] = "Yu et al. 2024, arXiv:2311.03099"

    drop: float = Field(0.5, ge=0, lt=1, description="p, share of entries dropped")
    seed: int = Field(0, description="of what is dropped; by default the recipe's seed")

    def changed(self, task: str, name: str, delta: Tensor) -> Tensor:
        """The task vector with entries dropped at random and the rest rescaled."""
        return thinned(delta, self.drop, self.seed, task, name)

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return 9
