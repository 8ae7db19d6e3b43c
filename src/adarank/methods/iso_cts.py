"""Iso-CTS: a common subspace and one of its own for every task, all with equal singular values.

    U_c, s_c, V_c = top c of Σ_t τ_t                 c ≈ common · r, such that T divides r - c
    U_t, s_t, V_t = top (r - c) / T of τ_t - U_c U_cᵀ τ_t
    U = [U_c U_1 … U_T], and V, s alike
    merged = base + λ · mean(s) · U⊥ V⊥ᵀ             X⊥: nearest orthonormal matrix to X
    merged = base + λ · mean_t τ_t                   all other tensors

Marczak et al., "No Task Left Behind: Isotropic Model Merging", arXiv:2502.04959.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adarank.methods.base import Deltas, Method, scaled_mean, weighted_sum
from adarank.spectrum import Spectrum, as_matrix, decompose, orthogonalise
from adarank.task_vectors import OriginKind


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

    common: float = Field(0.8, gt=0, le=1, description="share of components in the common subspace")
    scale: float = Field(1.0, alias="lambda", description="λ")

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        shared = decompose(weighted_sum(torch.zeros_like(origin), deltas, lambda task: 1.0), name)
        own = int((1 - self.common) * shared.s.numel() + 1e-9) // len(deltas)
        first = shared.s.numel() - own * len(deltas)
        parts = [_top(shared, first)]
        for task in deltas:  # not values(): its variable would hold one task vector while the next is made
            parts.append(_top(decompose(_outside(parts[0].u, as_matrix(deltas[task])), name), own))
        u, v = (orthogonalise(torch.cat(columns, dim=1)) for columns in ([p.u for p in parts], [p.v for p in parts]))
        mean = torch.cat([part.s for part in parts]).mean()
        return origin + self.scale * mean * (u @ v.T).reshape(origin.shape)

    def merge_other(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        return scaled_mean(origin, deltas, self.scale)


def _outside(u: Tensor, matrix: Tensor) -> Tensor:
    """What of `matrix` is not in the span of u's columns."""
    return matrix - u @ (u.T @ matrix)


def _top(spectrum: Spectrum, count: int) -> Spectrum:
    return Spectrum(spectrum.u[:, :count].clone(), spectrum.s[:count].clone(), spectrum.v[:, :count].clone())
