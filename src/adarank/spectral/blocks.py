"""Everything spectral is one sum:

    W = origin + Σ_t λ_t · U_t diag(b_t ∘ s_t) V_tᵀ        b ∈ {0, 1}, or real numbers (soft masks)

and this file holds it, with its gradient in closed form. With G = dL/dW, for component r of task t:

    g_r = u_rᵀ G v_r        dL/db_r = λ_t s_r g_r        dL/dλ_t = Σ_r b_r s_r g_r

Neither needs autograd through U and V. A component's task is all the sum knows: whether the blocks come from
plain, centred or orthogonalised task vectors is not its business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adarank.alignment.task_vectors import AlignedCheckpoints, OriginKind
from adarank.io import processes
from adarank.io.progress import advance, stage
from adarank.spectral.bases import BASES, Basis
from adarank.spectral.svd import Spectrum, as_matrix, factors_of


@dataclass(frozen=True)
class Gradient:
    """dL/dλ, shape (tasks,), and dL/db, shape (components,)."""

    lam: Tensor
    mask: Tensor


class Reread(Sequence[Tensor]):
    """Task vectors that are read anew whenever they are looked at, so that one is in memory at a time."""

    def __init__(self, read: Callable[[int], Tensor], count: int) -> None:
        self._read, self._count = read, count

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < self._count:
            raise IndexError(number)
        return self._read(number)

    def __len__(self) -> int:
        return self._count


@dataclass(frozen=True)
class Blocks:
    """One tensor's origin, task vectors and spectra.

    Attributes:
        origin: the tensor's origin, in its own shape.
        wholes: each task's block with all its components, (rows, columns). None where no one has asked for it
            yet: it is multiplied out then and kept, as few starts ever need it.
        u, s, v: (rows, K), (K,), (columns, K): the components of all tasks side by side. K = 0 for a tensor
            that is only scaled.
        sizes: components per task; they sum to K.
        counts: components that each task's matrix has: with those that are zero and are not there. Empty: `sizes`.
    """

    origin: Tensor
    wholes: list[Tensor | None] | Reread
    u: Tensor
    s: Tensor
    v: Tensor
    sizes: tuple[int, ...]
    counts: tuple[int, ...] = ()

    @property
    def components(self) -> int:
        """Number of components of all tasks together."""
        return int(self.s.numel())

    @property
    def here(self) -> bool:
        """Whether origin, task vectors and factors are in this process. Of the others it has what `outline` leaves."""
        return not self.origin.is_meta

    def outline(self) -> Blocks:
        """The same without numbers, but for the singular values."""
        origin, u, v = (part.new_empty(part.shape, device="meta") for part in (self.origin, self.u, self.v))
        return replace(self, origin=origin, wholes=[None] * len(self.sizes), u=u, s=self.s, v=v)

    def to(self, device: torch.device | str) -> Blocks:
        """The same on a device; what is not here stays where it is."""

        def put(tensor: Tensor | None) -> Any:
            return tensor if tensor is None or tensor.is_meta else tensor.to(device)

        origin, u, s, v = map(put, (self.origin, self.u, self.s, self.v))
        wholes = [put(whole) for whole in self.wholes]
        return replace(self, origin=origin, wholes=wholes, u=u, s=s, v=v)

    def compose(self, lam: Tensor, mask: Tensor) -> Tensor:
        """The merged tensor, in the origin's shape and on its device.

        With a binary mask each task costs only its fewer components: those kept, or those pruned taken away from
        the whole task vector. Live adaptation and the `masked` method both call this, so what ships is what was adapted.

        Arguments:
            lam: (tasks,) coefficients, on the CPU.
            mask: (K,) bool, True for kept, or float: what each component is multiplied by; on the CPU.
        """
        if mask.is_floating_point() and self.components:
            return self._compose_soft(lam, mask)
        coefficients = lam.tolist()
        total = as_matrix(self.origin).clone()
        if not self.components:  # a tensor that is only scaled; there are many, and most are small
            for task, coefficient in enumerate(coefficients):
                total.add_(self._whole(task), alpha=coefficient)
            return total.reshape(self.origin.shape)
        signed = []
        shares = self._cheaper(mask)
        for task, (from_whole, index) in enumerate(shares):
            if from_whole:
                total.add_(self._whole(task), alpha=coefficients[task])
            signed.append(lam.new_full(index.shape, -coefficients[task] if from_whole else coefficients[task]))
        chosen = torch.cat([index for _, index in shares]).to(self.s.device)
        if chosen.numel():
            factors = self.s[chosen] * torch.cat(signed).to(self.s)
            total.addmm_(self.u[:, chosen] * factors, self.v[:, chosen].T)
        return total.reshape(self.origin.shape)

    def factors(self, lam: Tensor, mask: Tensor) -> Tensor:
        """(K,) λ b s of every component, on the origin's device."""
        return self.s * (self._owner(lam) * mask).to(self.s)

    def _compose_soft(self, lam: Tensor, mask: Tensor) -> Tensor:
        factors = self.factors(lam, mask)
        u, v = self.u, self.v
        chosen = mask.nonzero().squeeze(1)
        if 2 * len(chosen) < len(mask):  # as at the start, where most are zero
            index = chosen.to(self.s.device)
            u, v, factors = u[:, index], v[:, index], factors[index]
        return torch.addmm(as_matrix(self.origin), *scaled(u, factors, v)).reshape(self.origin.shape)

    def _owner(self, lam: Tensor) -> Tensor:
        """(K,) the λ of each component's task."""
        return lam.repeat_interleave(torch.tensor(self.sizes))

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
        return self.gradient_of(self._inner(flat, None), lam, mask)

    def gradient_of(self, inner: Tensor, lam: Tensor, mask: Tensor) -> Gradient:
        """The gradient, given (K,) u_rᵀ G v_r."""
        inner = inner * self.s
        by_task = torch.stack([part.sum() for part in (inner * mask.to(inner)).split(self.sizes)])
        return Gradient(by_task, inner * self._owner(lam).to(inner))

    def _lambda_gradient(self, flat: Tensor, mask: Tensor) -> Tensor:
        if not self.components:
            return torch.stack([(self._whole(task) * flat).sum() for task in range(len(self.sizes))])
        values = []
        for task, (from_whole, index) in enumerate(self._cheaper(mask)):
            chosen = index.to(self.s.device)
            rest = (self._inner(flat, chosen) * self.s[chosen]).sum() if index.numel() else flat.new_zeros(())
            values.append((self._whole(task) * flat).sum() - rest if from_whole else rest)
        return torch.stack(values)

    def _inner(self, flat: Tensor, index: Tensor | None) -> Tensor:
        """u_rᵀ G v_r for the components in `index` (all if None)."""
        u, v = (self.u, self.v) if index is None else (self.u[:, index], self.v[:, index])
        return inner_products(u, flat, v)

    def multiply_out(self) -> None:
        """Make every task's whole block now."""
        for task in range(len(self.sizes)):
            self._whole(task)

    def _whole(self, task: int) -> Tensor:
        whole = self.wholes[task]
        if whole is None:
            columns = slice(sum(self.sizes[:task]), sum(self.sizes[: task + 1]))
            whole = (self.u[:, columns] * self.s[columns]) @ self.v[:, columns].T
            assert isinstance(self.wholes, list)  # what is read anew is there
            self.wholes[task] = whole
        return whole

    def _cheaper(self, mask: Tensor) -> list[tuple[bool, Tensor]]:
        """Per task: whether to start from its whole block, and the components to add (or to take away then)."""
        shares = []
        start = 0
        for part in mask.split(self.sizes):
            from_whole = 2 * int(part.sum()) > part.numel()  # a task without components adds nothing
            shares.append((from_whole, torch.nonzero(part != from_whole).squeeze(1) + start))
            start += part.numel()
        return shares


def scaled(u: Tensor, factors: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices whose product is u diag(factors) vᵀ. The shorter one is scaled, so that the copy is the smaller."""
    return (u, (v * factors).T) if len(u) > len(v) else (u * factors, v.T)


def inner_products(u: Tensor, grad: Tensor, v: Tensor) -> Tensor:
    """(K,) u_rᵀ G v_r of every component r, summed in float32 at least.

    One product and one pass in place over it, on the shorter side: little more than the product alone takes.

    Arguments:
        u, grad, v: (rows, K), (rows, columns), (columns, K).
    """
    products = (grad.T @ u).mul_(v) if len(u) > len(v) else (grad @ v).mul_(u)
    return products.sum(0, dtype=torch.promote_types(products.dtype, torch.float32))


def build_blocks(
    network: AlignedCheckpoints,
    origin_kind: OriginKind,
    device: torch.device | str = "cpu",
    spectra: bool = True,
    basis: Basis = BASES["task_vectors"],
    names: Sequence[str] | None = None,
    kept: Callable[[int, Callable[[], Blocks]], Blocks] | None = None,
    whole: bool = False,
) -> dict[str, Blocks]:
    """Origin and task vectors of every merged tensor of a network, decomposed where the network says so.

    Of several processes each makes its share, and has outlines of the others'. All must call it.

    Arguments:
        basis: how matrices are decomposed.
        spectra: False where all components stay kept: then no matrix needs an SVD.
        names: of these tensors alone.
        kept: given a tensor's number and what makes its blocks, gives them, from wherever it keeps them.
        whole: each process has the others' too.
    """

    def made(name: str) -> Blocks:
        origin = network.origin(name, origin_kind, device)
        deltas = network.deltas(name, origin, origin_kind)
        decomposed = spectra and network.choices[name].action == "decompose"
        block = task_vector_blocks(origin, deltas, name, basis) if decomposed else scaled_block(origin, deltas, basis)
        advance()
        return block

    names = network.merged() if names is None else names
    holder = dict(zip(names, holders(network, names, origin_kind, spectra), strict=True))
    mine = {name: number for number, name in enumerate(names) if holder[name] == processes.rank()}
    blocks: dict[str, Blocks] = {}
    with stage("Task vectors", len(mine)):
        for name, number in mine.items():
            blocks[name] = made(name) if kept is None else kept(number, partial(made, name))
    if whole and processes.size() > 1:
        for name in names:  # one at a time, as they are large
            received = processes.from_owner(holder[name], blocks[name].to("cpu") if name in mine else None)
            blocks.setdefault(name, received.to(device))
    elif processes.size() > 1:
        for of_one in processes.gathered({name: block.outline().to("cpu") for name, block in blocks.items()}):
            blocks = {name: outline.to(device) for name, outline in of_one.items()} | blocks
    return {name: blocks[name] for name in names}


def holders(network: AlignedCheckpoints, names: Sequence[str], kind: OriginKind, spectra: bool) -> list[int]:
    """The rank of the process that holds each tensor's blocks, so that all hold about as many numbers.

    Arguments:
        spectra: as for `build_blocks`.
    """
    sizes = []
    for name in names:
        numel, decomposed = network.tensors[name].numel, spectra and network.choices[name].action == "decompose"
        parts = factor_numbers(network, name, kind) if decomposed else len(network.tasks) * numel
        sizes.append(numel + parts)
    return processes.balanced(sizes)


def factor_numbers(network: AlignedCheckpoints, name: str, kind: OriginKind) -> int:
    """Numbers in U and V of one matrix, all tasks together."""
    rows = network.tensors[name].shape[0]
    columns = network.tensors[name].numel // max(1, rows)
    return sum(network.components(name, kind)) * (rows + columns)


def scaled_block(
    origin: Tensor, deltas: Mapping[str, Tensor], basis: Basis = BASES["task_vectors"], reread: bool = False
) -> Blocks:
    """Blocks of a tensor that is only scaled: origin + Σ λ_t δ_t, or its mean where the basis says so.

    Arguments:
        reread: task vectors are looked up in `deltas` whenever they are needed, not kept.
    """
    factor = basis.scaled(len(deltas))
    vectors = basis.processed(deltas)
    nothing = origin.new_zeros(()).expand(as_matrix(origin).shape)
    tasks = list(vectors)

    def whole(number: int) -> Tensor:
        if number == len(tasks):  # nothing is common to tensors without components
            return nothing
        known = factors_of(vectors, tasks[number])
        delta = nothing if known is not None and known.rank == 0 else as_matrix(vectors[tasks[number]])
        return delta if factor == 1 else delta * factor

    rows, columns = nothing.shape
    count = len(tasks) + basis.common
    wholes: list[Tensor | None] | Reread = Reread(whole, count) if reread else [whole(n) for n in range(count)]
    empty = (origin.new_zeros((rows, 0)), origin.new_zeros(0), origin.new_zeros((columns, 0)))
    return Blocks(origin, wholes, *empty, (0,) * count)


def reread_block(
    network: AlignedCheckpoints, kind: OriginKind, name: str, device: torch.device | str, basis: Basis
) -> Blocks:
    """Blocks of a tensor of a network that is only scaled, with one task vector in memory at a time."""
    origin = network.origin(name, kind, device)
    return scaled_block(origin, network.deltas(name, origin, kind), basis, reread=True)


def task_vector_blocks(
    origin: Tensor, deltas: Mapping[str, Tensor], name: str = "matrix", basis: Basis = BASES["task_vectors"]
) -> Blocks:
    """Blocks of a matrix; by default from the plain SVD of each task vector, as for Task Arithmetic and CART."""
    return from_spectra(origin, basis.spectra(basis.processed(deltas), name))


def from_spectra(origin: Tensor, spectra: Sequence[Spectrum]) -> Blocks:
    """Blocks from one spectrum per task (and the common one, where a basis has it)."""
    nothing = origin.new_zeros(()).expand(as_matrix(origin).shape)
    return Blocks(
        origin,
        [None if spectrum.s.numel() else nothing for spectrum in spectra],
        torch.cat([s.u for s in spectra], dim=1),
        torch.cat([s.s for s in spectra]),
        torch.cat([s.v for s in spectra], dim=1),
        tuple(s.s.numel() for s in spectra),
        tuple(s.count for s in spectra),
    )
