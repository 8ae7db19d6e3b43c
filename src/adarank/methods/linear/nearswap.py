"""NearSwap: go over to the other model where it is near, and by at most t where it is not.

    merged = W₀ + clamp(W₁ - W₀, -t, t), entry by entry

Written by its author as an interpolation with the weight min(1, t / |W₁ - W₀|), which is the same.

alchemonaut, "QuartetAnemoi-70B-t0.0001", huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001, 2024.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from adarank.methods.base import AlignedCheckpoints, Deltas, Method, OriginKind, PerTensor, check_one_other


class NearSwap(Method):
    """The other model's entries where they differ from the base's by at most t; elsewhere a step of t towards them."""

    name: ClassVar[str] = "nearswap"
    origin: ClassVar[OriginKind] = "pretrained"
    formula: ClassVar[str] = "W = W₀ + clamp(τ, -t, t)"
    source: ClassVar[str] = (
        "mergekit's nearswap; alchemonaut 2024, huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001"
    )

    t: PerTensor = Field(ge=0, description="largest change of an entry: a number, a list over the layers, or filters")

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        limit = self.t.of("", name)
        return next(iter(deltas.values())).clamp(-limit, limit).add_(origin)

    def check(self, network: AlignedCheckpoints) -> None:
        """Raise a sentence if the settings do not fit these models."""
        check_one_other(self.name, network)
