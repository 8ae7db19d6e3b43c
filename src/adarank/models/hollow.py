"""Networks that are made without their weights: tensors take no memory but while they are held.

A hollow tensor has its shape, dtype and device, and one number that stands for all of its own. It is held to be filled and
read; afterwards it is hollow again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from adarank.io.checkpoint import Checkpoint


def hollow(shape: Iterable[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A tensor of zeros that takes the memory of one."""
    return torch.zeros((), dtype=dtype, device=device).expand(tuple(shape))


def release(tensors: Iterable[Tensor]) -> None:
    """Let go of the memory of parameters and buffers. Whoever uses them sees them hollow."""
    for tensor in tensors:
        tensor.grad = None
        tensor.data = hollow(tensor.shape, tensor.dtype, tensor.device)


def allocate(tensors: Iterable[Tensor]) -> None:
    """Give parameters and buffers memory, to be filled."""
    for tensor in tensors:
        tensor.data = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


@contextmanager
def held(tensors: Collection[Tensor]) -> Iterator[None]:
    """While it is open parameters and buffers have memory, to be filled first."""
    allocate(tensors)
    try:
        yield
    finally:
        release(tensors)


def to_device(module: nn.Module, device: torch.device | str) -> nn.Module:
    """`module.to(device)`, of which hollow tensors stay hollow."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.numel() > 1 and not any(tensor.stride()):
            tensor.data = hollow(tensor.shape, tensor.dtype, device)
    return module.to(device)


class _Hollow:
    """A checkpoint some of whose tensors are read as hollow ones."""

    in_one_folder = False

    def __init__(self, checkpoint: Checkpoint, names: Collection[str]) -> None:
        self._checkpoint, self._names = checkpoint, frozenset(names)

    def read(self, name: str) -> Tensor:
        """The tensor, or a hollow one in float32."""
        info = self._checkpoint.tensors[name]
        return hollow(info.shape, torch.float32) if name in self._names else self._checkpoint.read(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)


def without(checkpoint: Checkpoint, names: Iterable[str]) -> Checkpoint:
    """A checkpoint of which these tensors, as far as they are of floating-point numbers, are read as hollow ones."""
    tensors = checkpoint.tensors
    floats = [name for name in names if name in tensors and tensors[name].dtype.is_floating_point]
    return cast(Checkpoint, _Hollow(checkpoint, floats))
