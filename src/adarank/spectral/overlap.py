"""How much decomposed task vectors are in each other's way, and what masks change of it.

    U = [U_1 … U_T], V alike, S = diag(s_1, …, s_T)        components of each task vector of a matrix
    STI = ‖ (UᵀU - I) S (VᵀV - I) ‖₁                         entry by entry; 0 if all tasks' vectors are orthogonal
    of two tasks, with A = U_iᵀU_j and B = V_iᵀV_j:          STI = ‖A S_j Bᵀ‖₁ + ‖Aᵀ S_i B‖₁

Singular-task interference is of Gargiulo et al. 2024, arXiv:2412.00081 (Task Singular Vectors), over the top r/T components of each
task. It grows with the singular values, so that it is given as a share of their sum, which matrices can be compared by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from adarank.io import processes
from adarank.io.progress import advance, stage
from adarank.spectral.blocks import Blocks
from adarank.spectral.svd import Spectrum, effective_rank

ALL = "all"
"""What stands for all tasks together."""
POINTS = 24
"""Places along the rank at which a mean spectrum is recorded."""


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


def _each(names: Sequence[str]) -> Iterator[str]:
    with stage("Comparing the spectra", len(names)):
        for name in names:
            yield name
            advance()


def described(
    blocks: Mapping[str, Blocks], masks: Mapping[str, Tensor], lam: Mapping[str, Tensor], groups: Sequence[str]
) -> dict[str, Any]:
    """What masks and λ change of the task vectors' spectra and of their overlap, as plain data for a record.

    Before: all components with λ equal for all. After: σ multiplied by the mask, and a task's components by its λ. Of several
    processes each looks at the matrices whose factors it holds; all must call it.

    Arguments:
        blocks: matrix -> its blocks; tensors without components are left out.
        masks, lam: matrix -> (K,) mask, (groups,) λ.
        groups: whom the blocks belong to.

    Returns:
        `matrices`: matrix -> components, effective rank (95% of the energy) before and after per group, STI ÷ Σs of all before and after;
        `cosines`, `cosines_kept`: groups × groups over all matrices together; `spectra`, `spectra_kept`: group -> mean over
        matrices of σ_r ÷ σ_1 at `POINTS` places along the rank.
    """
    count = len(groups)
    gram, gram_kept = (torch.zeros(count, count, dtype=torch.float64) for _ in range(2))
    curves, curves_kept = (torch.zeros(count, POINTS, dtype=torch.float64) for _ in range(2))
    matrices: dict[str, dict[str, Any]] = {}
    here = list(blocks) if processes.size() == 1 else [name for name, block in blocks.items() if block.here]
    for name in _each(processes.shared_out(here)):
        block = blocks[name]
        if not block.components:
            continue
        factors = masks[name].to(block.s)
        spectra = _spectra(block)
        weighted = [
            Spectrum(part.u, part.s * mask * scale, part.v)
            for part, mask, scale in zip(spectra, factors.split(block.sizes), lam[name].to(block.s), strict=True)
        ]
        matrices[name] = _matrix(block.sizes, spectra, weighted, groups)
        for total, curve, parts in ((gram, curves, spectra), (gram_kept, curves_kept, weighted)):
            wholes = torch.stack([part.reconstruct().flatten() for part in parts])
            total += (wholes @ wholes.T).double().cpu()
            for row, (part, first) in enumerate(zip(parts, spectra, strict=True)):
                curve[row] += _curve(part.s.abs(), first.s)
    for total in (gram, gram_kept, curves, curves_kept):
        processes.add_up(total)
    by_process = processes.gathered(matrices)
    matrices = {name: of_one[name] for name in blocks for of_one in by_process if name in of_one}
    named = {group: place for place, group in enumerate(groups)}
    divisor = max(1, len(matrices))
    return {
        "groups": list(groups),
        "matrices": matrices,
        "cosines": _cosines(gram),
        "cosines_kept": _cosines(gram_kept),
        "spectra": {group: _rounded(curves[place] / divisor) for group, place in named.items()},
        "spectra_kept": {group: _rounded(curves_kept[place] / divisor) for group, place in named.items()},
    }


def _matrix(
    sizes: Sequence[int], spectra: Sequence[Spectrum], weighted: Sequence[Spectrum], groups: Sequence[str]
) -> dict[str, Any]:
    """One matrix's numbers before and after."""
    return {
        "components": list(sizes),
        "rank": [effective_rank(part.s) for part in spectra],
        "rank_kept": [effective_rank(part.s.abs().sort(descending=True).values) for part in weighted],
        "interference": _share(spectra, groups),
        "interference_kept": _share(weighted, groups),
    }


def _spectra(block: Blocks) -> list[Spectrum]:
    parts = zip(*(part.split(block.sizes, dim=-1) for part in (block.u, block.s, block.v)), strict=True)
    return [Spectrum(u, s, v) for u, s, v in parts]


def _share(parts: Sequence[Spectrum], groups: Sequence[str]) -> float:
    """STI ÷ Σs of the r/T components of each group that weigh most, whatever their sign."""
    tops = {}
    for group, part in zip(groups, parts, strict=True):
        most = max(1, min(part.u.shape[0], part.v.shape[0]) // len(groups))
        chosen = part.s.abs().argsort(descending=True, stable=True)[:most]
        tops[group] = Spectrum(part.u[:, chosen], part.s[chosen].abs(), part.v[:, chosen] * part.s[chosen].sign())
    *_, (_, _, interference, total) = interferences(tops)
    return round(interference / total, 4) if total > 0 else 0.0


def _curve(values: Tensor, before: Tensor) -> Tensor:
    """(POINTS,) values at even places along the rank, as shares of the largest before; zeros of none."""
    if not before.numel() or before[0] == 0:
        return torch.zeros(POINTS, dtype=torch.float64)
    places = torch.linspace(0, len(values) - 1, POINTS).round().long()
    return (values[places] / before[0]).double().cpu()


def _cosines(gram: Tensor) -> list[list[float]]:
    norms = gram.diagonal().clamp(min=0).sqrt()
    scale = torch.outer(norms, norms)
    return [_rounded(row) for row in torch.where(scale > 0, gram / scale, torch.zeros_like(gram))]


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
