"""Passthrough: one model's tensors as they are, or times a number, as mergekit's `passthrough`.

    W = s W₁

What it is for are slices: layers of one model, or of several, put one after another. A scale of 0 for what writes into
the residual stream (`o_proj` and `down_proj`) makes a layer that changes nothing, to be trained further.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from adarank.methods.base import AlignedCheckpoints, Deltas, Method, OriginKind, PerTensor, RecipeError, rest


class Passthrough(Method):
    """One model's tensors, scaled if asked."""

    name: ClassVar[str] = "passthrough"
    origin: ClassVar[OriginKind] = "zero"
    merges_base: ClassVar[bool] = True
    formula: ClassVar[str] = "W = s W₁"
    source: ClassVar[str] = "mergekit's passthrough"
    per_model: ClassVar[tuple[str, ...]] = ("scale",)

    scale: PerTensor = Field(rest(1.0), description="s, per model: a number, a list over the layers, or filters")

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One tensor, by the method's formula."""
        (task,) = deltas
        return deltas[task] * self.scale.of(task, name)  # the origin is zero

    def check(self, network: AlignedCheckpoints) -> None:
        """Raise a sentence if there is more than one model."""
        if len(network.experts) != 1:
            raise RecipeError(
                f"models: 'passthrough' takes the tensors of one model, got {len(network.experts)}"
                f" ({', '.join(network.tasks)}). Give one, or put layers of several together under slices."
            )
