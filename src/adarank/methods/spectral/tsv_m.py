"""TSV-M: the top singular vectors of every task side by side, orthogonalised against each other.

    U = [U_1 … U_T], s = [s_1 … s_T], V = [V_1 … V_T]        the top k = ⌊r / T⌋ of each task vector
    merged = base + λ · U⊥ diag(s) V⊥ᵀ                       X⊥: nearest orthonormal matrix to X
    merged = base + λ · mean_t τ_t                           all other tensors

Gargiulo et al., "Task Singular Vectors", arXiv:2412.00081.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from adarank.methods.base import Deltas, Method, OriginKind, scaled_mean
from adarank.spectral.bases import assembled, tsv_m


class TSVM(Method):
    """Low-rank task vectors made orthogonal to each other. Needs no data.

    Arguments:
        scale: λ, multiplies the whole merged task vector.
    """

    name: ClassVar[str] = "tsv_m"
    origin: ClassVar[OriginKind] = "pretrained"
    formula: ClassVar[str] = "W = W₀ + λ U⊥ diag(s) V⊥ᵀ; U, s, V = [SVD_{r/T}(τ_t)]_t"
    source: ClassVar[str] = "Gargiulo et al. 2024, arXiv:2412.00081"
    spectral: ClassVar[bool] = True

    scale: float = Field(1.0, alias="lambda", description="λ")

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        return origin + self.scale * assembled(tsv_m(deltas, name)).reshape(origin.shape)

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return 20 if decomposed else 2  # an SVD, all tasks' top factors, their two nearest orthogonal ones

    def merge_other(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged tensor that is not decomposed."""
        return scaled_mean(origin, deltas, self.scale)
