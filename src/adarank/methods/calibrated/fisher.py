"""Fisher merging: each entry a mean of the experts', weighted by how much the expert's predictions depend on it.

    F_t = mean_x E_y (∂ log p_t(y|x) / ∂W)²              the diagonal of expert t's Fisher information
    F̂_t = max(F_t / rms(F_t), floor)                     rms: the root of the mean square over the whole model
    merged = Σ_t F̂_t∘W_t / Σ_t F̂_t  =  W̄ + Σ_t F̂_t∘(W_t - W̄) / Σ_t F̂_t

`true`: y is drawn by the expert itself, p_t(y|x), so no label is read. The expectation is a sum over all classes where
they are few; else y is drawn. `empirical`: y is the input's label. The square is of each single input's gradient, not of
a batch's. Dividing by rms gives all experts the same say over the whole model, as the authors' global norm does, and
makes the floor a share that means the same for every size of model; where no expert's predictions depend on an entry, all
F̂_t are the floor and the result is the mean.

Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", arXiv:2111.09832, Equation 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr, field_validator
from torch import Tensor

from adarank.methods.base import AlignedCheckpoints, Deltas
from adarank.methods.calibrated.base import CalibratedMethod, Gathers


class Fisher(CalibratedMethod):
    """The average, weighted entry by entry by the experts' Fisher information.

    Covers every merged tensor that gets a gradient: embeddings, norms and biases too; buffers are averaged.

    Arguments:
        kind: `true` (the expert's own predictions, no labels) or `empirical` (labels of the adapt inputs).
        classes: how many classes the expectation of `true` is exact for; of more, so many labels are drawn per input.
        normalise: divide each expert's Fisher information by its root mean square over the model.
        floor: least weight of an entry.
    """

    name: ClassVar[str] = "fisher"
    formula: ClassVar[str] = "W = Σ_t F̂_t∘W_t / Σ_t F̂_t; F_t = mean_x E_y (∂ log p_t(y|x) / ∂W)²"
    source: ClassVar[str] = "Matena and Raffel 2022, arXiv:2111.09832"
    data: ClassVar[str] = "unlabelled inputs of each task (kind: empirical reads labels of adapt inputs)"
    of_classes: ClassVar[bool] = True
    of_inputs: ClassVar[bool] = True
    decides: ClassVar[tuple[str, ...]] = (*CalibratedMethod.decides, "kind", "classes")

    kind: Literal["true", "empirical"] = Field("true", description="y: drawn by the expert, or the label")
    classes: int = Field(10, ge=1, description="true: the sum over classes is exact up to so many; else so many draws")
    normalise: bool = Field(True, description="divide by the root mean square over the model")
    floor: float = Field(1e-6, gt=0, description="least weight of an entry")
    _scales: Mapping[str, float] = PrivateAttr(default_factory=dict)

    @field_validator("kind", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return "true" if value is True else value  # how YAML reads `kind: true`

    @property
    def reads_labels(self) -> bool:
        """Whether the statistics need labels."""
        return self.kind == "empirical"

    def gathered(self, gathers: Gathers) -> Fisher:
        """The method with the experts' squared gradients."""
        return self.with_statistics(gathers.squared_gradients(self.classes, self.seed))

    def prepare(self, network: AlignedCheckpoints, device: torch.device | str) -> Fisher:
        """A copy of the method that knows what it needs of the whole model."""
        prepared = self.model_copy()
        prepared._scales = {task: self._scale(task) for task in network.tasks}
        return prepared

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        if name not in self.statistics.names:
            return origin
        moved, total = torch.zeros_like(origin), torch.zeros_like(origin)
        for task in deltas:
            weight = self.statistics.read(name, task).to(origin) * self._scales[task]
            weight.clamp_(min=self.floor)
            total += weight
            moved += weight * deltas[task]
        return origin + moved / total

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return 6

    def held(self, shape: tuple[int, ...], decomposed: bool) -> int:
        """Numbers of four bytes held for a tensor while its statistics are taken."""
        return 3 * math.prod(shape)  # the sum, an input's gradient, and its square

    def _scale(self, task: str) -> float:
        """1 / rms of a task's Fisher information over the model; 1 where all of it is zero, or nothing is normalised."""
        if not self.normalise:
            return 1.0
        squares, count = 0.0, 0
        for name in self.statistics.names:
            information = self.statistics.read(name, task)
            squares += float(information.double().square().sum())
            count += information.numel()
        return math.sqrt(count / squares) if squares > 0 else 1.0
