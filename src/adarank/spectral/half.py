"""The products of the spectral sum with factors in bfloat16: about twice as fast where the processor has units for it.

    W = origin + Σ_r (λ b s)_r u_r v_rᵀ        u, v in bfloat16, added to a float32 origin
    g_r = Σ_i u_ir (G v_r)_i                    summed in float32

Each product is wrong by up to 2⁻⁹ of itself, as a share of the task vectors, not of the weights. Adaptation steps by it where its
settings say so; what is written is composed in float32 (`blocks.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adarank.spectral.blocks import Blocks, Gradient
from adarank.spectral.svd import as_matrix


@dataclass(frozen=True)
class HalfFactors:
    """One matrix's components in bfloat16, beside its blocks.

    Attributes:
        u, v: (rows, K), (columns, K).
    """

    blocks: Blocks
    u: Tensor
    v: Tensor

    @classmethod
    def of(cls, blocks: Blocks) -> HalfFactors:
        """Of the float32 components."""
        return cls(blocks, blocks.u.bfloat16(), blocks.v.bfloat16())

    def compose(self, lam: Tensor, mask: Tensor) -> Tensor:
        """The merged tensor, as `Blocks.compose` with a float mask."""
        factors = self.blocks.factors(lam, mask).bfloat16()
        origin, tall = self.blocks.origin, len(self.u) > len(self.v)
        change = self.u @ (self.v * factors).T if tall else (self.u * factors) @ self.v.T  # the smaller one is scaled
        return origin + change.to(origin.dtype).reshape(origin.shape)

    def gradient(self, grad: Tensor, lam: Tensor, mask: Tensor) -> Gradient:
        """Gradients of λ and of the mask's entries, as `Blocks.gradient`."""
        flat, tall = as_matrix(grad).bfloat16(), len(self.u) > len(self.v)
        products = (flat.T @ self.u).mul_(self.v) if tall else (flat @ self.v).mul_(self.u)
        inner = products.sum(0, dtype=torch.float32)
        return self.blocks.gradient_of(inner.to(grad.dtype), lam, mask)
