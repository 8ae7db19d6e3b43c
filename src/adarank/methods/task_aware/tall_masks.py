"""TALL-masks: the summed task vector, and for each task a mask of the entries that it finds useful.

    τ = Σ_t τ_t
    m_t = [|τ_t| > α_t · |τ - τ_t|]
    W_t = W₀ + m_t ∘ τ

Base and τ are stored once, a mask takes one bit per entry. α_t is λ_t in the paper, which chooses it from 0.2, 0.3, … 0.6
for each task on validation data. The inequality is strict, as in the authors' code: what a task did not move is not in its
mask. All tensors that merge are masked, biases and norms too.

Wang et al., "Localizing Task Information for Improved Model Merging and Compression", arXiv:2405.07813.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adarank.io.bits import pack, packed_size, unpack
from adarank.methods.base import Deltas, OriginKind, PerTensor, rest, weighted_sum
from adarank.methods.sparse.consensus_ta import margin
from adarank.methods.task_aware.base import Part, Site, Slots, TaskAwareMethod


class TallMasks(TaskAwareMethod):
    """One summed task vector and a binary mask per task. Needs no data, but each input's task.

    Arguments:
        lambda_mask: α_t, per model. The larger, the fewer entries a task keeps.
    """

    name: ClassVar[str] = "tall_masks"
    origin: ClassVar[OriginKind] = "pretrained"
    formula: ClassVar[str] = "W_t = W₀ + m_t∘τ; τ = Σ_t τ_t, m_t = [|τ_t| > α_t |τ - τ_t|]"
    source: ClassVar[str] = "Wang et al. 2024, arXiv:2405.07813"
    per_model: ClassVar[tuple[str, ...]] = ("lambda_mask",)

    lambda_mask: PerTensor = Field(
        rest(0.4), ge=0, description="α_t; per model: a number, a list over the layers, or filters"
    )

    def slots(self, site: Site) -> Slots:
        """What `split` yields for this tensor: shapes and dtypes."""
        shared = {"origin": (site.shape, site.dtype), "sum": (site.shape, site.floats)}
        return Slots(shared, {"mask": ((packed_size(site.numel),), torch.uint8)})

    def split(self, site: Site, origin: Tensor, deltas: Deltas) -> Iterator[Part]:
        """The parts of one tensor: shared ones first, then task by task."""
        total = weighted_sum(torch.zeros_like(origin), deltas, lambda task: 1.0)
        yield None, "origin", origin
        yield None, "sum", total
        for task in deltas:
            yield task, "mask", pack(margin(total, deltas[task], self.lambda_mask.of(task, site.name)) > 0)

    @classmethod
    def rebuild(cls, parts: Mapping[str, Tensor]) -> Tensor:
        """A task's tensor from its parts."""
        origin = parts["origin"]
        return origin + unpack(parts["mask"], tuple(origin.shape)) * parts["sum"]

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return 6
