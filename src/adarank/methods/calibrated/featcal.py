"""FeatCal: a merge whose every block is fitted, in closed form, to what the experts' blocks do on their own streams.

    x_s   what a layer is given in the merge, whose earlier blocks are calibrated already
    x_e   what it is given in expert t, behind the expert's own blocks;   x_t = α x_e + (1 - α) x_s
    C_t = mean x_s x_sᵀ,  R_t = mean x_s x_tᵀ,  n_t = ‖C_t‖,  A = ρ W_m + (1 - ρ) W₀       W_m: the merge before

    weight   (Σ_t C_t/n_t + (λ + 10⁻⁸) I) Wᵀ = Σ_t (R_t/n_t) W_tᵀ + λ Aᵀ
    bias     b = [Σ_t (b_t + W_t mean x_t - W mean x_s) / n_t + λ a] / (Σ_t 1/n_t + λ)
    norm     z: x_s normalised;  e_t = mean z², m_t = mean z;  for each channel
             [Σ e + λ, Σ m; Σ m, T + λ] (γ, β) = [Σ (e γ_t + m β_t) + λ a_γ, Σ (m γ_t + β_t) + λ a_β]

All layers of a block are measured before any of them is changed. The merge before is Task Arithmetic. Whatever is neither a
linear layer nor a layer norm stays as it is there. A block is as in RegMean++, whose formula is this one with α = 0, λ = 0,
all n_t alike, neither biases nor norms, and the experts' own layers inside the block. The authors' code leaves what is outside of
the encoder's blocks alone; here such layers are blocks by themselves. In the last block, and behind it, all positions but the
first count little, as a class token is all that is read there; that is so here for models that have one. Weights are solved
for in float64.

"FeatCal", arXiv:2605.13030; the authors' code, MIT licence.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from adarank.method import Outline
from adarank.methods.base import AlignedCheckpoints, Deltas, OriginKind, weighted_sum
from adarank.methods.calibrated.base import CalibratedMethod, Fit, Gathers, Moments, Pair

_RIDGE = 1e-8
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")


def _number_or_average(given: Any) -> Any:
    if given != "average" and (isinstance(given, bool) or not isinstance(given, (int, float))):
        raise ValueError("a number, or average, was needed")
    return given


class FeatCal(CalibratedMethod):
    """Task Arithmetic, then every block fitted to the experts' features: weights, biases and norms.

    Arguments:
        start: λ of the Task Arithmetic that is calibrated; `average` is the mean of the experts.
        target: α, the share of the expert's own stream in what a layer is fitted to.
        anchor: ρ, where weights are pulled to: 1 is the merge before, 0 the base, above 1 is beyond the merge.
        ridge: λ of the formula, how strongly they are pulled.
        positions: in the last block, the weight of all positions but the first, where the model has a class token.
        batch_size: inputs of a forward pass. Changes time and memory, not the result.
    """

    name: ClassVar[str] = "featcal"
    origin: ClassVar[OriginKind] = "pretrained"
    formula: ClassVar[str] = (
        "(Σ_t C_t/n_t + λ) Wᵀ = Σ_t (R_t/n_t) W_tᵀ + λ (ρ W_m + (1 - ρ) W₀)ᵀ, block by block; biases and norms alike"
    )
    source: ClassVar[str] = "arXiv:2605.13030"
    rest: ClassVar[str] = "as in the merge before"
    decides: ClassVar[tuple[str, ...]] = (
        *CalibratedMethod.decides, "start", "target", "anchor", "ridge", "positions",
    )  # fmt: skip

    start: Annotated[float | Literal["average"], BeforeValidator(_number_or_average)] = Field(
        0.3, description="λ of the Task Arithmetic that is calibrated, or average"
    )
    target: float = Field(0.3, ge=0, le=1, description="α, share of the expert's own stream in the target")
    anchor: float = Field(2.0, description="ρ, where weights are pulled to: 0 the base, 1 the merge before")
    ridge: float = Field(0.05, ge=0, description="λ, how strongly")
    positions: float = Field(0.01, gt=0, le=1, description="weight of positions other than a class token's, at the end")
    batch_size: int = Field(32, ge=1, description="inputs of a forward pass; changes time and memory only")

    @property
    def inputs_at_once(self) -> int:
        """Inputs of one forward pass while statistics are taken."""
        return self.batch_size

    @classmethod
    def passes_over(cls) -> str:
        """In words: how often checkpoints and inputs are gone through."""
        return "the checkpoints once to merge, and before it each expert with its inputs once for every block"

    @classmethod
    def memory(cls) -> str:
        """In words: what the method holds in memory."""
        return f"{super().memory()}, the merge beside it, and what one block's layers are given on one task's inputs"

    def held_bytes(self, outline: Outline) -> int:
        """As of all statistics, and the merge beside the network."""
        return super().held_bytes(outline) + 4 * sum(info.numel for info in outline.network.tensors.values())

    def gathered(self, gathers: Gathers) -> FeatCal:
        """The same method with the tensors of all calibrated blocks."""
        return self.with_statistics(gathers.calibrated_by_block(self))

    def last_weight(self, network: AlignedCheckpoints) -> float:
        """What all positions but the first weigh in the last block and behind it."""
        return self.positions if any(name.endswith(_CLASS_TOKENS) for name in network.tensors) else 1.0

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        if name in self.statistics.names:
            return self.statistics.read(name, "").to(origin)
        scale = 1 / len(deltas) if self.start == "average" else self.start
        return weighted_sum(origin, deltas, lambda task: scale)

    def fit(self, norm: bool) -> Fit:
        """What a layer's tensors are fitted with: a layer norm's, or a linear layer's."""
        return _NormFit(self.anchor, self.ridge) if norm else _LinearFit(self.anchor, self.ridge)

    def held(self, shape: tuple[int, ...], decomposed: bool) -> int:
        """Numbers of four bytes held for a tensor while its statistics are taken."""
        return 5 * shape[1] ** 2 if decomposed and len(shape) == 2 else 0


class _LinearFit:
    """Sums over the tasks of what the formulas of weight and bias take of each."""

    def __init__(self, anchor: float, ridge: float) -> None:
        self._anchor, self._ridge = anchor, ridge
        self._left, self._right, self._mean, self._fitted, self._count = torch.zeros(5, 1, 1, dtype=torch.float64)

    def add(self, moments: Moments, weight: Tensor, bias: Tensor | None) -> None:
        """A task: what the layer is given, and the expert's own weight (out, in) and bias (out,)."""
        norm = max(float(torch.linalg.matrix_norm(moments.second)), _RIDGE)
        self._left = self._left + moments.second / norm
        self._right = self._right + moments.cross @ weight.T / norm
        self._mean = self._mean + moments.mean[:, None] / norm
        output = weight @ moments.target + (0 if bias is None else bias)
        self._fitted = self._fitted + output[:, None] / norm
        self._count = self._count + 1 / norm

    def solved(self, base: Pair, merged: Pair) -> Pair:
        """Weight and bias, given those of the base and of the merge before."""
        width = len(self._left)
        right = self._right + self._ridge * (self._anchor * merged[0] + (1 - self._anchor) * base[0]).T
        damped = self._left + (self._ridge + _RIDGE) * torch.eye(width).to(right)
        weight = torch.linalg.solve(damped, right).T
        if base[1] is None or merged[1] is None:
            return weight, None
        fitted = (self._fitted - weight @ self._mean)[:, 0]
        fitted = fitted + self._ridge * (self._anchor * merged[1] + (1 - self._anchor) * base[1])
        return weight, fitted / (self._count[0, 0] + self._ridge)


class _NormFit:
    """Sums over the tasks of what the formula of a layer norm's γ and β takes of each."""

    def __init__(self, anchor: float, ridge: float) -> None:
        self._anchor, self._ridge, self._tasks = anchor, ridge, 0
        self._squares, self._means, self._gain, self._shift = torch.zeros(4, 1, dtype=torch.float64)

    def add(self, moments: Moments, weight: Tensor, bias: Tensor | None) -> None:
        """A task: what is normalised, and the expert's own γ and β."""
        assert bias is not None
        self._squares, self._means = self._squares + moments.second, self._means + moments.mean
        self._gain = self._gain + moments.second * weight + moments.mean * bias
        self._shift = self._shift + moments.mean * weight + bias
        self._tasks += 1

    def solved(self, base: Pair, merged: Pair) -> Pair:
        """γ and β, given those of the base and of the merge before."""
        assert base[1] is not None
        assert merged[1] is not None
        gain = self._gain + self._ridge * (self._anchor * merged[0] + (1 - self._anchor) * base[0])
        shift = self._shift + self._ridge * (self._anchor * merged[1] + (1 - self._anchor) * base[1])
        squares, count = self._squares + self._ridge, self._tasks + self._ridge
        determinant = (squares * count - self._means**2).clamp(min=_RIDGE)
        weight = (count * gain - self._means * shift) / determinant
        return weight, (squares * shift - self._means * gain) / determinant
