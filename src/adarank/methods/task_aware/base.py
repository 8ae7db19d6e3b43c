"""What a task-aware method is: it gives each task weights of its own, from parts that take less room than T experts.

    shared_n, {own_{t,n}} = split(origin_n, {task: task vector})       once, when a bundle is written
    W_{t,n} = rebuild(shared_n, own_{t,n})                             when a task is loaded

Both are functions of one tensor n at a time, so bundles are written and read tensor by tensor. `io/bundle.py` says how
parts lie on disk. Such a method is no rival of one merged model: whoever uses it must know the task of every input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.errors import CheckpointError, RecipeError
from adarank.io.bundle import WHOLE, PartFile, Parts, Piece, held_parts, key
from adarank.io.checkpoint import cast, check_finite
from adarank.io.writer import Layout
from adarank.method import Context, Outline, Result, Site, sites_of
from adarank.methods.base import Deltas, Method

__all__ = ["Part", "Site", "Slots", "TaskAwareMethod", "in_memory", "layouts", "rebuilt", "sites_of", "task_parts"]

Part = tuple[str | None, str, Tensor]
"""(task, or None for what is shared; name of the part; the tensor)."""


@dataclass(frozen=True)
class Slots:
    """Part -> (shape, dtype), in the order in which `split` yields them.

    Attributes:
        shared: parts that all tasks use.
        per_task: parts that every task has for itself.
    """

    shared: Layout
    per_task: Layout


class TaskAwareMethod(Method):
    """Base of the task-aware methods. Subclasses define `slots`, `split` and `rebuild`.

    A setting named in `per_model` may change the weights of its own task alone: a search tunes it task by task.

    Class attributes:
        constants: parts that are one number per task, for the whole model.
    """

    in_use: ClassVar[str] = (
        "Task-aware: each task has weights of its own, so whoever uses them must know the task of every input."
    )
    python: ClassVar[tuple[str, str]] = (
        "merge_each",
        "gives each task weights of its own, not one model. Write a bundle of them by a recipe, or use adarank.merge_each.",
    )
    constants: ClassVar[tuple[str, ...]] = ()

    def slots(self, site: Site) -> Slots:
        """What `split` will yield for this tensor. A part `whole` is the task's tensor itself: it is not rebuilt."""
        raise NotImplementedError

    def split(self, site: Site, origin: Tensor, deltas: Deltas) -> Iterator[Part]:
        """The parts of one tensor: shared ones first, then task by task. `origin` may be mapped: never write to it."""
        raise NotImplementedError

    @classmethod
    def rebuild(cls, parts: Mapping[str, Tensor]) -> Tensor:
        """A task's tensor from its shared and own parts and constants; floats are at least float32."""
        raise NotImplementedError

    def constant(self, part: str, task: str) -> float:
        """The value of one of `constants`, by a prepared method."""
        raise NotImplementedError

    @classmethod
    def needs(cls) -> str:
        """In words: what the method reads, and what its output needs in use."""
        return f"{super().needs()}; in use, each input's task"

    @classmethod
    def of_one_task(cls) -> tuple[str, ...]:
        """Names of the settings that a model may give for itself."""
        return cls.per_model

    def output_layouts(self, outline: Outline) -> tuple[Layout, dict[str, Layout]]:
        """Layouts of the shared parts and of each task's, from headers alone."""
        return layouts(self, outline.sites(), outline.network.tasks)

    def run(self, context: Context) -> Result:
        """The parts of a bundle, made one at a time as they are written."""
        outline = context.outline()
        shared, per_task = self.output_layouts(outline)
        pieces = task_parts(self, context.network, outline.sites(), context.device)
        settings = self.model_dump(mode="json", by_alias=True)
        return Result(parts=Parts(self.name, settings, shared, per_task, pieces))

    @classmethod
    def task_tensors(cls, tensors: Layout, shared: PartFile, of_task: PartFile) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of one task's network without its head, from its parts."""
        return rebuilt(cls, tensors, shared, of_task)


def layouts(method: TaskAwareMethod, sites: Sequence[Site], tasks: Sequence[str]) -> tuple[Layout, dict[str, Layout]]:
    """Layouts of the shared parts and of each task's own, from headers alone."""
    shared: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    per_task: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        key(part): ((), torch.float32) for part in method.constants
    }
    for site in sites:
        slots = method.slots(site) if site.merged else Slots({WHOLE: (site.shape, site.dtype)}, {})
        shared |= {key(part, site.name): spec for part, spec in slots.shared.items()}
        per_task |= {key(part, site.name): spec for part, spec in slots.per_task.items()}
    return shared, {task: dict(per_task) for task in tasks}


@torch.no_grad()
def task_parts(
    method: TaskAwareMethod, network: AlignedCheckpoints, sites: Sequence[Site], device: torch.device | str = "cpu"
) -> Iterator[Piece]:
    """Every part of a bundle in the order of `layouts`, one in memory at a time."""
    prepared = method.prepare(network, device)
    for task in network.tasks:
        for part in method.constants:
            yield task, key(part), torch.tensor(prepared.constant(part, task))
    for site in sites:
        if not site.merged:
            yield None, key(WHOLE, site.name), network.kept(site.name)
            continue
        for owner, part, tensor in _parts(prepared, network, site, device):
            yield owner, key(part, site.name), check_finite(tensor, site.name, f"the result of '{method.name}'")
            del tensor


def _parts(
    method: TaskAwareMethod, network: AlignedCheckpoints, site: Site, device: torch.device | str
) -> Iterator[Part]:
    """The parts of one tensor, by a prepared method."""
    kind = method.origin_kind(network)
    origin = network.origin(site.name, kind, device)
    parts = method.split(site, origin, network.deltas(site.name, origin, kind))
    yield from _not_negative(method, site.name, list(parts)) if site.name.endswith("running_var") else parts


def rebuilt(
    method: type[TaskAwareMethod], tensors: Layout, shared: PartFile, of_task: PartFile
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one task's whole network but its head, from its parts, one in memory at a time."""
    constants = of_task.of()
    for name, (_, dtype) in tensors.items():
        merged = _tensor(method, name, {**constants, **shared.of(name), **of_task.of(name)})
        yield name, cast(merged, dtype, name, "Give base and experts in a wider dtype, such as bfloat16.")


def in_memory(
    method: TaskAwareMethod, network: AlignedCheckpoints, sites: Sequence[Site], device: torch.device | str = "cpu"
) -> tuple[PartFile, dict[str, PartFile]]:
    """The shared parts and each task's own, held in memory: as large as the bundle."""
    return held_parts(network.tasks, task_parts(method, network, sites, device))


class _Parts(dict[str, Tensor]):
    """The parts of one tensor by name. One that a bundle lacks is named in an error; errors of the method itself pass through."""

    def __init__(self, name: str, parts: Mapping[str, Tensor]) -> None:
        super().__init__(parts)
        self._name = name

    def __missing__(self, part: str) -> Tensor:
        raise CheckpointError(f"bundle: tensor {self._name!r} lacks its part {part!r}. Copy the bundle again.")


def _tensor(method: type[TaskAwareMethod], name: str, parts: Mapping[str, Tensor]) -> Tensor:
    if WHOLE in parts:
        return parts[WHOLE]
    wide = {
        n: t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t for n, t in parts.items()
    }
    return method.rebuild(_Parts(name, wide))


def _not_negative(method: TaskAwareMethod, name: str, parts: list[Part]) -> Iterator[Part]:
    """Running variances, checked: a root of a negative one would be NaN, and so every logit."""
    shared = {part: tensor for task, part, tensor in parts if task is None}
    for task in dict.fromkeys(task for task, _, _ in parts if task is not None):
        constants = {part: torch.tensor(method.constant(part, task)) for part in method.constants}
        of_task = {part: tensor for owner, part, tensor in parts if owner == task}
        if bool((_tensor(type(method), name, {**constants, **shared, **of_task}) < 0).any()):
            raise RecipeError(
                f"{name}: '{method.name}' gives task '{task}' negative variances. Keep the base's by select: keep: ['*.running_*']."
            )
    return iter(parts)
