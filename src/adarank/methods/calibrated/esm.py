"""ESM: task vectors in the directions in which they move a layer's outputs, with what is large made larger still.

    G_t = X_tᵀX_t / n_t                                   of the n_t vectors that expert t's layer is given
    P_t, e_t = eigenvectors and eigenvalues of τ_t G_t τ_tᵀ: the principal directions of the outputs' shift X_t τ_tᵀ
    s_t = (e_t / mean e_t)^0.15, divided by its mean      of the first k = ⌊out / T⌋
    U = [P_t diag(s_t)]_t,   V = [p_t² diag(s_t) P_tᵀ τ_t]_t,   p_t = ‖τ_t‖ / mean_t ‖τ_t‖
    V: each column times the square of (its norm / the columns' mean norm)
    Δ = 2 X(U) X(V),   X(A) = mean singular value of A · nearest matrix to A with orthonormal columns (or rows)
    merged = base + λ (‖Δ‖ / mean ‖Δ‖ over the layers of its kind)² Δ
    merged = base + λ · mean_t τ_t                        all other tensors

These are the steps of the authors' code for vision (MIT licence). A kind of layer is a name without its numbers. Attention's
output projections are merged as TSV-M merges them, and so are matrices without statistics. Three things differ. The principal
directions are those of all positions' outputs through the Gram matrix, so they are complete however few inputs there are; where
they are fewer than outputs, the authors' code fills up with unit vectors. Padding does not count. Directions along which nothing
moves are left out.

"Essential Subspace Merging", arXiv:2602.20208.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from fnmatch import fnmatchcase
from statistics import fmean
from typing import ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from adarank.methods.base import AlignedCheckpoints, Deltas, OriginKind, length, scaled_mean
from adarank.methods.calibrated.base import CalibratedMethod, Gathers
from adarank.spectral.bases import assembled, tsv_m
from adarank.spectral.svd import decompose, determined

_OUTPUT_PROJECTIONS = (
    "*.out_proj.weight",
    "*.o_proj.weight",
    "*.attention.output.dense.weight",
    "*.attn.c_proj.weight",
)


class ESM(CalibratedMethod):
    """Essential subspace merging: low-rank task vectors by what they do to activations, orthogonal to each other.

    Arguments:
        spread: exponent of the eigenvalues, which directions are scaled by.
        polarise: exponent of the three scalings by norms: of tasks, of input columns, of layers.
        as_tsv_m: patterns over names of matrices that TSV-M's rule merges in place of this one.
        scale: λ, multiplies the whole merged task vector.
        batch_size: inputs of a forward pass. Changes time and memory, not the result.
    """

    name: ClassVar[str] = "esm"
    origin: ClassVar[OriginKind] = "pretrained"
    formula: ClassVar[str] = (
        "W = W₀ + λ c 2 X(U) X(V); U, V = [top_{out/T} of P_t, P_tᵀτ_t]_t, P_t of the PCA of X_t τ_tᵀ"
    )
    source: ClassVar[str] = "arXiv:2602.20208, as released"
    spectral: ClassVar[bool] = True
    passes: ClassVar[int] = 2
    rest: ClassVar[str] = "as tsv_m, or by the mean task vector"

    examples: int = Field(32, ge=1, description="inputs of each task's adapt split that are looked at, at most")
    spread: float = Field(0.15, ge=0, description="exponent of the eigenvalues")
    polarise: float = Field(2.0, ge=0, description="exponent of the scalings by norms")
    as_tsv_m: tuple[str, ...] = Field(_OUTPUT_PROJECTIONS, description="matrices merged as tsv_m does")
    scale: float = Field(1.0, alias="lambda", description="λ")
    batch_size: int = Field(32, ge=1, description="inputs of a forward pass; changes time and memory only")
    _layer_scales: Mapping[str, float] = PrivateAttr(default_factory=dict)

    @property
    def inputs_at_once(self) -> int:
        """Inputs of one forward pass while statistics are taken."""
        return self.batch_size

    def gathered(self, gathers: Gathers) -> ESM:
        """The same method with the experts' Gram matrices."""
        return self.with_statistics(gathers.gram_matrices(torch.float64))

    def prepare(self, network: AlignedCheckpoints, device: torch.device | str) -> ESM:
        """The method with the scale of each matrix beside the others of its kind. Merges every matrix once."""
        sizes: dict[str, dict[str, float]] = defaultdict(dict)
        for name in network.merged():
            if network.choices[name].action == "decompose":
                origin = network.origin(name, self.origin, device)
                merged = self._merge(name, network.deltas(name, origin))
                sizes[re.sub(r"\d+", "*", name)][name] = length(merged)
        prepared = self.model_copy()
        prepared._layer_scales = {
            name: (size / fmean(kind.values())) ** self.polarise
            for kind in sizes.values()
            for name, size in kind.items()
            if any(kind.values())
        }
        return prepared

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        factor = self.scale * self._layer_scales.get(name, 1.0)
        return origin + factor * self._merge(name, deltas).reshape(origin.shape).to(origin.dtype)

    def merge_other(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged tensor that is not decomposed."""
        return scaled_mean(origin, deltas, self.scale)

    def held(self, shape: tuple[int, ...], decomposed: bool) -> int:
        """Numbers of four bytes held for a tensor while its statistics are taken."""
        return 2 * shape[1] ** 2 if decomposed and len(shape) == 2 else 0

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return 23 if decomposed else 2  # U, V, their spectra and products, in float64

    def solving(self, shape: tuple[int, ...]) -> int:
        """Numbers of four bytes held beside: a Gram matrix, the outputs' covariance and its eigenvectors."""
        return 2 * 6 * max(shape[0], torch.Size(shape[1:]).numel()) ** 2

    def _merge(self, name: str, deltas: Deltas) -> Tensor:
        """Δ before layers are compared, (rows, columns)."""
        plain = any(fnmatchcase(name, pattern) for pattern in self.as_tsv_m)
        if plain or name not in self.statistics.names:
            return assembled(tsv_m(deltas, name))
        turned = name in self.statistics.inputs_first
        lefts, rights, norms = [], [], []
        for task in deltas:
            delta = (deltas[task].T if turned else deltas[task]).double()
            directions = self._directions(delta, self.statistics.read(name, task).to(delta), len(deltas))
            norms.append(length(delta))
            lefts.append(directions[0])
            rights.append(norms[-1] ** self.polarise * directions[1])
        u, v = torch.cat(lefts, dim=1), torch.cat(rights)
        if not v.any():
            return torch.zeros_like(deltas[next(iter(deltas))])
        columns = torch.linalg.vector_norm(v, dim=0)
        v = v / fmean(norms) ** self.polarise * (columns / columns.mean()) ** self.polarise
        merged = 2 * _orthogonal(u, name) @ _orthogonal(v, name)
        return merged.T if turned else merged

    def _directions(self, delta: Tensor, gram: Tensor, tasks: int) -> tuple[Tensor, Tensor]:
        """P_t diag(s_t), (out, k), and diag(s_t) P_tᵀ τ_t, (k, in)."""
        values, vectors = torch.linalg.eigh(delta @ gram @ delta.T)
        count = max(1, len(values) // tasks)
        values, vectors = values.flip(0)[:count].clamp(min=0), vectors.flip(1)[:, :count]
        there = determined(values.sqrt().float())  # singular values of the shift, of activations in float32
        if not there.any():
            return torch.zeros_like(vectors), torch.zeros_like(delta[:count])
        scale = (values / values.mean()) ** self.spread * there
        scale = scale / scale.mean()
        return vectors * scale, scale[:, None] * (vectors.T @ delta)


def _orthogonal(matrix: Tensor, name: str) -> Tensor:
    """The nearest matrix with orthonormal columns (rows), times the mean singular value."""
    spectrum = decompose(matrix, name)
    there = determined(spectrum.s)
    return spectrum.s.mean() * spectrum.u[:, there] @ spectrum.v[:, there].T
