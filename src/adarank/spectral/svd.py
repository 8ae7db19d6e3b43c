"""The singular value decomposition of task vectors.

τ = U diag(s) Vᵀ        s ≥ 0, descending; r = min(rows, columns) singular components

Of a task vector that is known as factors L C R, as those of LoRA adapters are, only the components that it can have are made:
QR of L and of Rᵀ, and the SVD of a matrix as small as the factors. The others are zero, and count wherever a share of r is meant.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adarank.alignment.task_vectors import TaskVectors
from adarank.errors import AdaptationError
from adarank.io.low_rank import Factors, stacked

_STORE: ContextVar[Path | None] = ContextVar("spectra", default=None)


@dataclass(frozen=True)
class Spectrum:
    """A decomposed matrix.

    Attributes:
        u: (rows, r) left singular vectors as columns.
        s: (r,) singular values, descending.
        v: (columns, r) right singular vectors as columns.
        beyond: how many components more the matrix has, which are zero and are not there.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    beyond: int = 0

    @property
    def count(self) -> int:
        """How many components the matrix has, zero ones that are not there among them."""
        return self.s.numel() + self.beyond

    def first(self, count: int) -> Spectrum:
        """The first components; those that are not there are zero values under zero vectors."""
        missing = max(0, count - self.s.numel())
        u, v = (torch.cat([p[:, :count], p.new_zeros(len(p), missing)], dim=1) for p in (self.u, self.v))
        return Spectrum(u, torch.cat([self.s[:count], self.s.new_zeros(missing)]), v)

    def values(self) -> Tensor:
        """(count,) all singular values."""
        return torch.cat([self.s, self.s.new_zeros(self.beyond)]) if self.beyond else self.s

    def reconstruct(self, keep: int | None = None) -> Tensor:
        """The matrix from its first `keep` components (all if not given), shape (rows, columns)."""
        k = self.s.numel() if keep is None else keep
        return (self.u[:, :k] * self.s[:k]) @ self.v[:, :k].T


def as_matrix(tensor: Tensor) -> Tensor:
    """A tensor as (out, everything else): kernels (out, in, k, k) become (out, in·k·k)."""
    return tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(-1, 1)


@contextmanager
def stored_spectra(folder: Path) -> Iterator[None]:
    """Inside this block every SVD is done once: `decompose` keeps its result in `folder` and finds it there again.

    Spectra are found by the matrix's values, so they serve whichever method, setting or run asks for the same
    matrix. They take about 1.3 times (square: 2 times) the room of the matrices.
    """
    folder.mkdir(parents=True, exist_ok=True)
    token = _STORE.set(folder)
    try:
        yield
    finally:
        _STORE.reset(token)


def decompose(matrix: Tensor, name: str = "matrix") -> Spectrum:
    """The SVD of `matrix` (of any shape, taken as (out, rest)), in its own precision.

    Where the fast driver does not converge the SVD is done again in float64 and cast back.

    Raises:
        AdaptationError: neither converges; names the tensor.
    """
    flat = as_matrix(matrix)
    folder = _STORE.get()
    if folder is None:
        return _svd(flat, name)
    content = flat.detach().cpu().contiguous()
    key = hashlib.sha256(repr((tuple(flat.shape), str(flat.dtype), flat.device.type)).encode())
    key.update(content.view(torch.uint8).numpy().tobytes() if content.numel() else b"")
    path = folder / f"{key.hexdigest()}.safetensors"
    if path.exists():
        tensors = load_file(path, device=str(flat.device))
        return Spectrum(tensors["u"], tensors["s"], tensors["v"])
    spectrum = _svd(flat, name)
    partial = path.with_suffix(".partial")
    save_file({"u": spectrum.u, "s": spectrum.s, "v": spectrum.v}, partial)
    partial.replace(path)
    return spectrum


def spectrum_of(deltas: Mapping[str, Tensor], task: str, name: str) -> Spectrum:
    """The SVD of a task's vector of one matrix, from its factors where they are known."""
    factors = factors_of(deltas, task)
    return decompose(deltas[task], name) if factors is None else decompose_factors(factors, name)


def spectrum_of_sum(deltas: Mapping[str, Tensor], name: str) -> Spectrum:
    """The SVD of the sum of all tasks' vectors of one matrix, from their factors where all are known."""
    known = [factors for task in deltas if (factors := factors_of(deltas, task)) is not None]
    if len(known) == len(deltas):
        return decompose_factors(stacked(known, [1.0] * len(known)), name)
    tasks = iter(deltas)
    total = deltas[next(tasks)].clone()
    for task in tasks:
        total.add_(deltas[task])
    return decompose(total, name)


def factors_of(deltas: Mapping[str, Tensor], task: str) -> Factors | None:
    """A task's vector as factors; None where only the whole is known."""
    return deltas.factors(task) if isinstance(deltas, TaskVectors) else None


def decompose_factors(factors: Factors, name: str = "matrix") -> Spectrum:
    """The SVD of L C R without multiplying it out, where the factors are thin.

    Raises:
        AdaptationError: the SVD does not converge; names the tensor.
    """
    rows, columns = factors.shape
    if factors.rank >= min(rows, columns):
        return decompose(factors.dense(), name)
    if factors.rank == 0:
        empty = factors.core.new_zeros(0)
        return Spectrum(empty.expand(rows, 0), empty, empty.expand(columns, 0), min(rows, columns))
    thin = factors.orthogonal()
    inner = _svd(thin.core, name)
    return Spectrum(thin.left @ inner.u, inner.s, thin.right.T @ inner.v, min(rows, columns) - inner.s.numel())


def singular_values(deltas: Mapping[str, Tensor], task: str, name: str) -> Tensor:
    """(r,) all singular values of a task's vector of one matrix, without its vectors, which take most of an SVD's time.

    Raises:
        AdaptationError: they do not converge; names the tensor.
    """
    factors = factors_of(deltas, task)
    if factors is not None:
        return decompose_factors(factors, name).values()
    return _converged(as_matrix(deltas[task]), name, lambda matrix: (torch.linalg.svdvals(matrix),))[0]


def _svd(flat: Tensor, name: str) -> Spectrum:
    u, s, vh = _converged(flat, name, lambda matrix: torch.linalg.svd(matrix, full_matrices=False))
    return Spectrum(u.contiguous(), s.contiguous(), vh.T.contiguous())


def _converged(flat: Tensor, name: str, factorise: Callable[[Tensor], Sequence[Tensor]]) -> list[Tensor]:
    """What `factorise` gives, in the matrix's dtype; done again in float64 where it does not converge."""
    for dtype in (flat.dtype, torch.float64):
        try:
            parts = factorise(flat.to(dtype))
        except RuntimeError as error:  # torch.linalg.LinAlgError, which PyTorch's stubs do not name
            if "converge" not in str(error):
                raise
            continue
        if all(bool(torch.isfinite(part).all()) for part in parts):
            return [part.to(flat.dtype) for part in parts]
    raise AdaptationError(
        f"{name}: the SVD of its task vector does not converge, in float64 either. Check the tensor for extreme values."
    )


def energy(s: Tensor) -> float:
    """Σσ²: the squared Frobenius norm of the matrix."""
    return float(s.double().square().sum())


def effective_rank(s: Tensor, share: float = 0.95) -> int:
    """The number of top components that hold `share` of the energy (AdaRank, Figure 3). 0 for a zero matrix."""
    cumulative = s.double().square().cumsum(0)
    if cumulative.numel() == 0 or cumulative[-1] == 0:
        return 0
    return int((cumulative < share * cumulative[-1]).sum()) + 1


def determined(s: Tensor, largest: Tensor | None = None) -> Tensor:
    """(r,) bool: the components that are more than rounding. Of the others the singular vectors are arbitrary.

    What should be 0 comes out as up to ε(2 + √r/2) of the largest: twice what was seen for r from 32 to 768 in float32. The
    smallest of real task vectors lie above (21 ε of r = 384), so the bound must not be generous.

    Arguments:
        s: singular values.
        largest: what they are rounding beside; by default the largest of them.
    """
    beside = largest if largest is not None else s[:1].sum()  # of no components: 0
    return s > (2 + math.sqrt(s.numel()) / 2) * torch.finfo(s.dtype).eps * beside


def orthogonalise(columns: Tensor) -> Tensor:
    """The matrix with orthonormal columns nearest to `columns` (orthogonal Procrustes): P Qᵀ of its SVD P D Qᵀ.

    Where columns depend on each other there is no nearest one; P and Q of the directions that are there alone then
    give the nearest partial isometry, in which equal columns share one direction and zero columns stay zero.

    Arguments:
        columns: (rows, k) with k ≤ rows.
    """
    spectrum = decompose(columns, "concatenated singular vectors")
    there = determined(spectrum.s)
    return spectrum.u[:, there] @ spectrum.v[:, there].T


def low_rank_sum(
    name: str, origin: Tensor, deltas: Mapping[str, Tensor], cut: Callable[[Tensor], tuple[int, float]]
) -> Tensor:
    """origin + Σ_t c_t · top_k(δ_t), with one SVD in memory at a time. `cut` gives k and c_t from all singular values."""
    total = origin.clone()
    for task in deltas:  # not values(): its variable would hold one task vector while the next is made
        spectrum = spectrum_of(deltas, task, name)
        k, scale = cut(spectrum.values())
        total.add_(spectrum.reconstruct(k).reshape(origin.shape), alpha=scale)
    return total
