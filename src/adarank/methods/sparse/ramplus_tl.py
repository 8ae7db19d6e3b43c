"""RAM+, tensor by tensor: as RAM, with what one model alone changed made larger the more of its changes are shared.

    m_t = [|τ_t| > epsilon], c = Σ_t m_t                 which entries each model changed, and how many did
    ρ_t = #{m_t, c > 1} / #{m_t, c = 1}                  shared and lone changes of model t, within the tensor
    λ_t = 1 + r · min(ρ_t, alpha)
    merged = base + Σ_t [c = 1] λ_t m_t∘τ_t + [c > 1] m_t∘τ_t / c

The paper counts ρ_t over the whole model, mergekit's `ramplus_tl` and this one within each tensor.

Yuan et al., "Behavior Knowledge Merge in Reinforced Agentic Models", arXiv:2601.13572.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adarank.methods.base import Deltas, PerTensor, rest
from adarank.methods.sparse.ram import RAM


class RAMPlus(RAM):
    """RAM with lone changes scaled up by how many of an expert's changes are shared, tensor by tensor."""

    name: ClassVar[str] = "ramplus_tl"
    formula: ClassVar[str] = (
        "W = W₀ + Σ_t ([c = 1] λ_t + [c > 1] / c)∘m_t∘τ_t; m_t = [|τ_t| > ε], c = Σ_t m_t, "
        "λ_t = 1 + r min(α, #{m_t, c > 1} / #{m_t, c = 1})"
    )
    source: ClassVar[str] = "mergekit's ramplus_tl; Yuan et al. 2026, arXiv:2601.13572"

    r: PerTensor = Field(rest(0.1), ge=0, description="how much lone changes grow with the share of shared ones")
    alpha: PerTensor = Field(rest(0.2), ge=0, description="largest ratio of shared to lone changes that counts")

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        count = torch.zeros_like(origin)
        for task in deltas:
            count += self.changed(name, deltas[task])
        total, lone = torch.zeros_like(origin), count == 1
        for task in deltas:
            delta = deltas[task]
            changed = self.changed(name, delta)
            scale = self._scale(name, int(changed.sum()), int((changed & lone).sum()))
            total += delta * changed * torch.where(lone, scale, 1.0)
        return total.div_(count.clamp_(min=1)).add_(origin)

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return 7

    def _scale(self, name: str, changed: int, lone: int) -> float:
        """λ_t; it does not matter where a model changed nothing alone."""
        ratio = (changed - lone) / max(lone, 1)
        return 1 + self.r.of("", name) * min(ratio, self.alpha.of("", name))
