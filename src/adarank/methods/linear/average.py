"""Weight average: the mean of the experts.

    merged = mean_t W_t

Wortsman et al., "Model soups", arXiv:2203.05482 (for one task); the usual baseline for many.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from adarank.methods.base import Deltas, Method, OriginKind


class WeightAverage(Method):
    """The mean of the experts. No settings, no data."""

    name: ClassVar[str] = "average"
    origin: ClassVar[OriginKind] = "average"
    formula: ClassVar[str] = "W = mean_t W_t"
    source: ClassVar[str] = "Wortsman et al. 2022, arXiv:2203.05482"

    elementwise: ClassVar[bool] = True

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        return origin
