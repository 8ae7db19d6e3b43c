"""What mergekit's family of sparse merges shares: task vectors cut, weighed, perhaps elected by sign, and summed.

    s_t = keep(τ_t)                                 which entries are kept is what the methods differ in
    s_t = s_t · ‖τ_t‖₁ / ‖s_t‖₁                     if rescale
    γ = sign(Σ_t w_t s_t), 0 counted as +           if the method elects; entries of another sign than γ are left out
    merged = base + λ · Σ_t w_t s_t                 divided by the Σ_t w_t of what was summed if normalize

The meaning and the defaults are those of mergekit 0.1.5. Everything here is done for one tensor at a time.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adarank.methods.base import Deltas, Flag, Method, OriginKind, PerTensor, TensorWeights, flag, rest
from adarank.sparsify.drop import norm_ratio
from adarank.sparsify.sign_election import Election


class SparseSum(Method):
    """Base of the family. A method says which entries it keeps, and whether signs are elected.

    Class attributes:
        ranks: copies of a tensor that ranking its entries takes, where that is more than a selection.

    Arguments:
        weight: w_t, per model and tensor; 1 for models that give none.
        density: share of the entries kept, per model and tensor. At 1 nothing is cut or rescaled.
        scale: λ, per tensor.
        normalize: divide by the sum of the weights.
        rescale: give each cut task vector the L1 norm that it had.
        int8_mask: taken from mergekit's recipes, where it saves memory; it changes nothing.
    """

    origin: ClassVar[OriginKind] = "pretrained"
    per_model: ClassVar[tuple[str, ...]] = ("weight", "density")
    elects: ClassVar[bool] = False
    ranks: ClassVar[int] = 0

    weight: PerTensor = Field(
        TensorWeights({}, ()), description="per model: a number, a list over the layers, or filters"
    )
    density: PerTensor = Field(rest(1.0), ge=0, le=1, description="share of entries kept; per model, as weight")
    scale: PerTensor = Field(rest(1.0), alias="lambda", description="λ: a number, a list over the layers, or filters")
    normalize: Flag = Field(flag(False), description="divide by the sum of the weights")
    rescale: Flag = Field(flag(False), description="restore each task vector's L1 norm")
    int8_mask: bool = Field(False, description="taken from mergekit's recipes; changes nothing")

    def kept(self, delta: Tensor, density: float, task: str, name: str) -> Tensor:
        """Mask of the entries kept, of the task vector's shape. Asked only where density is below 1."""
        raise NotImplementedError

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        total, divisor = (self._elected if self.elects else self._summed)(name, origin, deltas)
        if self.normalize.of("", name):
            total /= divisor
        return total.mul_(self.scale.of("", name)).add_(origin)

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return (
            9 if self.elects else 5
        ) + self.ranks  # an election's five sums; task vector, magnitudes or noise, what is kept

    def _elected(self, name: str, origin: Tensor, deltas: Deltas) -> tuple[Tensor, Tensor | float]:
        """The sum of what agrees in sign, and of its weights, entry by entry; 1 where nothing was added."""
        election = Election(origin, zero_is_positive=True)
        for task in deltas:  # not items(): its variable would hold one task vector while the next is made
            weight = self.weight.of(task, name)
            election.add(self._cut(deltas[task], task, name).mul_(weight), weight)
        total, divisor = election.result()
        return total, divisor.masked_fill_(divisor == 0, 1)

    def _summed(self, name: str, origin: Tensor, deltas: Deltas) -> tuple[Tensor, Tensor | float]:
        """The sum, and that of the weights; 1 if that is 0."""
        total = torch.zeros_like(origin)
        for task in deltas:
            total.add_(self._cut(deltas[task], task, name), alpha=self.weight.of(task, name))
        weights = sum(self.weight.of(task, name) for task in deltas)
        return total, weights if abs(weights) >= 1e-8 else 1.0

    def _cut(self, delta: Tensor, task: str, name: str) -> Tensor:
        """The task vector with what is not kept set to 0: a new tensor."""
        density = self.density.of(task, name)
        if density >= 1:
            return delta.clone()
        cut = delta * self.kept(delta, density, task, name)
        return cut.mul_(norm_ratio(delta, cut)) if self.rescale.of("", name) else cut
