"""Iso-C: the summed task vector with all its singular values made equal.

    Σ_t τ_t = U diag(s) Vᵀ
    merged = base + λ · mean(s) · U Vᵀ
    merged = base + λ · mean_t τ_t        all other tensors

Marczak et al., "No Task Left Behind: Isotropic Model Merging", arXiv:2502.04959.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from adarank.methods.base import Deltas, Method, OriginKind, scaled_mean
from adarank.spectral.bases import assembled, iso_c


class IsoC(Method):
    """Isotropic merging in the common subspace. Needs no data.

    Arguments:
        scale: λ, multiplies the whole merged task vector.
    """

    name: ClassVar[str] = "iso_c"
    origin: ClassVar[OriginKind] = "pretrained"
    formula: ClassVar[str] = "W = W₀ + λ mean(s) U Vᵀ; U diag(s) Vᵀ = Σ_t τ_t"
    source: ClassVar[str] = "Marczak et al. 2025, arXiv:2502.04959"
    spectral: ClassVar[bool] = True

    scale: float = Field(1.0, alias="lambda", description="λ")

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        return origin + self.scale * assembled(iso_c(deltas, name)).reshape(origin.shape)

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return 11 if decomposed else 2  # the sum, its SVD, and what is multiplied out again

    def merge_other(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged tensor that is not decomposed."""
        return scaled_mean(origin, deltas, self.scale)
