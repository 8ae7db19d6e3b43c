"""Linear: a weighted mean of models, as mergekit's `linear`.

    merged = Σ_t w_t W_t / Σ_t w_t        (without the division when normalize is false)

Needs no base: the models themselves are summed. Weights may differ per tensor (see `per_tensor.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from adarank.methods.base import (
    AlignedCheckpoints,
    Deltas,
    Flag,
    Method,
    OriginKind,
    PerTensor,
    RecipeError,
    TensorWeights,
    flag,
    weighted_sum,
)


class Linear(Method):
    """Weighted mean of the models.

    Arguments:
        normalize: divide by the sum of the weights.
        weight: per model (`parameters: {weight: …}`) and tensor; 1 for models that give none.
    """

    name: ClassVar[str] = "linear"
    origin: ClassVar[OriginKind] = "zero"
    merges_base: ClassVar[bool] = True
    formula: ClassVar[str] = "W = Σ_t w_t W_t / Σ_t w_t"
    source: ClassVar[str] = "mergekit's linear; Wortsman et al. 2022, arXiv:2203.05482"
    per_model: ClassVar[tuple[str, ...]] = ("weight",)

    normalize: Flag = Field(flag(True), description="divide by the sum of the weights")
    weight: PerTensor = Field(
        TensorWeights({}, ()), description="per model: a number, a list over the layers, or filters"
    )

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        total = weighted_sum(origin, deltas, lambda task: self.weight.of(task, name))  # the origin is zero
        return total.div_(self._total(name, deltas)) if self.normalize.of("", name) else total

    def check(self, network: AlignedCheckpoints) -> None:
        """Raise a sentence if the settings do not fit these models."""
        for name in network.merged():
            if self.normalize.of("", name) and abs(self._total(name, network.experts)) < 1e-8:
                raise RecipeError(
                    f"linear: the weights of tensor '{name}' sum to 0. Change them, or set normalize: false."
                )

    def _total(self, name: str, tasks: Iterable[str]) -> float:
        return sum(self.weight.of(task, name) for task in tasks)
