"""How much decomposed task vectors are in each other's way.

    U = [U_1 … U_T], V alike, S = diag(s_1, …, s_T)        components of each task vector of a matrix
    STI = ‖ (UᵀU - I) S (VᵀV - I) ‖₁                         entry by entry; 0 if all tasks' vectors are orthogonal
    of two tasks, with A = U_iᵀU_j and B = V_iᵀV_j:          STI = ‖A S_j Bᵀ‖₁ + ‖Aᵀ S_i B‖₁

Singular-task interference is of Gargiulo et al. 2024, arXiv:2412.00081 (Task Singular Vectors), over the top r/T components of each
task. It grows with the singular values, so that it is given as a share of their sum, which matrices can be compared by.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor

from adarank.spectral.svd import Spectrum

ALL = "all"
"""What stands for all tasks together."""


def interferences(tops: Mapping[str, Spectrum]) -> list[tuple[str, str, float, float]]:
    """(task, other, STI, Σs) of each pair of tasks, then of all of them.

    Arguments:
        tops: task -> the components that count.
    """
    u, v = (torch.cat([getattr(top, key) for top in tops.values()], dim=1).double() for key in "uv")
    s = torch.cat([top.s for top in tops.values()]).double()
    across_u, across_v = _off_diagonal(u), _off_diagonal(v)
    columns = dict(zip(tops, torch.arange(s.numel()).split([top.s.numel() for top in tops.values()]), strict=True))
    entries = []
    for one, other in combinations(tops, 2):
        both = torch.cat([columns[one], columns[other]])
        square = (both[:, None], both[None, :])
        entries.append((one, other, _interference(across_u[square], s[both], across_v[square]), float(s[both].sum())))
    return [*entries, (ALL, ALL, _interference(across_u, s, across_v), float(s.sum()))]


def _off_diagonal(vectors: Tensor) -> Tensor:
    """VᵀV - I, the components of one task among themselves too, where they are orthogonal up to rounding."""
    product = vectors.T @ vectors
    return product - torch.eye(len(product), dtype=product.dtype, device=product.device)


def _interference(across_u: Tensor, s: Tensor, across_v: Tensor) -> float:
    return float(((across_u * s) @ across_v).abs().sum())
