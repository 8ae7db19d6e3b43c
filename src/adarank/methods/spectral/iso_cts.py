"""Iso-CTS: a common subspace and one of its own for every task, all with equal singular values.

    U_c, s_c, V_c = top c of Σ_t τ_t                 r - c = T · round((r - ⌊common · r⌋) / T), as the authors' code
    U_t, s_t, V_t = top (r - c) / T of τ_t - U_c U_cᵀ τ_t
    U = [U_c U_1 … U_T], and V, s alike
    merged = base + λ · mean(s) · U⊥ V⊥ᵀ             X⊥: nearest orthonormal matrix to X
    merged = base + λ · mean_t τ_t                   all other tensors

Marczak et al., "No Task Left Behind: Isotropic Model Merging", arXiv:2502.04959.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from adarank.methods.base import Deltas, Method, OriginKind, scaled_mean
from adarank.spectral.bases import SHARE, assembled, iso_cts


class IsoCTS(Method):
    """Isotropic merging in common and task-specific subspaces. Needs no data.

    Arguments:
        common: share of the singular components that the common subspace takes.
        scale: λ, multiplies the whole merged task vector.
    """

    name: ClassVar[str] = "iso_cts"
    origin: ClassVar[OriginKind] = "pretrained"
    formula: ClassVar[str] = "W = W₀ + λ mean(s) U⊥ V⊥ᵀ; U, s, V = [top_c Σ_t τ_t, top_{(r-c)/T} (τ_t - U_c U_cᵀ τ_t)]"
    source: ClassVar[str] = "Marczak et al. 2025, arXiv:2502.04959"
    spectral: ClassVar[bool] = True

    common: float = Field(SHARE, gt=0, le=1, description="share of components in the common subspace")
    scale: float = Field(1.0, alias="lambda", description="λ")

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        return origin + self.scale * assembled(iso_cts(deltas, name, self.common)).reshape(origin.shape)

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return 22 if decomposed else 2  # an SVD, all tasks' factors with the common ones, their nearest orthogonal ones

    def merge_other(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged tensor that is not decomposed."""
        return scaled_mean(origin, deltas, self.scale)
