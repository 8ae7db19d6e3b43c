"""The products of the spectral sum with factors in bfloat16: about twice as fast where the processor has units for it.

    W = origin + Σ_r (λ b s)_r u_r v_rᵀ        u, v in bfloat16, added to a float32 origin
    g_r = Σ_i u_ir (G v_r)_i                    summed in float32

Each product is wrong by up to 2⁻⁹ of itself, as a share of the task vectors, not of the weights. Adaptation steps by it where its
settings say so; what is written is composed in float32 (`blocks.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from adarank.spectral.blocks import Blocks, Gradient, inner_products, scaled
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
        left, right = scaled(self.u, self.blocks.factors(lam, mask).bfloat16(), self.v)
        origin = self.blocks.origin
        return origin + (left @ right).to(origin.dtype).reshape(origin.shape)

    def gradient(self, grad: Tensor, lam: Tensor, mask: Tensor) -> Gradient:
        """Gradients of λ and of the mask's entries, as `Blocks.gradient`."""
        inner = inner_products(self.u, as_matrix(grad).bfloat16(), self.v)
        return self.blocks.gradient_of(inner.to(grad.dtype), lam, mask)
