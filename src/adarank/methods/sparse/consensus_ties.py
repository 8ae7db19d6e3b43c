"""Consensus TIES: TIES-Merging's task vector, where enough tasks find it useful.

    τ = Σ_t [sign(s_t) = γ] s_t                     as in `ties_merging`
    m_t = [|τ_t| ≥ α_t · |τ - τ_t|]                 TALL mask of task t, from its whole task vector
    merged = base + λ · τ ∘ [Σ_t m_t ≥ k]

Wang et al., "Localizing Task Information for Improved Model Merging and Compression", arXiv:2405.07813.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from adarank.methods.base import Deltas
from adarank.methods.sparse.consensus_ta import Consensus
from adarank.methods.sparse.ties_merging import TiesMerging


class ConsensusTies(TiesMerging, Consensus):
    """TIES-Merging without the entries that matter to fewer than k tasks."""

    name: ClassVar[str] = "consensus_ties"
    formula: ClassVar[str] = "W = W₀ + λ τ∘[Σ_t m_t ≥ k]; τ as in ties_merging, m_t = [|τ_t| ≥ α_t |τ - τ_t|]"
    source: ClassVar[str] = "Wang et al. 2024, arXiv:2405.07813"

    elementwise: ClassVar[bool] = True

    def elected(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """The merged task vector before λ, without the entries that few tasks claim."""
        total = super().elected(name, origin, deltas)
        return total * self.useful(name, total, deltas)
