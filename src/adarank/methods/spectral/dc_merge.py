"""DC-Merge: what the tasks' top directions have to say, merged by TIES in one basis that covers them all.

    U, V = [U_1 … U_T]⊥, [V_1 … V_T]⊥                     the top k = ⌊r / T⌋ of each task vector, orthonormal together
    M_t = top_density(Uᵀ SVD_k(τ_t) V)                    the entries of largest magnitude, ⌊density · r²⌋ of them
    M = mean over the t with sign(M_t) = sign(Σ_t M_t)    entry by entry, as TIES
    merged = base + λ · U blocks(M) Vᵀ                    of M the blocks on the diagonal alone: a block per task
    merged = base + λ · mean_t τ_t                        all other tensors

These are the steps and the density of the authors' code for fully fine-tuned models. What the paper does to singular values
before it (smoothing them, for LoRA) is not in that code, and not here.

"DC-Merge", arXiv:2603.06242.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adarank.methods.base import Deltas, Method, OriginKind, scaled_mean
from adarank.spectral.bases import together, top
from adarank.spectral.svd import decompose


class DCMerge(Method):
    """TIES in a basis that covers every task's top directions. Needs no data.

    Arguments:
        density: share of the entries of a task's coordinates that is kept.
        scale: λ, multiplies the whole merged task vector.
    """

    name: ClassVar[str] = "dc_merge"
    origin: ClassVar[OriginKind] = "pretrained"
    formula: ClassVar[str] = "W = W₀ + λ U blocks(TIES_t(top_density(Uᵀ SVD_{r/T}(τ_t) V))) Vᵀ; U, V as tsv_m"
    source: ClassVar[str] = "arXiv:2603.06242, as released for full fine-tuning"
    spectral: ClassVar[bool] = True

    density: float = Field(0.001, gt=0, le=1, description="share of each task's coordinates that is kept")
    scale: float = Field(1.0, alias="lambda", description="λ")

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        parts = []
        for task in deltas:  # one whole SVD in memory at a time
            spectrum = decompose(deltas[task], name)
            parts.append(top(spectrum, max(1, spectrum.s.numel() // len(deltas))))
        cover = together(parts)
        u, v = (torch.cat([getattr(part, key) for part in cover], dim=1) for key in "uv")
        count = max(1, int(self.density * min(u.shape[0], v.shape[0]) ** 2))
        blocks = torch.block_diag(*(torch.ones(part.s.numel(), part.s.numel()) for part in cover)).bool()
        blocks = blocks.to(origin.device)
        kept = [_largest((u.T @ (part.u * part.s)) @ (part.v.T @ v), count)[blocks] for part in parts]
        core = torch.zeros(blocks.shape, dtype=origin.dtype, device=origin.device)
        core[blocks] = _elected_mean(torch.stack(kept))
        return origin + self.scale * (u @ core @ v.T).reshape(origin.shape)

    def merge_other(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged tensor that is not decomposed."""
        return scaled_mean(origin, deltas, self.scale)

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return (
            23 if decomposed else 2
        )  # an SVD, all tasks' top factors, the cover, one task's coordinates, what is kept


def _largest(matrix: Tensor, count: int) -> Tensor:
    """The entries of largest magnitude, `count` of them or more where some are alike; zero elsewhere."""
    flat = matrix.abs().flatten()
    threshold = flat.topk(min(count, flat.numel())).values[-1]
    return matrix * (matrix.abs() >= threshold)


def _elected_mean(stacked: Tensor) -> Tensor:
    """Over the first axis, the mean of the entries that have the sum's sign; zero where the sum is."""
    sign = stacked.sum(0).sign()
    agrees = (stacked.sign() == sign) & (sign != 0)
    return (stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)
