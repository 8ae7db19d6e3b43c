"""The file in which masks and λ are kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adarank.errors import CheckpointError, MismatchError
from adarank.io.bits import pack, unpack
from adarank.io.files import check_file
from adarank.io.hub import local_path
from adarank.io.parsing import parse_json
from adarank.io.writer import write_tensors
from adarank.spectral.bases import BASES, COMMON, Basis
from adarank.spectral.masks import MaskKind, _check_header, kept, scattered

FILE = "masks.safetensors"


_FORMAT, _SOFT_FORMAT = "adarank-masks-1", "adarank-masks-2"  # the second may have soft masks


@dataclass(frozen=True)
class MaskFile:
    """The masks and λ that adaptation learned: enough to merge again without data or network.

    Source: Lee et al. 2025, arXiv:2503.22178.

    Attributes:
        origin: "pretrained" or "average".
        tasks: the order of λ and of each mask's parts: the tasks, and "common" last where the basis has such a block.
        lam: tensor name -> (tasks,) float32 coefficients.
        masks: matrix name -> (K,) over all tasks' components: bool, or float32 where masks are soft.
        sizes: matrix name -> components per task.
        about: how it was made: settings, input hashes.
        basis: how matrices were decomposed.
        thresholds: task -> magnitude at which its task vector was trimmed, where they were processed as by TIES.

    Example:
        base, a, b = (torch.nn.Linear(8, 4) for _ in range(3))
        experts, batches = {"a": a, "b": b}, {task: [torch.randn(16, 8)] for task in "ab"}
        adarank.adapt(base, experts, batches, settings={"steps": 3}).masks.save("masks.safetensors")

        masks = adarank.MaskFile.load("masks.safetensors")
        merged = adarank.merge(base, experts, "masked", {"masks": masks})
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

    def shuffled(self, name: str, seed: int) -> Tensor:
        """A matrix's masks in random places, each task's as dense as it is."""
        return scattered(self.masks[name], self.sizes[name], seed, name)

    @property
    def kind(self) -> MaskKind:
        """`soft` if some mask is of real numbers."""
        return "soft" if any(mask.is_floating_point() for mask in self.masks.values()) else "binary"

    def kept_share(self) -> float:
        """Share of all components that are kept, from 0 to 1; of soft masks, those at ½ or above. 1 if there are none."""
        total = sum(mask.numel() for mask in self.masks.values())
        return sum(int(kept(mask).sum()) for mask in self.masks.values()) / total if total else 1.0

    def kept(self, name: str) -> list[int]:
        """Components kept per task in one matrix, in the order of `tasks`."""
        return [int(part.sum()) for part in kept(self.masks[name]).split(self.sizes[name])]

    def least_kept(self) -> tuple[str, str, float] | None:
        """Of all matrices' and tasks' strongest components the one that is kept least: (matrix, task, its mask); None without masks."""
        first = [
            (float(part[0]), name, task)
            for name, mask in self.masks.items()
            for task, part in zip(self.tasks, mask.float().split(self.sizes[name]), strict=True)
            if part.numel()
        ]
        value, name, task = min(first, default=(1.0, "", ""))
        return (name, task, value) if name else None

    def with_strongest(self, name: str, task: str, value: float) -> Tensor:
        """A matrix's masks with another value for the strongest component of a task."""
        mask = self.masks[name].clone()
        mask[sum(self.sizes[name][: self.tasks.index(task)])] = value
        return mask

    def save(self, path: Path | str) -> None:
        """Write λ and soft masks as float32, binary masks as bits."""
        path = Path(path)
        names = list(self.lam)
        tensors = {"lambda": torch.stack([self.lam[name].float().cpu() for name in names])}
        for name, mask in self.masks.items():
            tensors[f"mask.{name}"] = mask.float().cpu() if mask.is_floating_point() else pack(mask)
        form = _SOFT_FORMAT if self.kind == "soft" else _FORMAT
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
        path = local_path(path)
        check_file(path)
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
            return cls._parse(parse_json(metadata["header"]), tensors)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: a damaged masks file ({type(error).__name__}: {error}). Copy it again."
            ) from None

    @classmethod
    def _parse(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> MaskFile:
        _check_header(header)
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


def joined(files: Sequence[MaskFile], names: Sequence[str]) -> MaskFile | None:
    """The masks files of parts of one network as one; None if there are none.

    Arguments:
        names: of the tensors, in the order in which they are to be.
    """
    if not files:
        return None

    def whole(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        together = {name: value for part in parts for name, value in part.items()}
        return {name: together[name] for name in names if name in together}

    lam, masks, sizes = (whole([getattr(file, part) for file in files]) for part in ("lam", "masks", "sizes"))
    return replace(files[0], lam=lam, masks=masks, sizes=sizes)
