"""DARE: drop entries of the task vectors at random and rescale the rest, so that the expectation stays.

    s_t = τ_t ∘ m_t / (1 - p)        m_t ~ Bernoulli(1 - p)
    merged = base + λ · Σ_t s_t

Yu et al., "Language Models are Super Mario", arXiv:2311.03099.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adarank.methods.base import Deltas, Method, OriginKind
from adarank.sparsify.drop import at_random


class Dare(Method):
    """Task Arithmetic with task vectors thinned at random (the paper's DARE).

    What is dropped depends on the seed, the task's name and the tensor's name alone.

    Arguments:
        drop: p, the share of entries dropped.
        scale: λ, multiplies the summed task vectors.
    """

    name: ClassVar[str] = "dare"
    origin: ClassVar[OriginKind] = "pretrained"
    formula: ClassVar[str] = "W = W₀ + λ Σ_t m_t∘τ_t / (1 - p); m_t ~ Bernoulli(1 - p)"
    source: ClassVar[str] = "Yu et al. 2024, arXiv:2311.03099"

    drop: float = Field(0.5, ge=0, lt=1, description="p, share of entries dropped")
    scale: float = Field(0.3, alias="lambda", description="λ")
    seed: int = Field(0, description="of what is dropped; by default the recipe's seed")

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        total = origin.clone()
        for task in deltas:
            total.add_(thinned(deltas[task], self.drop, self.seed, task, name), alpha=self.scale)
        return total

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return 5


def thinned(delta: Tensor, drop: float, seed: int, task: str, name: str) -> Tensor:
    """Each entry dropped with probability `drop`, the others divided by 1 - drop."""
    return torch.where(at_random(delta, 1 - drop, seed, task, name), delta / (1 - drop), 0.0)
