"""A matrix of low rank as a product of thin ones, which is never multiplied out where that can be helped.

M = L C R        L (rows, p), C (p, q), R (q, columns); p and q small
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """M = left · core · right.

    Attributes:
        left: (rows, p).
        core: (p, q).
        right: (q, columns).
        orthonormal: the columns of `left` and the rows of `right` are orthonormal.

    Example:
        Factors(torch.ones(4, 1), torch.eye(1), torch.ones(1, 3)).dense()  # (4, 3) ones
    """

    left: Tensor
    core: Tensor
    right: Tensor
    orthonormal: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the product."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """The most that the product's rank can be."""
        sides: tuple[int, ...] = (*self.core.shape, *self.shape)
        return min(sides)

    def dense(self) -> Tensor:
        """The product, (rows, columns)."""
        return self.left @ (self.core @ self.right)

    def norm(self) -> Tensor:
        """The Frobenius norm of the product."""
        length: Tensor = torch.linalg.vector_norm(self.orthogonal().core)
        return length

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Factors:
        """The same on a device and in a dtype."""
        left, core, right = (part.to(device=device, dtype=dtype) for part in (self.left, self.core, self.right))
        return Factors(left, core, right, self.orthonormal)

    def orthogonal(self) -> Factors:
        """The same product with orthonormal outer factors: two QR decompositions of thin matrices."""
        if self.orthonormal:
            return self
        left, upper = torch.linalg.qr(self.left)
        right, lower = torch.linalg.qr(self.right.T)
        return Factors(left, upper @ self.core @ lower.T, right.T, orthonormal=True)


def stacked(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Σ_i weight_i · M_i, of at most the summed rank."""
    left = torch.cat([part.left @ (weight * part.core) for part, weight in zip(parts, weights, strict=True)], dim=1)
    right = torch.cat([part.right for part in parts])
    return Factors(left, torch.eye(len(right), dtype=left.dtype, device=left.device), right)


def about_average(parts: Mapping[str, Factors]) -> dict[str, Factors]:
    """M_t - mean_s M_s for every t, over outer factors that all of them share: two QR decompositions for all."""
    shared = stacked(list(parts.values()), [1.0] * len(parts))
    left, upper = torch.linalg.qr(shared.left)
    right, lower = torch.linalg.qr(shared.right.T)
    sizes = torch.tensor([len(part.right) for part in parts.values()])
    centred = {}
    for row, task in enumerate(parts):
        weights = torch.full((len(parts),), -1 / len(parts), dtype=upper.dtype)
        weights[row] += 1
        weights = weights.repeat_interleave(sizes).to(upper)
        centred[task] = Factors(left, (upper * weights) @ lower.T, right.T, orthonormal=True)
    return centred
