"""Masks over singular components: how they are made, learned and kept.

A mask is learned through one logit per component, which starts at +l (kept) or -l (pruned).

binary   b = [σ(logit/τ) ≥ 0.5] = [logit ≥ 0]     exactly 0 or 1; its gradient is the sigmoid's slope (a straight-through
                                                  estimator). AdaRank, Section 5 and Appendix A.
soft     b = (logit + l) / 2l                     any real number, 1 or 0 at the start; its gradient is exact

Soft masks are ours: every component gets a coefficient of its own, and what binary masks keep is what they have at ½ or more.
Adam moves every number alike, so small singular components would hardly move a weight: `pace` makes up for that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adarank.errors import CheckpointError, MismatchError
from adarank.io.bundle import pack, unpack
from adarank.io.writer import write_tensors
from adarank.spectral.bases import BASES, COMMON, Basis
from adarank.spectral.svd import determined, top_count

FILE = "masks.safetensors"
_FORMAT, _SOFT_FORMAT = "adarank-masks-1", "adarank-masks-2"  # the second may have soft masks
MaskKind = Literal["binary", "soft"]
MOST = 20.0  # of a component's pace


def top_mask(sizes: tuple[int, ...], share: float) -> Tensor:
    """(K,) bool: the first `top_count(share, r)` of each task's r components."""
    parts = [torch.arange(size) < top_count(share, size) for size in sizes if size]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)


def random_mask(mask: Tensor, sizes: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """(K,) bool with each task's number of kept components in random places: the control of an ablation."""
    parts = [own[torch.randperm(own.numel(), generator=generator)] for own in mask.split(sizes)]
    return torch.cat(parts)


def hard(logits: Tensor) -> Tensor:
    """True where a component is kept: σ(logit/τ) ≥ 0.5 for every τ > 0."""
    return logits >= 0


def straight_through(grad_mask: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """dL/dlogit from dL/db: the slope of σ(logit/τ)."""
    soft = torch.sigmoid(logits / temperature)
    return grad_mask * soft * (1 - soft) / temperature


def soft(logits: Tensor, logit: float) -> Tensor:
    """Soft masks: 0 at -`logit`, 1 at +`logit`, and linear, within these and beyond."""
    return (logits + logit) / (2 * logit)


def pace(s: Tensor) -> Tensor:
    """How much faster than its logit each component's soft mask moves, so that Adam's steps move b∘s alike: rms(s)/s_r.

    Capped, as the smallest would else go from 0 to 1 in a step or two. Components that are rounding keep 1, and count not.

    Arguments:
        s: (r,) singular values of one task's matrix, descending.
    """
    real = determined(s)
    if not bool(real.any()):
        return torch.ones_like(s)
    rms = s[real].square().mean().sqrt()
    return torch.where(real, (rms / s).clamp(max=MOST), 1.0)


def kept(mask: Tensor) -> Tensor:
    """Bool: True where a component is kept; of a soft mask, where it is nearer to 1 than to 0, or above."""
    return mask >= 0.5 if mask.is_floating_point() else mask


@dataclass(frozen=True)
class MaskFile:
    """What adaptation found: enough to merge again without data or network.

    Attributes:
        origin: "pretrained" or "average".
        tasks: the order of λ and of each mask's parts: the tasks, and "common" last where the basis has such a block.
        lam: tensor name -> (tasks,) float32 coefficients.
        masks: matrix name -> (K,) over all tasks' components: bool, or float32 where masks are soft.
        sizes: matrix name -> components per task.
        about: how it was made: settings, input hashes.
        basis: how matrices were decomposed.
        thresholds: task -> magnitude at which its task vector was trimmed, where they were processed as by TIES.
    """

    origin: str
    tasks: tuple[str, ...]
    lam: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    sizes: Mapping[str, tuple[int, ...]]
    about: Mapping[str, Any]
    basis: str = "task_vectors"
    thresholds: Mapping[str, float] = field(default_factory=dict)

    def decomposition(self) -> Basis:
        """The basis, with the thresholds.

        Raises:
            MismatchError: this version knows no basis of that name.
        """
        if self.basis not in BASES:
            raise MismatchError(
                f"basis '{self.basis}' in the masks file; known are {', '.join(BASES)}. Update adarank."
            )
        return replace(BASES[self.basis], thresholds=self.thresholds)

    def kept_share(self) -> float:
        """Share of all components that are kept."""
        total = sum(mask.numel() for mask in self.masks.values())
        return sum(int(kept(mask).sum()) for mask in self.masks.values()) / max(1, total)

    def kept(self, name: str) -> list[int]:
        """Components kept per task in one matrix."""
        return [int(own.sum()) for own in kept(self.masks[name]).split(self.sizes[name])]

    def save(self, path: Path | str) -> None:
        """Write λ and soft masks as float32, binary masks as bits."""
        path = Path(path)
        names = list(self.lam)
        tensors = {"lambda": torch.stack([self.lam[name].float().cpu() for name in names])}
        for name, mask in self.masks.items():
            tensors[f"mask.{name}"] = mask.float().cpu() if mask.is_floating_point() else pack(mask)
        form = _SOFT_FORMAT if any(mask.is_floating_point() for mask in self.masks.values()) else _FORMAT
        header = {"origin": self.origin, "tasks": list(self.tasks), "tensors": names, "about": dict(self.about), "basis": self.basis,
                  "sizes": {name: list(sizes) for name, sizes in self.sizes.items()},
                  **({"thresholds": dict(self.thresholds)} if self.thresholds else {})}  # fmt: skip
        write_tensors(path, tensors, {"format": form, "header": json.dumps(header)})

    @classmethod
    def load(cls, path: Path) -> MaskFile:
        """Read a masks file.

        Raises:
            CheckpointError: it is missing, damaged or not a masks file.
        """
        try:
            with safe_open(str(path), framework="pt") as handle:
                metadata = handle.metadata() or {}
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: not a whole masks file ({error}). Give the {FILE} of an adapted output."
            ) from None
        if metadata.get("format") not in (_FORMAT, _SOFT_FORMAT):
            raise CheckpointError(
                f"{path}: not a masks file of this version (needed format {_FORMAT} or {_SOFT_FORMAT}, got {metadata.get('format')})."
            )
        try:
            return cls._parse(json.loads(metadata["header"]), tensors)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: a damaged masks file ({type(error).__name__}: {error}). Copy it again."
            ) from None

    @classmethod
    def _parse(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> MaskFile:
        tasks = tuple(header["tasks"])
        if tensors["lambda"].shape[1:] != (len(tasks),):
            raise ValueError(f"λ of shape {tuple(tensors['lambda'].shape)} for {len(tasks)} tasks")
        lam = dict(zip(header["tensors"], tensors["lambda"], strict=True))
        sizes = {name: tuple(parts) for name, parts in header["sizes"].items()}
        masks = {n: _mask(tensors[f"mask.{n}"], sum(parts)) for n, parts in sizes.items()}
        thresholds = {task: float(value) for task, value in header.get("thresholds", {}).items()}
        if thresholds and not thresholds.keys() >= set(tasks) - {COMMON}:
            raise ValueError(f"thresholds for {len(thresholds)} of {len(tasks)} tasks")
        basis = header.get("basis", "task_vectors")
        return cls(header["origin"], tasks, lam, masks, sizes, header["about"], basis, thresholds)


def _mask(stored: Tensor, components: int) -> Tensor:
    if not stored.is_floating_point():
        return unpack(stored, (components,))
    if stored.shape != (components,):
        raise ValueError(f"a soft mask of shape {tuple(stored.shape)} for {components} components")
    return stored
