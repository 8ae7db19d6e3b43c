"""Arcee Fusion: take the other model's entries where the change matters most.

    p, q = softmax(W₁) + 1e-8, softmax(W₀) + 1e-8        along the last dimension
    importance = |W₁ - W₀| · Σ p ln(p / q)               the sum along the last dimension
    threshold = median + 1.5 · (Q₃ - Q₁) of the importances of a tensor
    merged = W₁ where importance ≥ threshold, else W₀

A quartile is the entry at position ⌊q (n - 1)⌋ of the n in order. All is done in float32 with mergekit's order of
operations, as the divergence of models that differ by less than about a hundredth of their size is small beside
float32's rounding of its terms: there which entries are taken depends on the rounding, and is as good as chance in
mergekit and here. Above 10⁶ entries in a tensor mergekit takes the quartiles of a random sample; here they are exact,
so a few entries beside the threshold differ. Where all importances are equal, all entries are taken.

Arcee AI, "Meet MergeKit v0.1: Arcee Fusion, expanded model support, multi-GPU acceleration", 2025.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from adarank.methods.base import AlignedCheckpoints, Deltas, Method, OriginKind, check_one_other

_SMOOTHING = 1e-8
_SPREAD = 1.5  # how many interquartile ranges above the median entries are outliers


class ArceeFusion(Method):
    """The other model's entries of outstanding importance in the base: change times divergence of the rows' softmax."""

    name: ClassVar[str] = "arcee_fusion"
    origin: ClassVar[OriginKind] = "pretrained"
    formula: ClassVar[str] = (
        "W = W₀ + [I ≥ median(I) + 1.5 (Q₃(I) - Q₁(I))]∘τ; I = |τ|∘KL(softmax(W₀ + τ) ‖ softmax(W₀)) by rows"
    )
    source: ClassVar[str] = "mergekit's arcee_fusion; Arcee AI 2025, arcee.ai/blog"

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        delta = next(iter(deltas.values()))
        if not delta.numel():
            return origin.clone()
        importance = delta.abs() * _divergence(origin + delta, origin)
        low, median, high = (_quantile(importance, share) for share in (0.25, 0.5, 0.75))
        return origin + delta * (importance >= median + _SPREAD * (high - low))

    def check(self, network: AlignedCheckpoints) -> None:
        """Raise a sentence if the settings do not fit these models."""
        check_one_other(self.name, network)

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return 7  # two distributions, what is summed, importances, and what ranks them


def _divergence(other: Tensor, base: Tensor) -> Tensor:
    """Of the distributions along the last dimension, which stays with length 1."""
    p, q = (torch.softmax(tensor, dim=-1) + _SMOOTHING for tensor in (other, base))
    return (p * torch.log(p / q)).sum(dim=-1, keepdim=True)


def _quantile(values: Tensor, share: float) -> Tensor:
    """The entry at position ⌊share·(n - 1)⌋ in order of size."""
    flat = values.flatten()
    return flat.kthvalue(int(share * (flat.numel() - 1)) + 1).values
