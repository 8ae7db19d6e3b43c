"""DELLA as mergekit's `della_linear`: small entries are dropped more often than large ones, the rest is rescaled.

    s_t = τ_t ∘ m_t, m_t ~ Bernoulli(p), times ‖τ_t‖₁ / ‖τ_t ∘ m_t‖₁
    p = density - ε + 2ε · (rank - 1) / (n - 1)        rank of |τ_t| within its row of n, the smallest first
    merged = base + λ · Σ_t w_t s_t

Deep et al., "DELLA-Merging", arXiv:2406.11617, divides each entry by its own p; mergekit 0.1.5 restores the L1 norm.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from adarank.methods.base import AlignedCheckpoints, Flag, PerTensor, RecipeError, flag, rest
from adarank.methods.sparse.base import SparseSum
from adarank.sparsify.drop import by_rank


class DellaLinear(SparseSum):
    """Drop at random, small entries more often, restore the norm, weighted sum.

    What is dropped depends on the seed, the task's name and the tensor's name alone.
    """

    name: ClassVar[str] = "della_linear"
    formula: ClassVar[str] = (
        "W = W₀ + λ Σ_t w_t c_t m_t∘τ_t; m_t ~ Bernoulli(density ± ε by rank in the row), c_t = ‖τ_t‖₁ / ‖m_t∘τ_t‖₁"
    )
    source: ClassVar[str] = "mergekit's della_linear; Deep et al. 2024, arXiv:2406.11617"
    per_model: ClassVar[tuple[str, ...]] = ("weight", "density", "epsilon")
    ranks: ClassVar[int] = 1

    rescale: Flag = Field(flag(True), description="restore each task vector's L1 norm")
    epsilon: PerTensor = Field(
        rest(0.15), ge=0, le=1, description="density ± this is the range of p; per model, as weight"
    )
    seed: int = Field(0, description="of what is dropped; by default the recipe's seed")

    def kept(self, delta: Tensor, density: float, task: str, name: str) -> Tensor:
        """Mask of the entries kept, of the task vector's shape."""
        if density <= 0:
            return delta != delta
        return by_rank(delta, density, self.epsilon.of(task, name), self.seed, task, name)

    def check(self, network: AlignedCheckpoints) -> None:
        """Raise a sentence if the settings do not fit these models."""
        for name in network.merged():
            for task in network.tasks:
                density, epsilon = self.density.of(task, name), self.epsilon.of(task, name)
                if 0 < density < 1 and not epsilon < min(density, 1 - density):
                    raise RecipeError(
                        f"{self.name}: density ± epsilon must stay between 0 and 1, got {density} ± {epsilon} for '{task}' in tensor '{name}'. Lower epsilon."
                    )
