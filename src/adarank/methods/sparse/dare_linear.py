"""DARE as mergekit's `dare_linear`: entries dropped at random, the rest rescaled, then the weighted sum.

    s_t = τ_t ∘ m_t, m_t ~ Bernoulli(density), times ‖τ_t‖₁ / ‖τ_t ∘ m_t‖₁
    merged = base + λ · Σ_t w_t s_t

mergekit 0.1.5 restores the L1 norm; the paper divides by the density, as the method `dare` does.
Yu et al., "Language Models are Super Mario", arXiv:2311.03099.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from adarank.methods.base import Flag, flag
from adarank.methods.sparse.base import SparseSum
from adarank.sparsify.drop import at_random


class DareLinear(SparseSum):
    """Drop at random, restore the norm, weighted sum (mergekit's DARE).

    What is dropped depends on the seed, the task's name and the tensor's name alone.
    """

    name: ClassVar[str] = "dare_linear"
    formula: ClassVar[str] = "W = W₀ + λ Σ_t w_t c_t m_t∘τ_t; m_t ~ Bernoulli(density), c_t = ‖τ_t‖₁ / ‖m_t∘τ_t‖₁"
    source: ClassVar[str] = "mergekit's dare_linear; Yu et al. 2024, arXiv:2311.03099"

    rescale: Flag = Field(flag(True), description="restore each task vector's L1 norm")
    seed: int = Field(0, description="of what is dropped; by default the recipe's seed")

    def kept(self, delta: Tensor, density: float, task: str, name: str) -> Tensor:
        """Mask of the entries kept, of the task vector's shape."""
        return at_random(delta, density, self.seed, task, name)
