"""Masked: merge again from a masks file, without data or network.

    merged = origin + Σ_t λ_t · U_t diag(b_t ∘ s_t) V_tᵀ        matrices
    merged = origin + Σ_t λ_t · δ_t                             all other tensors

Where the file has thresholds, task vectors are first trimmed and cut to the elected signs, as in TIES (`sparsify/sign_election.py`).
The masks b and coefficients λ are those that adaptation saved; the result is what adaptation evaluated.
AdaRank (arXiv:2503.22178), Equation 5.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from adarank.methods.base import (
    AdaRankError,
    AlignedCheckpoints,
    Deltas,
    Given,
    Method,
    MismatchError,
    OriginKind,
    itemise,
    weighted_sum,
)
from adarank.spectral.blocks import task_vector_blocks
from adarank.spectral.mask_file import MaskFile


class Masked(Method):
    """A saved masks file applied to base and experts. Needs no data.

    Arguments:
        masks: the masks file of an adapted output (a path in a recipe).
        shuffled: put each task's and matrix's mask in random places, as dense as it is: a control. λ stays.
        seed: of the places; by default the recipe's.
    """

    name: ClassVar[str] = "masked"
    formula: ClassVar[str] = "W = W_o + Σ_t λ_t U_t diag(b_t∘s_t) V_tᵀ"
    source: ClassVar[str] = "Lee et al. 2025, arXiv:2503.22178, Eq. 5"
    spectral: ClassVar[bool] = True

    masks: MaskFile = Field(description="masks file of an adapted output")
    shuffled: bool = Field(False, description="each mask in random places, as dense as it is")
    seed: int = Field(0, description="of the places; by default the recipe's seed")

    @classmethod
    def resolve(cls, given: Given) -> Masked:
        """The method with the settings of a recipe, checked."""
        path = given.parameters.get("masks")
        if not isinstance(path, str):
            return super().resolve(given)
        parameters = {**given.parameters, "masks": MaskFile.load(given.folder / path)}
        return super().resolve(replace(given, parameters=parameters))

    @classmethod
    def decomposes_kernels(cls, given: Given) -> bool | Collection[str]:
        """Those that the masks file has components of."""
        masks = given.parameters.get("masks")
        try:
            masks = MaskFile.load(given.folder / masks) if isinstance(masks, str) else masks
        except AdaRankError:  # `resolve` says so
            return False
        return set(masks.sizes) if isinstance(masks, MaskFile) else False

    @classmethod
    def needs(cls) -> str:
        """In words: what the method reads, and what its output needs in use."""
        return "base, experts and a masks file; no data"

    @classmethod
    def example(cls) -> Mapping[str, Any]:
        """Values of the settings that have no default, for the catalogue's figures."""
        return {"masks": MaskFile("average", (), {}, {}, {}, {})}

    def in_force(self) -> dict[str, Any]:
        """Every setting with its value, but for the file of masks."""
        return {"parameters": self.model_dump(by_alias=True, exclude={"masks"})}

    def origin_kind(self, network: AlignedCheckpoints) -> OriginKind:
        """What task vectors are counted from."""
        return "average" if self.masks.origin == "average" else "pretrained"

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        if name not in self.masks.masks:  # adapted without spectra: all components kept
            return self.merge_other(name, origin, deltas)
        blocks = task_vector_blocks(origin, deltas, name, self.masks.decomposition())
        if blocks.sizes != self.masks.sizes[name]:
            raise MismatchError(
                f"{name}: {self.masks.sizes[name]} components in the masks file, {blocks.sizes} here. Use the recipe that it was made with."
            )
        mask = self.masks.shuffled(name, self.seed) if self.shuffled else self.masks.masks[name]
        return blocks.compose(self.masks.lam[name], mask)

    def merge_other(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged tensor that is not decomposed."""
        lam = dict(zip(self.masks.tasks, self.masks.lam[name].tolist(), strict=True))
        basis = self.masks.decomposition()
        factor = basis.scaled(len(deltas))
        return weighted_sum(origin, basis.processed(deltas), lambda task: lam[task] * factor)

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        elected = 3 if self.masks.thresholds else 0  # the signs, and what trims
        return 3 + elected + (5 + 3 * tasks if decomposed else 0)  # every task's factors at once

    def check(self, network: AlignedCheckpoints) -> None:
        """Raise a sentence if the settings do not fit these models."""
        problems = []
        if self.origin_kind(network) == "pretrained" and network.base is None:
            problems.append("the masks are about the base, and the recipe gives no base_model")
        merged = set(network.merged())
        problems += [f"{name}: merged in the masks file, kept here" for name in self.masks.lam if name not in merged]
        groups = self.masks.decomposition().groups(network.tasks)
        if set(self.masks.tasks) != set(groups):
            problems.append(
                f"tasks {sorted(self.masks.tasks)} in the masks file, {sorted(network.tasks)} in the recipe"
            )
        elif self.masks.tasks != groups:
            problems.append(
                f"tasks in the order {list(self.masks.tasks)} in the masks file, {list(network.tasks)} in the recipe"
            )
        for name in network.merged():
            problems += self._fit(network, name)
        if problems:
            raise MismatchError(
                itemise("The masks file is of another merge.", problems, "Use the recipe that it was made with.", 20)
            )

    def _fit(self, network: AlignedCheckpoints, name: str) -> list[str]:
        if name not in self.masks.lam:
            return [f"{name}: no λ in the masks file"]
        if network.choices[name].action != "decompose":
            return [f"{name}: decomposed in the masks file, scaled here"] if name in self.masks.sizes else []
        if not self.masks.sizes:  # adapted without spectra: λ is all there is
            return []
        if self.masks.basis != "task_vectors":  # how many components a basis gives is compared when they are there
            return []
        here = network.components(name, self.origin_kind(network))
        sizes = self.masks.sizes.get(name, (0,) * len(here))
        return [] if sizes == here else [f"{name}: {sizes} components per task in the masks file, {here} here"]
