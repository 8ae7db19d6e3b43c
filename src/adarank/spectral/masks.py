"""Masks over singular components: how they are made, learned and kept.

A mask is learned through one logit per component, which starts at +l (kept) or -l (pruned).

binary   b = [σ(logit/τ) ≥ 0.5] = [logit ≥ 0]     exactly 0 or 1; its gradient is the sigmoid's slope (a straight-through
                                                  estimator). AdaRank, Section 5 and Appendix A.
soft     b = (logit + l) / 2l                     any real number, 1 or 0 at the start; its gradient is exact

Soft masks are ours: every component gets a coefficient of its own, and what binary masks keep is what they have at ½ or more.
Adam moves every number alike, so small singular components would hardly move a weight: `pace` makes up for that.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from adarank.sparsify.threshold import top_count
from adarank.spectral.svd import determined

MaskKind = Literal["binary", "soft"]
First = Literal["top", "random"]
MOST = 20.0  # of a component's pace


def top_mask(sizes: tuple[int, ...], share: float, counts: tuple[int, ...] | None = None) -> Tensor:
    """(K,) bool: the first `top_count(share, r)` of each task's r components.

    Arguments:
        sizes: how many components of each task there are.
        counts: the r of each task, where zero components are not there; by default `sizes`.
    """
    pairs = zip(sizes, counts or sizes, strict=True)
    parts = [torch.arange(size) < top_count(share, count) for size, count in pairs if size]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)


def first_mask(
    sizes: tuple[int, ...], share: float, first: First, seed: int, name: str, counts: tuple[int, ...] | None = None
) -> Tensor:
    """(K,) bool: as many of each task's components as `top_mask` keeps, its top ones or any.

    Arguments:
        seed, name: of the random choice, which is another for every matrix.
        counts: as for `top_mask`.
    """
    top = top_mask(sizes, share, counts)
    if first == "top":
        return top
    return scattered(top, sizes, seed, name)


def scattered(mask: Tensor, sizes: tuple[int, ...], seed: int, name: str) -> Tensor:
    """`random_mask` by a generator of its own for each matrix, so that no order of matrices matters."""
    return random_mask(mask, sizes, torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode())))


def random_mask(mask: Tensor, sizes: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """(K,) with each task's mask values in random places: the control of an ablation."""
    parts = [part[torch.randperm(part.numel(), generator=generator)] for part in mask.split(sizes)]
    return torch.cat(parts)


def hard(logits: Tensor) -> Tensor:
    """True where a component is kept: σ(logit/τ) ≥ 0.5 for every τ > 0."""
    return logits >= 0


def straight_through(grad_mask: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """dL/dlogit from dL/db: the slope of σ(logit/τ)."""
    soft = torch.sigmoid(logits / temperature)
    return grad_mask * soft * (1 - soft) / temperature


def soft(logits: Tensor, logit: float) -> Tensor:
    """Soft masks: 0 at -`logit`, 1 at +`logit`, and linear, within these and beyond."""
    return (logits + logit) / (2 * logit)


def pace(s: Tensor) -> Tensor:
    """How much faster than its logit each component's soft mask moves, so that Adam's steps move b∘s alike: rms(s)/s_r.

    Capped, as the smallest would else go from 0 to 1 in a step or two. Components that are rounding keep 1, and count not.

    Arguments:
        s: (r,) singular values of one task's matrix, descending.
    """
    real = determined(s)
    if not bool(real.any()):
        return torch.ones_like(s)
    rms = s[real].square().mean().sqrt()
    return torch.where(real, (rms / s).clamp(max=MOST), 1.0)


def kept(mask: Tensor) -> Tensor:
    """Bool: True where a component is kept; of a soft mask, where it is nearer to 1 than to 0, or above."""
    return mask >= 0.5 if mask.is_floating_point() else mask


def _check_header(header: Mapping[str, Any]) -> None:
    """Of the right types, as JSON may hold anything; a `ValueError` if not."""
    texts = [header["origin"], *header["tasks"], *header["tensors"], *header["sizes"], header.get("basis", "")]
    numbers = [part for parts in header["sizes"].values() for part in parts]
    if not all(isinstance(text, str) for text in texts) or not isinstance(header["about"], dict):
        raise ValueError("a name that is no text")
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError("a size that is no count")
    if len(set(header["tensors"])) < len(header["tensors"]) or header["origin"] not in ("pretrained", "average"):
        raise ValueError("a tensor twice, or an unknown origin")
