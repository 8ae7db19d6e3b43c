"""Which entries of a task vector are kept, and how what is left is rescaled.

Every function here returns a mask of the tensor's shape, True where the entry is kept. Magnitudes are ranked in
float32; of equal ones those that come first in the tensor go first, so that exactly the wanted number is kept.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from adarank.sparsify.threshold import kth_largest

_BLOCK = 2**20  # entries ranked at a time by `by_rank`: sorting takes several copies


def magnitudes(tensor: Tensor) -> Tensor:
    """|τ| in float32, in which all ranking is done."""
    return tensor.abs().float()


def largest(tensor: Tensor, count: int) -> Tensor:
    """The `count` entries of largest magnitude."""
    flat = magnitudes(tensor).flatten()
    if count <= 0 or count >= flat.numel():
        return torch.full(tensor.shape, count > 0, device=tensor.device)
    bound = kth_largest(flat, count)
    return _filled(flat > bound, flat == bound, count).reshape(tensor.shape)


def smallest(tensor: Tensor, count: int) -> Tensor:
    """The `count` entries of smallest magnitude."""
    flat = magnitudes(tensor).flatten()
    if count <= 0 or count >= flat.numel():
        return torch.full(tensor.shape, count > 0, device=tensor.device)
    bound = kth_largest(flat, flat.numel() - count + 1)
    return _filled(flat < bound, flat == bound, count).reshape(tensor.shape)


def middle(tensor: Tensor, density: float, gamma: float) -> Tensor:
    """⌊density·n⌋ entries: the ⌊gamma·n⌋ largest are left out, or fewer if short, and then the smallest."""
    count = int(density * tensor.numel())
    below = max(0, tensor.numel() - count - int(gamma * tensor.numel()))
    return smallest(tensor, below + count) & ~smallest(tensor, below)


def at_random(tensor: Tensor, density: float, seed: int, task: str, name: str) -> Tensor:
    """Each entry with probability `density`."""
    return noise(tensor, seed, task, name) < density


def by_rank(tensor: Tensor, density: float, epsilon: float, seed: int, task: str, name: str) -> Tensor:
    """Each entry with a probability that grows with its rank within its row.

    p = density - ε + 2ε·(rank - 1)/(n - 1), rank 1 the smallest of a row's n; a vector is one row, and in a row of
    one p = density. Rows of more than two dimensions run, as in mergekit, along the second.
    """
    if not tensor.numel():
        return torch.ones_like(tensor, dtype=torch.bool)
    drawn = noise(tensor, seed, task, name)
    rows, drawn_rows = (t if t.dim() > 1 else t.reshape(1, -1) for t in (tensor, drawn))
    height = max(1, _BLOCK // max(1, rows[0].numel()))
    kept = [
        draw < density + epsilon * (2 * _relative_rank(block) - 1)
        for block, draw in zip(rows.split(height), drawn_rows.split(height), strict=True)
    ]
    return torch.cat(kept).reshape(tensor.shape)


def noise(like: Tensor, seed: int, task: str, name: str) -> Tensor:
    """Uniform in [0, 1), float32, fixed by seed, task and tensor name alone.

    Drawn on the processor whatever the device, so that every device drops the same entries.
    """
    digest = hashlib.blake2b(f"{seed}\0{task}\0{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.rand(like.shape, generator=generator).to(like.device)


def norm_ratio(whole: Tensor, part: Tensor) -> float:
    """‖whole‖₁ / ‖part‖₁, or 1 if either is almost zero.

    By `sum`, which adds in pairs: PyTorch's float32 norms add one by one, and are 1% off at 10⁷ entries.
    """
    before, after = (float(x.abs().sum()) for x in (whole, part))
    return 1.0 if min(before, after) < 1e-7 else before / after


def _filled(sure: Tensor, equal: Tensor, count: int) -> Tensor:
    """`sure` and as many of `equal`, the first ones, as make `count`."""
    short = count - int(sure.count_nonzero())
    for part in equal.split(_BLOCK):  # a part where it ends is searched, those before it are but counted
        if short and (held := int(part.count_nonzero())) <= short:
            short -= held
        else:
            part[part.nonzero().flatten()[short:]] = False
            short = 0
    return sure.logical_or_(equal)


def _relative_rank(rows: Tensor) -> Tensor:
    """Rank of each magnitude along dimension 1, from 0 to 1; ½ where there is only one."""
    count = rows.shape[1]
    if count < 2:
        return torch.full(rows.shape, 0.5, device=rows.device)
    order = _order(magnitudes(rows))
    along = torch.arange(count, device=rows.device).float().div_(count - 1)
    return torch.empty(rows.shape, device=rows.device).scatter_(1, order, _along_rows(along, rows).expand_as(order))


def _order(rows: Tensor) -> Tensor:
    """Positions along dimension 1 in order of size, equal ones in order of position, of non-negative float32 numbers.

    On the processor by a sort of whole numbers, each a number's bits before its position, which no two share.
    """
    if rows.device.type != "cpu":
        return rows.argsort(dim=1, stable=True)
    keys = rows.view(torch.int32).to(torch.int64).bitwise_left_shift_(32)
    keys.bitwise_or_(_along_rows(torch.arange(rows.shape[1]), rows))
    keys.numpy().sort(axis=1)
    return keys.bitwise_and_(2**32 - 1)


def _along_rows(values: Tensor, rows: Tensor) -> Tensor:
    """A vector, shaped to be broadcast along dimension 1."""
    return values.reshape(1, -1, *[1] * (rows.dim() - 2))
