"""Task Arithmetic: add the scaled task vectors to the base.

    merged = base + λ · Σ_t w_t τ_t        τ_t = W_t - base

Ilharco et al., "Editing Models with Task Arithmetic", arXiv:2212.04089. With per-model weights it is mergekit's
`task_arithmetic`, whose λ is 1 unless said; without them λ = 0.3, the paper's value for eight tasks.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from adarank.methods.base import Deltas, Flag, Method, OriginKind, PerTensor, flag, weighted_sum


class TaskArithmetic(Method):
    """Scaled sum of task vectors. Needs no data.

    Arguments:
        scale: λ. If not given: 1 when models carry weights (as in mergekit), else 0.3.
        normalize: divide by the sum of the weights.
        int8_mask: taken from mergekit's recipes, where it saves memory in other methods; it changes nothing.
        weight: per model (`parameters: {weight: …}`) and tensor; 1 for models that give none.
    """

    name: ClassVar[str] = "task_arithmetic"
    origin: ClassVar[OriginKind] = "pretrained"
    formula: ClassVar[str] = "W = W₀ + λ Σ_t w_t τ_t"
    source: ClassVar[str] = "Ilharco et al. 2023, arXiv:2212.04089"
    elementwise: ClassVar[bool] = True
    per_model: ClassVar[tuple[str, ...]] = ("weight",)

    scale: PerTensor | None = Field(None, alias="lambda", description="λ: 0.3, or 1 when models carry weights")
    normalize: Flag = Field(flag(False), description="divide by the sum of the weights")
    int8_mask: bool = Field(False, description="taken from mergekit's recipes; changes nothing")
    weight: PerTensor | None = Field(None, description="per model: a number, a list over the layers, or filters")

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        weights = {task: self.weight.of(task, name) if self.weight is not None else 1.0 for task in deltas}
        default = 0.3 if self.weight is None else 1.0
        scale = default if self.scale is None else self.scale.of("", name)
        total = sum(weights.values())
        divisor = total if self.normalize.of("", name) and abs(total) > 1e-8 else 1.0
        return weighted_sum(origin, deltas, lambda task: scale * weights[task] / divisor)
