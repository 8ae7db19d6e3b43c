"""EMR-Merging: elect one unified task vector; each task has a mask of the entries that agree, and one number.

    s = sign(Σ_t τ_t), -1 where the sum is 0
    m_t = [sign(τ_t) = s]
    u = s ∘ max_t (m_t ∘ |τ_t|)
    ρ_t = Σ_n mean|τ_t| / Σ_n mean|m_t ∘ u|            sums over the model's tensors n of each tensor's mean
    W_t = W₀ + ρ_t · m_t ∘ u

Base and u are stored once, a mask takes one bit per entry. Nothing is tuned. ρ_t needs the whole model, so the checkpoints
are read twice.

Huang et al., "EMR-Merging: Tuning-Free High-Performance Model Merging", arXiv:2405.17461.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from pydantic import PrivateAttr
from torch import Tensor

from adarank.io.bits import pack, packed_size, unpack
from adarank.methods.base import AlignedCheckpoints, Deltas, OriginKind
from adarank.methods.task_aware.base import Part, Site, Slots, TaskAwareMethod


class EMR(TaskAwareMethod):
    """One unified task vector; a mask and a rescaler per task. Needs no data and no tuning, but each input's task."""

    name: ClassVar[str] = "emr"
    origin: ClassVar[OriginKind] = "pretrained"
    formula: ClassVar[str] = (
        "W_t = W₀ + ρ_t m_t∘u; s = sign(Σ τ), m_t = [sign(τ_t) = s], u = s∘max_t(m_t∘|τ_t|), ρ_t = Σ mean|τ_t| / Σ mean|m_t∘u|"
    )
    source: ClassVar[str] = "Huang et al. 2024, arXiv:2405.17461"
    passes: ClassVar[int] = 2
    constants: ClassVar[tuple[str, ...]] = ("rescaler",)

    _rescalers: Mapping[str, float] = PrivateAttr(default_factory=dict)

    def prepare(self, network: AlignedCheckpoints, device: torch.device | str) -> EMR:
        """A copy of the method that knows what it needs of the whole model."""
        whole, kept = dict.fromkeys(network.tasks, 0.0), dict.fromkeys(network.tasks, 0.0)
        for name in network.merged():
            origin = network.origin(name, self.origin, device)
            deltas = network.deltas(name, origin, self.origin)
            sign = elected_sign(origin, deltas)
            unified = sign * largest(sign, deltas)
            for task in deltas:
                whole[task] += _mean_magnitude(deltas[task])
                kept[task] += _mean_magnitude(unified * (deltas[task].sign() == sign))
        prepared = self.model_copy()
        # where a task agrees nowhere its mask is empty, and any number will do
        prepared._rescalers = {task: whole[task] / kept[task] if kept[task] else 1.0 for task in network.tasks}
        return prepared

    def constant(self, part: str, task: str) -> float:
        """The value of one of `constants` for a task."""
        return self._rescalers[task]

    def slots(self, site: Site) -> Slots:
        """What `split` yields for this tensor: shapes and dtypes."""
        shared = {"origin": (site.shape, site.dtype), "unified": (site.shape, site.floats)}
        return Slots(shared, {"mask": ((packed_size(site.numel),), torch.uint8)})

    def split(self, site: Site, origin: Tensor, deltas: Deltas) -> Iterator[Part]:
        """The parts of one tensor: shared ones first, then task by task."""
        sign = elected_sign(origin, deltas)
        yield None, "origin", origin
        yield None, "unified", sign * largest(sign, deltas)
        for task in deltas:
            yield task, "mask", pack(deltas[task].sign() == sign)

    @classmethod
    def rebuild(cls, parts: Mapping[str, Tensor]) -> Tensor:
        """A task's tensor from its parts."""
        origin = parts["origin"]
        return origin + parts["rescaler"] * unpack(parts["mask"], tuple(origin.shape)) * parts["unified"]

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return 9  # the sum in float64, signs, magnitudes, and what masks


def elected_sign(origin: Tensor, deltas: Deltas) -> Tensor:
    """s: the sign of the summed task vectors, -1 where they cancel. Summed in float64, so that their order is nothing."""
    total = torch.zeros_like(origin, dtype=torch.float64)
    for task in deltas:
        total += deltas[task]
    return torch.where(total > 0, 1.0, -1.0).to(origin.dtype)


def largest(sign: Tensor, deltas: Deltas) -> Tensor:
    """max_t |τ_t| over the tasks whose entry has the elected sign."""
    largest = torch.zeros_like(sign)
    for task in deltas:
        delta = deltas[task]
        largest = torch.maximum(largest, delta.abs() * (delta.sign() == sign))
    return largest


def _mean_magnitude(tensor: Tensor) -> float:
    return float(tensor.abs().sum(dtype=torch.float64)) / max(1, tensor.numel())
