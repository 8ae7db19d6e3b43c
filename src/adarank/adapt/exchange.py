"""Merged weights that several processes compose, each those whose factors it holds.

    W        from the process that composed it to all
    dL/dW    added up in the process that holds W's factors, let go of in all others

So a matrix's factors, which for T tasks are up to 2T times as large as itself, are in one process only, and so is all work with them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from adarank.io import processes

_TOGETHER = 2**20  # numbers: tensors that have less travel together


class Exchange:
    """The way of merged weights and their gradients between processes. Alone there is none to go.

    Arguments:
        tensors: name -> the network's parameter (or buffer), the same names in the same order in every process.
        held: names of those whose factors this process holds. Where each holds all, each composes all, and nothing is sent.
    """

    def __init__(self, tensors: Mapping[str, Tensor], held: Collection[str]) -> None:
        self._tensors = tensors
        held_by = processes.gathered(list(held))
        everywhere = all(len(names) == len(tensors) for names in held_by)
        here = processes.rank()
        self._holder = {name: here if everywhere else rank for rank, names in enumerate(held_by) for name in names}
        self._parcels = [] if everywhere else self._packed()

    def holds(self, name: str) -> bool:
        """Whether this process composes the tensor."""
        return self._holder[name] == processes.rank()

    def send(self) -> None:
        """Every tensor, in place, in all processes as the one has it that composed it. All must call it."""
        for rank, names in self._parcels:
            tensors = [self._tensors[name].detach() for name in names]
            flat = _flat(tensors)
            processes.from_rank(flat, rank)
            _unpack(flat, tensors)

    def add_gradients(self) -> None:
        """Add every tensor's gradient up where its factors are. It is None in all other processes then. All must call it."""
        if not self._parcels:
            return
        there = torch.tensor([float(tensor.grad is not None) for tensor in self._tensors.values()])
        counts = processes.add_up(there).tolist()
        reached = {name for name, count in zip(self._tensors, counts, strict=True) if count}
        for rank, names in self._parcels:
            tensors = [self._tensors[name] for name in names if name in reached]
            if tensors:
                _add_up_at(rank, tensors)

    def _packed(self) -> list[tuple[int, list[str]]]:
        """(holder, names) of the tensors that travel together."""
        parcels, started = [], dict[tuple[int, torch.dtype], list[str]]()
        for name, tensor in self._tensors.items():
            key = (self._holder[name], tensor.dtype)
            if tensor.numel() >= _TOGETHER:
                parcels.append((key[0], [name]))
                continue
            if not tensor.numel():
                continue
            parcel = started.setdefault(key, [])
            parcel.append(name)
            if sum(self._tensors[each].numel() for each in parcel) >= _TOGETHER:
                parcels.append((key[0], started.pop(key)))
        return parcels + [(holder, names) for (holder, _), names in started.items()]


def _add_up_at(rank: int, tensors: Sequence[Tensor]) -> None:
    gradients = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in tensors]
    flat = _flat(gradients)
    processes.add_up_at(rank, flat)
    if rank == processes.rank():
        _unpack(flat, gradients)
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = gradient if rank == processes.rank() else None


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers in a row, on the CPU; of one tensor that is there in a row, the tensor itself."""
    if len(tensors) == 1 and tensors[0].is_contiguous() and tensors[0].device.type == "cpu":
        return tensors[0].view(-1)
    return torch.cat([tensor.flatten() for tensor in tensors]).cpu()


def _unpack(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, numbers in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        if numbers.data_ptr() != tensor.data_ptr():
            tensor.copy_(numbers.view_as(tensor))
