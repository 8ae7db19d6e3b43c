"""RAM, Reinforced Agent Merging: the mean over the models that changed an entry.

    m_t = [|τ_t| > epsilon]                              which entries the model changed
    merged = base + Σ_t m_t∘τ_t / Σ_t m_t                0 where none changed it

What one model alone changed is taken whole, what several changed is averaged over these: nothing is thinned by models
that left it alone, as task vectors of reinforcement learning are sparse and of different places.

Yuan et al., "Behavior Knowledge Merge in Reinforced Agentic Models", arXiv:2601.13572.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adarank.methods.base import Deltas, Method, OriginKind, PerTensor, rest


class RAM(Method):
    """Mean of the task vectors, entry by entry, over the experts that changed the entry."""

    name: ClassVar[str] = "ram"
    origin: ClassVar[OriginKind] = "pretrained"
    formula: ClassVar[str] = "W = W₀ + Σ_t m_t∘τ_t / Σ_t m_t; m_t = [|τ_t| > ε]"
    source: ClassVar[str] = "mergekit's ram; Yuan et al. 2026, arXiv:2601.13572"

    elementwise: ClassVar[bool] = True
    epsilon: PerTensor = Field(rest(1e-5), ge=0, description="smaller changes of an entry count as none")

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        total, count = torch.zeros_like(origin), torch.zeros_like(origin)
        for task in deltas:  # not items(): its variable would hold one task vector while the next is made
            delta = deltas[task]
            changed = self.changed(name, delta)
            total += delta * changed
            count += changed
        return total.div_(count.clamp_(min=1)).add_(origin)

    def changed(self, name: str, delta: Tensor) -> Tensor:
        """Mask of the entries that a model changed."""
        return delta.abs() > self.epsilon.of("", name)

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return 6
