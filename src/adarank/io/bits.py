"""Bool tensors as bits, eight entries a byte."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """A bool tensor of any shape as bits, eight entries a byte: (⌈n/8⌉,) uint8."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The bool tensor of `shape` that `pack` made `bits` of."""
    count = torch.Size(shape).numel()
    if bits.numel() != packed_size(count):  # numpy would fill up with zeros
        raise ValueError(f"{bits.numel()} bytes for {count} bits")
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=count)).bool().reshape(shape)


def packed_size(count: int) -> int:
    """Bytes of `count` bits."""
    return -(-count // 8)
