"""WUDI, SWUDI and ACTMat: RegMean's formula with the task vectors in the place of inputs that nobody has.

    G_t = w_t τ_tᵀτ_t                                     (in, in); τ as (out, in)
    A = Σ_t G_t = Q diag(a) Qᵀ,   C = Σ_t τ_t G_t
    Δ = Δ₀ + (C - Δ₀ A) Q diag(h(a)) Qᵀ,   merged = base + λ Δ
    merged = base + λ · mean_t τ_t                        all other tensors

             w_t           Δ₀        h(a)
    WUDI     1 / ‖τ_t‖²    0         1 / (a + 10⁻⁸)
    ACTMat   weight_t      0         1 / a, and 0 where a is 0: the pseudo-inverse
    SWUDI    1 / ‖τ_t‖²    Σ_t τ_t   (1 - exp(-η a / ā)) / a of the top K eigenvalues, 0 of the others; ā their mean over all

Gradient steps on a linear layer are sums of outer products with its inputs, so the rows of τ_t lie among the inputs of task
t, and τ_tᵀτ_t stands for their covariance. Δ = C A⁺ minimises Σ_t w_t ‖(Δ - τ_t) τ_tᵀ‖²: nothing of the others is to be seen
on what task t was trained on. WUDI's authors go there from Σ_t τ_t by 300 steps of Adam; small eigenvalues of A are noise, and so
few steps do not reach them. SWUDI is the gradient flow from Σ_t τ_t, stopped at a time η.

SWUDI's paper was read in its abstract alone. The form of its filter was derived here, and η is in units of the mean
eigenvalue so that it means the same in every layer. `time` and `rank` are ours. All sums are in float64.

Cheng et al., "Whoever Started the Interference Should End It", arXiv:2503.08099; Wei et al., "Closed-Form Spectral
Regularization for Multi-Task Model Merging", arXiv:2606.07289; ACTMat: arXiv:2604.01329.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from adarank.alignment.layers import inputs_first
from adarank.methods.base import (
    AlignedCheckpoints,
    Deltas,
    Method,
    OriginKind,
    PerTensor,
    TensorWeights,
    scaled_mean,
)
from adarank.sparsify.threshold import top_count

_RIDGE = 1e-8  # of WUDI's closed form; the eigenvalues of A sum to the number of tasks
W = TypeVar("W", bound="WUDI")


class WUDI(Method):
    """Minimal interference on what the task vectors say of the inputs. Needs no data.

    Arguments:
        scale: λ, multiplies the whole merged task vector.
    """

    name: ClassVar[str] = "wudi"
    origin: ClassVar[OriginKind] = "pretrained"
    formula: ClassVar[str] = "W = W₀ + λ (Σ_t τ_t G_t) (Σ_t G_t + 10⁻⁸)⁻¹; G_t = τ_tᵀτ_t / ‖τ_t‖²"
    source: ClassVar[str] = "Cheng et al. 2025, arXiv:2503.08099, solved in closed form"
    spectral: ClassVar[bool] = True

    scale: float = Field(1.0, alias="lambda", description="λ")
    _inputs_first: frozenset[str] = PrivateAttr(default=frozenset())

    def prepare(self: W, network: AlignedCheckpoints, device: torch.device | str) -> W:
        """The method with the names of the matrices that are stored as (in, out), read off the shapes."""
        prepared = self.model_copy()
        prepared._inputs_first = inputs_first({name: info.shape for name, info in network.tensors.items()})
        return prepared

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        turned = name in self._inputs_first
        gram, cross, total = torch.zeros(3, 1, 1, dtype=torch.float64, device=origin.device)
        for task in deltas:
            delta = deltas[task].flatten(1).double()
            delta = delta.T if turned else delta
            part = self._weight(task, name, delta) * (delta.T @ delta)
            gram, cross, total = gram + part, cross + delta @ part, total + delta
        start = self._start(total)
        values, vectors = torch.linalg.eigh(gram)
        solved: Tensor = start + ((cross - start @ gram) @ vectors * self._inverse(values)) @ vectors.T
        return origin + self.scale * (solved.T if turned else solved).reshape(origin.shape).to(origin.dtype)

    def merge_other(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged tensor that is not decomposed."""
        return scaled_mean(origin, deltas, self.scale)

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return 15 if decomposed else 2  # the task vector, C, Σ τ, Δ₀, what is solved for, in float64

    @classmethod
    def memory(cls) -> str:
        """In words: what the method holds in memory."""
        return f"{super().memory()}, and five square matrices of its inputs in float64"

    def solving(self, shape: tuple[int, ...]) -> int:
        """Numbers of four bytes held beside: A, a part of it, eigenvectors, and what is used to find them."""
        rows, columns = shape[0], torch.Size(shape[1:]).numel()
        return 2 * 5 * max(rows, columns) ** 2  # which of the two is inputs depends on how it is stored

    def _weight(self, task: str, name: str, delta: Tensor) -> float:
        """w_t: every task counts alike, however far it moved; what did not move has no say."""
        energy = float(delta.square().sum())
        return 1 / energy if energy > 0 else 0.0

    def _start(self, total: Tensor) -> Tensor:
        """Δ₀, given Σ_t τ_t."""
        return torch.zeros_like(total)

    def _inverse(self, values: Tensor) -> Tensor:
        """h(a) of the eigenvalues, which are in ascending order."""
        return (values.clamp(min=0) + _RIDGE).reciprocal()


class ACTMat(WUDI):
    """As WUDI, but the task vectors' sizes count, and the inverse is exact (ActMerge). Needs no data.

    Arguments:
        weight: w_t per model (`parameters: {weight: …}`) and tensor; 1 for models that give none.
    """

    name: ClassVar[str] = "actmat"
    formula: ClassVar[str] = "W = W₀ + λ (Σ_t τ_t G_t) (Σ_t G_t)⁺; G_t = w_t τ_tᵀτ_t"
    source: ClassVar[str] = "arXiv:2604.01329"
    per_model: ClassVar[tuple[str, ...]] = ("weight",)

    weight: PerTensor = Field(
        TensorWeights({}, ()), description="per model: a number, a list over the layers, or filters"
    )

    def _weight(self, task: str, name: str, delta: Tensor) -> float:
        return self.weight.of(task, name)

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return super().workspace(tasks, decomposed) + (10 if decomposed else 0)  # what weighs a task vector, in float64

    def _inverse(self, values: Tensor) -> Tensor:
        return _reciprocal(values)


class SWUDI(WUDI):
    """As WUDI, from the summed task vectors and stopped before what is noise. Needs no data.

    Arguments:
        time: η, how long the flow runs, in units of the matrix's mean eigenvalue.
        rank: K as a share of the eigenvalues, in (0, 1]; along all others the task vectors stay summed.
    """

    name: ClassVar[str] = "swudi"
    formula: ClassVar[str] = (
        "W = W₀ + λ (Δ₀ + (C - Δ₀A) Q diag(f/a) Qᵀ); Δ₀ = Σ_t τ_t, f = 1 - exp(-η a/ā) of the top K; A, C as WUDI, A = Q diag(a) Qᵀ"
    )
    source: ClassVar[str] = "Wei et al. 2026, arXiv:2606.07289; η and K are ours"

    time: float = Field(10.0, gt=0, description="η, in units of the mean eigenvalue")
    rank: float = Field(0.5, gt=0, le=1, description="share of eigenvalues that are filtered, the others left out")

    def _start(self, total: Tensor) -> Tensor:
        return total

    def _inverse(self, values: Tensor) -> Tensor:
        mean = values.mean()
        if mean <= 0:
            return torch.zeros_like(values)
        passed = -torch.expm1(-self.time * values.clamp(min=0) / mean)
        passed[: len(values) - top_count(self.rank, len(values))] = 0
        return passed * _reciprocal(values)


def _reciprocal(values: Tensor) -> Tensor:
    """1 / a, and 0 where a is rounding beside the largest."""
    rounding = len(values) * torch.finfo(values.dtype).eps * values[-1]
    there = values > rounding
    return torch.where(there, torch.where(there, values, 1.0).reciprocal(), 0.0)
