"""Task-aware methods that keep the top singular components of each task vector.

    W_t = origin + λ · SVD_k(W_t - origin)        matrices: origin is shared; U, λs, V are the task's own
    W_t = origin + λ · (W_t - origin)             all other tensors: the task's own, whole

A matrix whose factors, with the origin, would take more room than every task's own matrix is stored whole too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from adarank.io.bundle import WHOLE
from adarank.methods.base import Deltas
from adarank.methods.task_aware.base import Part, Site, Slots, TaskAwareMethod
from adarank.spectral.svd import spectrum_of


class LowRank(TaskAwareMethod):
    """Base of the two. Subclasses say how many components are kept, and λ."""

    spectral: ClassVar[bool] = True

    def kept(self, rank: int, tasks: int) -> int:
        """k: how many of a matrix's `rank` components are kept."""
        raise NotImplementedError

    def factor(self) -> float:
        """λ."""
        raise NotImplementedError

    def slots(self, site: Site) -> Slots:
        """What `split` yields for this tensor: shapes and dtypes."""
        if not self._factored(site):
            return Slots({}, {WHOLE: (site.shape, site.dtype)})
        rows, columns = _matrix(site)
        k = self.kept(min(rows, columns), site.tasks)
        of_task = {"u": ((rows, k), site.floats), "s": ((k,), site.floats), "v": ((columns, k), site.floats)}
        return Slots({"origin": (site.shape, self._origin_dtype(site))}, of_task)

    def split(self, site: Site, origin: Tensor, deltas: Deltas) -> Iterator[Part]:
        """The parts of one tensor: shared ones first, then task by task."""
        if not self._factored(site):
            for task in deltas:
                yield task, WHOLE, origin + self.factor() * self._cut(site, deltas, task)
            return
        yield None, "origin", origin
        for task in deltas:
            spectrum = spectrum_of(deltas, task, site.name)
            kept = spectrum.first(self.kept(spectrum.count, site.tasks))
            yield task, "u", kept.u
            yield task, "s", self.factor() * kept.s
            yield task, "v", kept.v

    @classmethod
    def rebuild(cls, parts: Mapping[str, Tensor]) -> Tensor:
        """A task's tensor from its parts."""
        origin = parts["origin"]
        return origin + ((parts["u"] * parts["s"]) @ parts["v"].T).reshape(origin.shape)

    def _cut(self, site: Site, deltas: Deltas, task: str) -> Tensor:
        """The task vector as it counts: a matrix cut to its top components, anything else as it is."""
        rank = min(_matrix(site)) if site.action == "decompose" else 0
        k = self.kept(rank, site.tasks) if rank else 0
        if k == rank:
            return deltas[task]
        return spectrum_of(deltas, task, site.name).reconstruct(k).reshape(site.shape)

    def _factored(self, site: Site) -> bool:
        """Whether a tensor is stored as an origin and factors: where that takes less room than every task's own."""
        if site.action != "decompose":
            return False
        rows, columns = _matrix(site)
        entries = self.kept(min(rows, columns), site.tasks) * (rows + columns + 1)
        factored = site.numel * self._origin_dtype(site).itemsize + site.tasks * entries * site.floats.itemsize
        return factored < site.tasks * site.numel * site.dtype.itemsize

    def _origin_dtype(self, site: Site) -> torch.dtype:
        """A base is stored as it is; an average is a computed part."""
        return site.dtype if self.origin == "pretrained" else site.floats


def _matrix(site: Site) -> tuple[int, int]:
    """Rows and columns, kernels taken as (out, in·k·k)."""
    return site.shape[0], site.numel // site.shape[0]
