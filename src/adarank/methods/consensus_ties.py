"""Consensus TIES: TIES-Merging's task vector, where enough tasks find it useful.

    τ = Σ_t [sign(s_t) = γ] s_t                     as in `ties_merging`
    m_t = [|τ_t| ≥ α_t · |τ - τ_t|]                 TALL mask of task t, from its whole task vector
    merged = base + λ · τ ∘ [Σ_t m_t ≥ k]

Wang et al., "Localizing Task Information for Improved Model Merging and Compression", arXiv:2405.07813.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from adarank.methods.base import Deltas
from adarank.methods.consensus_ta import check_agree, claimed
from adarank.methods.ties_merging import TiesMerging
from adarank.methods.weights import PerTensor, rest
from adarank.task_vectors import Network


class ConsensusTies(TiesMerging):
    """TIES-Merging without the entries that matter to fewer than k tasks.

    Arguments:
        tall: α_t, per model. The larger, the fewer entries a task claims.
        agree: k, how many tasks must claim an entry. With 0 this is TIES-Merging.
    """

    name: ClassVar[str] = "consensus_ties"
    formula: ClassVar[str] = "W = W₀ + λ τ∘[Σ_t m_t ≥ k]; τ as in ties_merging, m_t = [|τ_t| ≥ α_t |τ - τ_t|]"
    source: ClassVar[str] = "Wang et al. 2024, arXiv:2405.07813"
    per_model: ClassVar[tuple[str, ...]] = ("tall",)

    tall: PerTensor = Field(rest(0.4), ge=0, description="α_t; per model: a number, a list over the layers, or filters")
    agree: int = Field(2, ge=0, description="k, tasks that must claim an entry")

    def elected(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        total = super().elected(name, origin, deltas)
        return total * claimed(total, deltas, lambda task: self.tall.of(task, name), self.agree)

    def check(self, network: Network) -> None:
        check_agree(self.name, self.agree, network)
