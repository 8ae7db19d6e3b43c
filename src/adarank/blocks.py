"""Everything spectral is one sum:

    W = origin + Σ_t λ_t · U_t diag(b_t ∘ s_t) V_tᵀ        b ∈ {0, 1}

and this file holds it, with its gradient in closed form. With G = dL/dW, for component r of task t:

    g_r = u_rᵀ G v_r        dL/db_r = λ_t s_r g_r        dL/dλ_t = Σ_r b_r s_r g_r

Neither needs autograd through U and V. A component's task is all the sum knows: whether the blocks come from
plain, centred or orthogonalised task vectors is not its business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adarank.spectrum import Spectrum, as_matrix, decompose
from adarank.task_vectors import Network, OriginKind


@dataclass(frozen=True)
class Gradient:
    """dL/dλ, shape (tasks,), and dL/db, shape (components,)."""

    lam: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Blocks:
    """One tensor's origin, task vectors and spectra.

    Attributes:
        origin: the tensor's origin, in its own shape.
        dense: (tasks, rows, columns): each task's block with all its components.
        u, s, v: (rows, K), (K,), (columns, K): the components of all tasks side by side. K = 0 for a tensor
            that is only scaled.
        sizes: components per task; they sum to K.
    """

    origin: Tensor
    dense: Tensor
    u: Tensor
    s: Tensor
    v: Tensor
    sizes: tuple[int, ...]

    @property
    def components(self) -> int:
        return int(self.s.numel())

    def compose(self, lam: Tensor, mask: Tensor) -> Tensor:
        """The merged tensor, in the origin's shape and on its device.

        Each task costs only its fewer components: those kept, or those pruned taken away from the dense
        task vector. Live adaptation and the `masked` method both call this, so what ships is what was adapted.

        Arguments:
            lam: (tasks,) coefficients, on the CPU.
            mask: (K,) bool, True for kept, on the CPU.
        """
        coefficients = lam.tolist()
        total = as_matrix(self.origin).clone()
        signed = []
        shares = self._cheaper(mask)
        for task, (from_dense, index) in enumerate(shares):
            if from_dense:
                total.add_(self.dense[task], alpha=coefficients[task])
            signed.append(lam.new_full(index.shape, -coefficients[task] if from_dense else coefficients[task]))
        chosen = torch.cat([index for _, index in shares]).to(self.s.device)
        if chosen.numel():
            factors = self.s[chosen] * torch.cat(signed).to(self.s)
            total.addmm_(self.u[:, chosen] * factors, self.v[:, chosen].T)
        return total.reshape(self.origin.shape)

    def gradient(self, grad: Tensor, lam: Tensor, mask: Tensor, learn_masks: bool) -> Gradient:
        """Gradients of every λ and every mask entry from G = dL/dW, in closed form, on G's device.

        Arguments:
            grad: dL/dW, in the origin's shape.
            lam, mask: as for `compose`.
            learn_masks: without it only λ's gradient is computed, at the cost of the fewer components.
        """
        flat = as_matrix(grad)
        if not (learn_masks and self.components):
            return Gradient(self._lambda_gradient(flat, mask), torch.zeros_like(self.s))
        inner = self._inner(flat, None) * self.s
        kept = torch.where(mask.to(inner.device), inner, 0.0)
        by_task = torch.stack([part.sum() for part in kept.split(self.sizes)])
        owner = lam.repeat_interleave(torch.tensor(self.sizes))
        return Gradient(by_task, inner * owner.to(inner))

    def _lambda_gradient(self, flat: Tensor, mask: Tensor) -> Tensor:
        values = []
        for task, (from_dense, index) in enumerate(self._cheaper(mask)):
            chosen = index.to(self.s.device)
            rest = (self._inner(flat, chosen) * self.s[chosen]).sum() if index.numel() else flat.new_zeros(())
            values.append((self.dense[task] * flat).sum() - rest if from_dense else rest)
        return torch.stack(values)

    def _inner(self, flat: Tensor, index: Tensor | None) -> Tensor:
        """u_rᵀ G v_r for the components in `index` (all if None)."""
        u, v = (self.u, self.v) if index is None else (self.u[:, index], self.v[:, index])
        inner: Tensor = torch.linalg.vecdot(u, flat @ v, dim=0)
        return inner

    def _cheaper(self, mask: Tensor) -> list[tuple[bool, Tensor]]:
        """Per task: whether to start from its dense block, and the components to add (or to take away then)."""
        shares = []
        start = 0
        for own in mask.split(self.sizes):
            from_dense = 2 * int(own.sum()) > own.numel() or own.numel() == 0
            shares.append((from_dense, torch.nonzero(own != from_dense).squeeze(1) + start))
            start += own.numel()
        return shares


def build_blocks(network: Network, origin_kind: OriginKind, device: torch.device | str = "cpu") -> dict[str, Blocks]:
    """Origin, task vectors and spectra of every merged tensor of a network."""
    blocks = {}
    for name in network.merged():
        origin = network.origin(name, origin_kind, device)
        deltas = network.deltas(name, origin)
        decomposed = network.choices[name].action == "decompose"
        blocks[name] = task_vector_blocks(origin, deltas, name) if decomposed else scaled_block(origin, deltas)
    return blocks


def scaled_block(origin: Tensor, deltas: Mapping[str, Tensor]) -> Blocks:
    """Blocks of a tensor that is only scaled: origin + Σ λ_t δ_t."""
    dense = torch.stack([as_matrix(delta) if delta.dim() else delta.reshape(1, 1) for delta in deltas.values()])
    empty = origin.new_zeros((dense.shape[1], 0))
    return Blocks(origin, dense, empty, origin.new_zeros(0), origin.new_zeros((dense.shape[2], 0)), (0,) * len(dense))


def task_vector_blocks(origin: Tensor, deltas: Mapping[str, Tensor], name: str = "matrix") -> Blocks:
    """Blocks of a matrix from the plain SVD of each task vector: the basis of Task Arithmetic and of CART."""
    dense = [as_matrix(delta) for delta in deltas.values()]
    return from_spectra(origin, dense, [decompose(delta, name) for delta in dense])


def from_spectra(origin: Tensor, dense: Sequence[Tensor], spectra: Sequence[Spectrum]) -> Blocks:
    """Blocks from one spectrum per task; `dense[t]` is what the whole of `spectra[t]` multiplies out to."""
    return Blocks(
        origin,
        torch.stack(list(dense)),
        torch.cat([s.u for s in spectra], dim=1),
        torch.cat([s.s for s in spectra]),
        torch.cat([s.v for s in spectra], dim=1),
        tuple(s.s.numel() for s in spectra),
    )
