"""Random image changes for training, computed for a whole batch at once on its device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Policy:
    """How far each random change may go; 0 switches a change off."""

    degrees: float = 0.0  # rotation, either way
    zoom: float = 0.0  # scale is exp(uniform(-zoom, zoom))
    stretch: float = 0.0  # the same, for the width alone
    shear: float = 0.0
    shift: float = 0.0  # share of the image side, either way
    brightness: float = 0.0  # added; pixels span 2 (-1 to 1)
    contrast: float = 0.0  # gain is exp(uniform(-contrast, contrast))
    tint: float = 0.0  # brightness drawn per channel
    saturation: float = 0.0  # colour gain is 1 + uniform(-saturation, saturation)
    invert: float = 0.0  # probability
    flip: float = 0.0  # probability of a left-right flip
    erase: float = 0.0  # probability of blanking one square


def augment(images: Tensor, policy: Policy, generator: torch.Generator, flip: Tensor | None = None) -> Tensor:
    """Randomly changed copies of `images` (n, 3, h, w; values -1 to 1).

    `flip` gives each image its own flip probability, for batches that mix tasks.
    """
    images = _geometry(images, policy, generator, flip)
    images = _colour(images, policy, generator)
    return _erase(images, policy, generator) if policy.erase else images


def _uniform(n: int, limit: float, generator: torch.Generator) -> Tensor:
    """`n` draws from -limit to limit."""
    return (2 * torch.rand(n, generator=generator, device=generator.device) - 1) * limit


def _chance(n: int, probability: float | Tensor, generator: torch.Generator) -> Tensor:
    """`n` yes/no draws."""
    return torch.rand(n, generator=generator, device=generator.device) < probability


def _geometry(images: Tensor, policy: Policy, generator: torch.Generator, flip: Tensor | None) -> Tensor:
    """Rotate, scale, shear, shift and flip with a single resampling."""
    n = len(images)
    angle = _uniform(n, math.radians(policy.degrees), generator)
    height = torch.exp(_uniform(n, policy.zoom, generator))
    width = height * torch.exp(_uniform(n, policy.stretch, generator))
    mirrored = _chance(n, policy.flip if flip is None else flip, generator)
    width = torch.where(mirrored, -width, width)
    shear = _uniform(n, policy.shear, generator)
    # Grid coordinates span 2, so a share of the side is twice that number.
    shift_x = _uniform(n, 2 * policy.shift, generator)
    shift_y = _uniform(n, 2 * policy.shift, generator)
    cos, sin = torch.cos(angle), torch.sin(angle)
    row_x = torch.stack([cos / width, (shear - sin) / width, shift_x], dim=1)
    row_y = torch.stack([sin / height, cos / height, shift_y], dim=1)
    grid = F.affine_grid(torch.stack([row_x, row_y], dim=1), list(images.shape), align_corners=False)
    # Border padding: the background is black in some sets and white in others.
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _colour(images: Tensor, policy: Policy, generator: torch.Generator) -> Tensor:
    """Change contrast, brightness, tint and saturation, then perhaps invert."""
    n = len(images)

    def shaped(values: Tensor) -> Tensor:
        return values.view(n, -1, 1, 1)

    if policy.saturation:
        gray = images.mean(dim=1, keepdim=True)
        gain = shaped(1 + _uniform(n, policy.saturation, generator))
        images = gray + (images - gray) * gain
    if policy.contrast:
        centre = images.mean(dim=(1, 2, 3), keepdim=True)
        images = centre + (images - centre) * shaped(torch.exp(_uniform(n, policy.contrast, generator)))
    if policy.brightness:
        images = images + shaped(_uniform(n, policy.brightness, generator))
    if policy.tint:
        images = images + shaped(_uniform(3 * n, policy.tint, generator))
    images = images.clamp(-1, 1)
    if policy.invert:
        images = torch.where(shaped(_chance(n, policy.invert, generator)), -images, images)
    return images


def _erase(images: Tensor, policy: Policy, generator: torch.Generator) -> Tensor:
    """Set one square, a fifth to two fifths of the side, to mid-gray."""
    n, _, rows, columns = images.shape
    device = images.device
    half = 0.15 + _uniform(n, 0.05, generator)
    centre_x = 0.5 + _uniform(n, 0.5, generator)
    centre_y = 0.5 + _uniform(n, 0.5, generator)
    x = (torch.arange(columns, device=device) + 0.5) / columns
    y = (torch.arange(rows, device=device) + 0.5) / rows
    inside_x = (x[None] - centre_x[:, None]).abs() < half[:, None]
    inside_y = (y[None] - centre_y[:, None]).abs() < half[:, None]
    chosen = _chance(n, policy.erase, generator)
    hit = inside_y[:, :, None] & inside_x[:, None, :] & chosen[:, None, None]
    return images.masked_fill(hit[:, None], 0.0)
