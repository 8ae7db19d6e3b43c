"""SVC: another merge's singular values, corrected for what the tasks have in common and the sum counts again and again.

    Δ = U diag(σ) Vᵀ                                      what the method named by `basis` makes of the task vectors
    a_r = u_rᵀ Δ,   a_tr = u_rᵀ τ_t                       what the merge, and what task t, puts out along u_r
    s_tr = ⟨a_r, a_tr⟩ / ‖a_tr‖²                          how far the merge exaggerates it
    γ_r = T / Σ_t max(α, s_tr),   merged = base + λ U diag(γ∘σ) Vᵀ
    merged = base + λ · mean_t τ_t                        all other tensors

Where tasks agree along u_r, s_tr is above 1 and the singular value is made smaller; with α < 1 it grows where they cancel.
A task that puts out nothing along u_r is neither summed nor counted there: γ is the mean over those that do. The paper leaves
open what happens to other tensors; they take the mean, as with the spectral methods that it starts from.

"When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging", arXiv:2602.05536.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from adarank.methods.base import Deltas, Method, OriginKind, scaled_mean, weighted_sum
from adarank.spectral.bases import BASES, assembled
from adarank.spectral.svd import as_matrix, decompose


def _above_zero_or_auto(given: Any) -> Any:
    number = isinstance(given, (int, float)) and not isinstance(given, bool) and given > 0
    if not number and given != "auto":
        raise ValueError("a number above 0, or auto, was needed")
    return given


class SVC(Method):
    """Singular value calibration of a merge. Needs no data.

    Arguments:
        basis: which merge is calibrated: the summed task vectors, or what TSV-M, Iso-C or Iso-CTS makes of them.
        alpha: α, the least exaggeration that is corrected; `auto` is 1/T as in the paper, and 1 on TSV-M as released.
        scale: λ, multiplies the whole merged task vector.
    """

    name: ClassVar[str] = "svc"
    origin: ClassVar[OriginKind] = "pretrained"
    formula: ClassVar[str] = (
        "W = W₀ + λ U diag(γ∘σ) Vᵀ; U diag(σ) Vᵀ = Σ_t τ_t, γ_r = T / Σ_t max(α, ⟨σ_r v_r, τ_tᵀu_r⟩ / ‖τ_tᵀu_r‖²)"
    )
    source: ClassVar[str] = "Li et al. 2026, arXiv:2602.05536"
    spectral: ClassVar[bool] = True

    basis: Literal["task_vectors", "tsv_m", "iso_c", "iso_cts"] = Field(
        "task_vectors", description="the merge that is calibrated"
    )
    alpha: Annotated[float | Literal["auto"], BeforeValidator(_above_zero_or_auto)] = Field(
        "auto", description="α; auto: 1/T, and 1 on tsv_m"
    )
    scale: float = Field(1.0, alias="lambda", description="λ")

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        spectrum = decompose(self._merge(name, origin, deltas), name)
        least = (1.0 if self.basis == "tsv_m" else 1 / len(deltas)) if self.alpha == "auto" else self.alpha
        total, count = torch.zeros(2, len(spectrum.s), dtype=origin.dtype, device=origin.device)
        for task in deltas:
            response = as_matrix(deltas[task]).T @ spectrum.u  # a_tr as columns
            energy = response.square().sum(0)
            there = energy > 0
            along = (spectrum.v * response).sum(0) * spectrum.s
            total += torch.where(there, (along / energy.where(there, 1.0)).clamp(min=least), 0.0)
            count += there
        calibrated = spectrum.s * torch.where(count > 0, count / total.where(count > 0, 1.0), 1.0)
        return origin + self.scale * ((spectrum.u * calibrated) @ spectrum.v.T).reshape(origin.shape)

    def merge_other(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged tensor that is not decomposed."""
        return scaled_mean(origin, deltas, self.scale)

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return 12 if decomposed else 2  # the merge, its spectrum and what finding it takes, a task's responses

    def _merge(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """Δ, (rows, columns)."""
        if self.basis == "task_vectors":
            return as_matrix(weighted_sum(torch.zeros_like(origin), deltas, lambda task: 1.0))
        return assembled(BASES[self.basis].spectra(deltas, name))
