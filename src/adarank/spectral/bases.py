"""Spectral bases: how a matrix's task vectors become the blocks that masks choose from.

    W = origin + Σ_g λ_g · U_g diag(b_g ∘ s_g) V_gᵀ

A basis gives one block (U, s, V) per task and, where tasks share a subspace, a last one that is common to all.

task_vectors   U_t, s_t, V_t = SVD(τ_t)                                        Task Arithmetic, CART, AdaRank
tsv_m          the top ⌊r/T⌋ of each task vector, made orthogonal together      Gargiulo et al., arXiv:2412.00081
iso_c          one common block: U, V of Σ_t τ_t, every s its mean              Marczak et al., arXiv:2502.04959
iso_cts        iso_c's top c, and (r - c)/T of each task's rest, orthogonal     the same

Components that are rounding (a frozen layer's, those beyond the rank of a merged LoRA in float64) have arbitrary vectors.
They are zero in the last three, which would give them a share of directions or of the mean, and count in no mean.

With thresholds the task vectors are first processed as TIES does (`sparsify/sign_election.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adarank.alignment.task_vectors import Deltas
from adarank.io.low_rank import Factors
from adarank.io.plugins import Registry
from adarank.sparsify.sign_election import Agreeing
from adarank.spectral.svd import (
    Spectrum,
    as_matrix,
    decompose,
    decompose_factors,
    determined,
    factors_of,
    orthogonalise,
    spectrum_of,
    spectrum_of_sum,
)

COMMON = "common"
SHARE = 0.8  # of the components that Iso-CTS gives to the common subspace


@dataclass(frozen=True)
class Basis:
    """A way from task vectors to blocks.

    Attributes:
        spectra: (task vectors of one matrix, its name) -> a spectrum per task, then the common one if there is one.
        common: there is a common block.
        scaled: what task vectors of all other tensors are multiplied by, given the number of tasks.
        thresholds: task -> magnitude below which TIES trims its task vector's entries; none: they are taken whole.
    """

    name: str
    spectra: Callable[[Deltas, str], list[Spectrum]]
    common: bool = False
    scaled: Callable[[int], float] = lambda tasks: 1 / tasks
    thresholds: Mapping[str, float] = field(default_factory=dict)

    def groups(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """Whom the blocks belong to, in their order."""
        return (*tasks, *([COMMON] if self.common else []))

    def processed(self, deltas: Deltas) -> Deltas:
        """The task vectors of one tensor that the blocks are of."""
        return Agreeing(deltas, self.thresholds) if self.thresholds else deltas


def task_vectors(deltas: Deltas, name: str) -> list[Spectrum]:
    """Every task vector's own SVD."""
    return [spectrum_of(deltas, task, name) for task in deltas]


def tsv_m(deltas: Deltas, name: str) -> list[Spectrum]:
    """The top ⌊r/T⌋ components of each task vector, all left and all right vectors made orthonormal together."""
    parts = []
    for task in deltas:  # one whole SVD in memory at a time, and one task vector: values() would hold two
        spectrum = spectrum_of(deltas, task, name)
        parts.append(top(spectrum, max(1, spectrum.count // len(deltas))))
    return together(parts)


def iso_c(deltas: Deltas, name: str) -> list[Spectrum]:
    """No block per task, and a common one: the summed task vector with all its singular values made equal."""
    shared = spectrum_of_sum(deltas, name)
    return [*(top(shared, 0) for _ in deltas), _flat([top(shared, shared.count)])[0]]


def iso_cts(deltas: Deltas, name: str, common: float = SHARE) -> list[Spectrum]:
    """A common subspace and one of its own for every task, orthonormal together, all singular values equal.

    Arguments:
        common: share of the components in the common subspace, up to what makes the rest divide by the tasks.
    """
    shared = spectrum_of_sum(deltas, name)
    each = own_components(shared.count, len(deltas), common)
    first = top(shared, shared.count - each * len(deltas))
    parts = []
    for task in deltas:
        rest, length = _outside(first.u, deltas, task, name)
        # beside the task vector, not beside itself: all of it may lie in the common subspace. The projection rounds too.
        parts.append(top(rest, each, 4 * length))
    # the common ones come first where vectors are made orthogonal, as the paper lays them
    shared_first = together([first, *parts])
    return _flat([*shared_first[1:], shared_first[0]])


def own_components(rank: int, tasks: int, common: float) -> int:
    """How many components of `rank` each task has for itself: (r - ⌊common·r⌋) / T, rounded as Iso-CTS' authors do."""
    return min(round((rank - int(common * rank)) / tasks), rank // tasks)


def _flaw(name: str, given: Any) -> str:
    """What is wrong with a basis of another package."""
    if not isinstance(given, Basis):
        return f"is a {type(given).__name__}, and a Basis of adarank.spectral.bases was needed"
    return "" if given.name == name else f"calls itself '{given.name}'"


_BUILT_IN = (
    Basis("task_vectors", task_vectors, scaled=lambda tasks: 1.0),
    Basis("tsv_m", tsv_m),
    Basis("iso_c", iso_c, common=True),
    Basis("iso_cts", iso_cts, common=True),
)
BASES: Registry[Basis] = Registry("adarank.bases", "basis", {basis.name: basis for basis in _BUILT_IN}, _flaw)
"""Name -> basis. Another package adds one, about the base, by an entry point of the group `adarank.bases`."""


def assembled(spectra: Sequence[Spectrum]) -> Tensor:
    """The sum of all blocks with all their components, (rows, columns)."""
    u, s, v = (torch.cat([getattr(part, key) for part in spectra], dim=-1) for key in "usv")
    return (u * s) @ v.T


def _outside(columns: Tensor, deltas: Deltas, task: str, name: str) -> tuple[Spectrum, Tensor]:
    """The SVD of what of a task vector lies outside of a subspace, and the norm of the whole.

    Arguments:
        columns: (rows, k) the subspace's basis.
    """
    factors = factors_of(deltas, task)
    if factors is None:
        matrix = as_matrix(deltas[task])
        return decompose(matrix - columns @ (columns.T @ matrix), name), torch.linalg.matrix_norm(matrix)
    outside = factors.left - columns @ (columns.T @ factors.left)
    return decompose_factors(Factors(outside, factors.core, factors.right), name), factors.norm()


def top(spectrum: Spectrum, count: int, largest: Tensor | None = None) -> Spectrum:
    """The first components, those that are rounding beside the largest set to zero."""
    there = determined(spectrum.s, largest)[:count]
    u, v = (part[:, :count] * there for part in (spectrum.u, spectrum.v))
    return Spectrum(u, spectrum.s[:count] * there, v, max(0, count - there.numel()))


def together(parts: Sequence[Spectrum]) -> list[Spectrum]:
    """The same blocks with the nearest vectors that are orthonormal over all of them.

    With more components than dimensions (more tasks than the rank has room for) the first ones fill it.
    """
    room = min(parts[0].u.shape[0], parts[0].v.shape[0])
    sizes, counts = list[int](), list[int]()
    for part in parts:
        left, room = min(part.count, room), max(0, room - part.count)
        sizes.append(min(part.s.numel(), left))
        counts.append(left)
    u, v = (
        orthogonalise(torch.cat([getattr(p, key)[:, :size] for p, size in zip(parts, sizes, strict=True)], dim=1))
        for key in "uv"
    )
    return [
        Spectrum(own_u, part.s[:size], own_v, count - size)
        for part, size, count, own_u, own_v in zip(
            parts, sizes, counts, u.split(sizes, dim=1), v.split(sizes, dim=1), strict=True
        )
    ]


def _flat(parts: Sequence[Spectrum]) -> list[Spectrum]:
    """The same blocks with every singular value the mean of all; zero ones stay zero."""
    every = torch.cat([part.s for part in parts])
    mean = every.sum() / every.count_nonzero().clamp(min=1)
    return [Spectrum(part.u, mean * (part.s > 0), part.v, part.beyond) for part in parts]
