"""A method, a basis and two objectives that are no part of adarank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from adarank.adapt.objectives import SelfLabel, View
from adarank.methods.base import Deltas, Method, OriginKind, weighted_sum
from adarank.spectral.bases import Basis, task_vectors
from adarank.spectral.svd import Spectrum


class PartWay(Method):
    """Part of the way from the base to the average. Needs no data."""

    name: ClassVar[str] = "part_way"
    origin: ClassVar[OriginKind] = "pretrained"
    formula: ClassVar[str] = "W = W₀ + a mean_t τ_t"
    source: ClassVar[str] = "adarank's tests"

    share: float = Field(0.5, ge=0, le=1, description="a")

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        return weighted_sum(origin, deltas, lambda task: self.share / len(deltas))


def halved(deltas: Mapping[str, Tensor], name: str) -> list[Spectrum]:
    """The task vectors' own spectra, at half their size."""
    return [Spectrum(whole.u, whole.s / 2, whole.v) for whole in task_vectors(deltas, name)]


HALVES = Basis("halves", halved, scaled=lambda tasks: 0.5)


def confidence(view: View, labels: SelfLabel) -> Tensor:
    """Minus the mean largest probability."""
    return -view.logits.softmax(dim=-1).amax(dim=-1).mean()


def nearness(view: View, labels: SelfLabel) -> Tensor:
    """Mean squared distance of the logits from the expert's."""
    assert view.expert is not None
    return (view.logits - view.expert).square().mean()


nearness.needs = {"expert"}  # type: ignore[attr-defined]
