"""RegMean: for each linear layer, the weight whose outputs are nearest to every expert's on that expert's own inputs.

    G_t = X_tᵀX_t / n_t                                   of the n_t vectors that expert t's layer is given
    Ĝ_t = α G_t + (1 - α) diag(G_t)                       off-diagonal entries times α
    merged = W̄ + D,  (Σ_t Ĝ_t) D = Σ_t Ĝ_t (W_t - W̄)      that is (Σ Ĝ_t)⁻¹ Σ Ĝ_t W_t;  W as (in, out)

With α = 1 it minimises Σ_t ‖X_t (W - W_t)‖² / n_t. Dividing by n_t lets all tasks count alike, however long their
inputs are. Where the inputs leave directions undetermined (only with α = 1, when they are few), D is the limit for
α → 1: the minimiser nearest to the solution D₀ for α = 0, each input weighted by its own energy,

    D = D₀ + S (S A S)⁺ S (R - A D₀),   A = Σ Ĝ_t,  R = Σ Ĝ_t (W_t - W̄),  S = diag(A)^-½,  D₀ = S² Σ diag(G_t) (W_t - W̄),

and inputs that are always zero keep W̄. With α < 1 no eigenvalue of S A S is below 1 - α, so Cholesky is safe. The sums
are solved in float64.

Jin, Ren, Preoţiuc-Pietro, Cheng, "Dataless Knowledge Fusion by Merging Weights of Language Models", arXiv:2212.09849.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adarank.methods.base import Deltas
from adarank.methods.calibrated.base import CalibratedMethod, Gathers

_NOISE = 4 * torch.finfo(torch.float32).eps  # of an entry: Gram matrices are sums in float32


class RegMean(CalibratedMethod):
    """A least-squares fit to every expert's outputs, one linear layer at a time. All other tensors are averaged.

    Arguments:
        off_diagonal: α, what the Gram matrices' off-diagonal entries are multiplied by.
        batch_size: inputs of a forward pass. Changes time and memory, not the result.
    """

    name: ClassVar[str] = "regmean"
    formula: ClassVar[str] = "W = (Σ_t Ĝ_t)⁻¹ Σ_t Ĝ_t W_t; Ĝ_t = α G_t + (1 - α) diag(G_t), G_t = X_tᵀX_t / n_t"
    source: ClassVar[str] = "Jin et al. 2023, arXiv:2212.09849"

    off_diagonal: float = Field(0.95, ge=0, le=1, description="α, factor of the Gram matrices' off-diagonal entries")
    batch_size: int = Field(32, ge=1, description="inputs of a forward pass; changes time and memory only")

    @property
    def inputs_at_once(self) -> int:
        """Inputs of one forward pass while statistics are taken."""
        return self.batch_size

    def gathered(self, gathers: Gathers) -> RegMean:
        """The same method with its statistics."""
        return self.with_statistics(gathers.gram_matrices())

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        if name not in self.statistics.names:
            return origin
        turned = name not in self.statistics.inputs_first
        total, right, start = torch.zeros(3, 1, 1, dtype=torch.float64, device=origin.device)
        for task in deltas:
            gram = self.statistics.read(name, task).to(origin.device, torch.float64)
            delta = (deltas[task].T if turned else deltas[task]).double()
            diagonal = gram.diagonal()
            gram = self.off_diagonal * gram + (1 - self.off_diagonal) * diagonal.diag()
            total = total + gram
            right = right + gram @ delta
            start = start + diagonal[:, None] * delta
        solution, rank = solve(total, right, start)
        if rank < len(total):
            self.undetermined[name] = f"{rank} of {len(total)}"
        return origin + (solution.T if turned else solution).to(origin.dtype)

    def merge_other(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged tensor that is not decomposed."""
        return origin

    def held(self, shape: tuple[int, ...], decomposed: bool) -> int:
        """Numbers of four bytes held for a tensor while its statistics are taken."""
        return shape[1] ** 2 if decomposed and len(shape) == 2 else 0

    def solving(self, shape: tuple[int, ...]) -> int:
        """Numbers of four bytes held beside while a matrix is solved for."""
        return 2 * (6 * shape[1] ** 2 + 5 * shape[0] * shape[1]) if len(shape) == 2 else 0


def solve(total: Tensor, right: Tensor, start: Tensor) -> tuple[Tensor, int]:
    """D with A D = R, and the rank of A; where A is singular, the D of the module's docstring.

    Arguments:
        total: A, (in, in) float64, symmetric and positive semi-definite.
        right: R, (in, out).
        start: Σ_t diag(G_t) (W_t - W̄), (in, out).
    """
    energy = total.diagonal()
    alive = energy > 0
    scale = torch.where(alive, energy.clamp(min=torch.finfo(energy.dtype).tiny).rsqrt(), 0.0)[:, None]
    first = scale * scale * start
    rest = scale * (right - total @ first)
    scaled = scale * total * scale.T + torch.diag((~alive).to(total.dtype))
    noise = len(total) * _NOISE
    factor, failed = torch.linalg.cholesky_ex(scaled)
    if not failed and _least_eigenvalue(factor) > noise:
        return first + scale * torch.cholesky_solve(rest, factor), int(alive.sum())
    values, vectors = torch.linalg.eigh(scaled)
    kept = values > noise
    inverse = torch.where(kept, values.clamp(min=noise).reciprocal(), 0.0)
    dead = len(total) - int(alive.sum())
    return first + scale * (vectors @ (inverse[:, None] * (vectors.T @ rest))), int(kept.sum()) - dead


def _least_eigenvalue(factor: Tensor, iterations: int = 8) -> float:
    """Estimate from above, by inverse iteration, of L Lᵀ's least eigenvalue."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(len(factor), 1, generator=generator, dtype=factor.dtype).to(factor.device)
    for _ in range(iterations):
        vector = torch.cholesky_solve(vector / vector.norm(), factor)
    return 1 / float(vector.norm())
