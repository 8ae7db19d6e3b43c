"""Bundles in use: the whole state of one task, tensor by tensor; a working module; an ordinary checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adarank.errors import CheckpointError
from adarank.io.bundle import BundleFolder
from adarank.io.checkpoint import check_finite
from adarank.io.record import versions
from adarank.io.writer import BUNDLE, RECORD, Layout, atomic_folder, write_checkpoint, write_json
from adarank.methods import METHODS
from adarank.methods.task_aware.base import Taskwise, rebuilt
from adarank.modular import Surgery, TwinMerging, WEMoE, surgery, twin_merging, wemoe
from adarank.modular.base import whole_tensors
from adarank.outputs.merged import empty, filled
from adarank.outputs.write import CONFIG
from adarank.settings import nearest


@dataclass(frozen=True)
class Kind:
    """How bundles of a kind are read.

    Attributes:
        tensors: (bundle, task) -> (name, tensor) of the task's whole network but its head, in the order of
            `about.tensors`, one in memory at a time.
        dress: (bundle, task, module with these tensors and the task's head) -> what serves the task, where that is more
            than the module: adapters put into it, layers that merge per input put in place of its own.
    """

    tensors: Callable[[BundleFolder, str], Iterator[tuple[str, Tensor]]]
    dress: Callable[[BundleFolder, str, nn.Module], nn.Module] | None = None


def _taskwise(method: type[Taskwise], bundle: BundleFolder, task: str) -> Iterator[tuple[str, Tensor]]:
    return rebuilt(method, bundle.about.tensors, bundle.shared(), bundle.own(task))


KINDS: dict[str, Kind] = {
    name: Kind(partial(_taskwise, method)) for name, method in METHODS.items() if issubclass(method, Taskwise)
}
KINDS |= {
    Surgery.name: Kind(whole_tensors, surgery.dress),
    WEMoE.name: Kind(whole_tensors, wemoe.dress),
    TwinMerging.name: Kind(whole_tensors, twin_merging.dress),
}


class Bundle(BundleFolder):
    """A bundle on disk, which yields a network for each of its tasks.

    Arguments:
        folder: what `adarank merge` wrote with a task-aware method.

    Attributes:
        about: kind, settings, tasks, tensors.
        sizes: bytes of the bundle's weights, and of all experts whole (`experts`).

    Raises:
        CheckpointError: it is no bundle, damaged, incomplete, or of a format or kind that is not known.

    Example:
        bundle = adarank.Bundle("bundle")
        print(bundle.tasks, bundle.sizes["bundle"], bundle.sizes["experts"])
        weights = dict(bundle.tensors("sentiment"))
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        if self.about.kind not in KINDS:
            raise CheckpointError(
                f"{self.folder / BUNDLE}: a bundle of kind '{self.about.kind}', which this adarank does not know."
                f"{nearest(self.about.kind, KINDS)} Read it with the version that wrote it."
            )
        self.kind = KINDS[self.about.kind]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.about.tasks

    def tensors(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """(name in the base, tensor) of a task's whole network but its head, one in memory at a time.

        Raises:
            CheckpointError: no such task, or a file of it is damaged.
        """
        self.names(task)
        return self.kind.tensors(self, task)

    def state(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """(name as in the expert's own files, tensor) of a task's whole network, its head last."""
        names = self.names(task)
        for name, tensor in self.tensors(task):
            own = names.of(name)
            if own is not None:
                yield own, check_finite(tensor, name, str(self.folder))
        head = self.head(task)
        if head is not None:
            yield from ((name, head.read(name)) for name in head.tensors)

    def layout(self, task: str) -> Layout:
        """(shape, dtype) of all that `state` yields, in its order."""
        names, head = self.names(task), self.head(task)
        body = {own: spec for name, spec in self.about.tensors.items() if (own := names.of(name)) is not None}
        return body | {name: (info.shape, info.dtype) for name, info in (head.tensors if head else {}).items()}

    def module(self, task: str) -> nn.Module:
        """A module of `transformers` with the task's weights and head, in float32 and evaluation mode.

        Raises:
            CheckpointError: no such task, or its expert's configuration names no architecture.
        """
        file = self.of_task(task) / CONFIG
        config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        module = filled(empty(config, self.about.models, file), dict(self.state(task)), f"{self.folder}: task '{task}'")
        return self.dress(task, module)

    def dress(self, task: str, module: nn.Module) -> nn.Module:
        """What serves a task, from a module that holds `tensors(task)` and its head. May change the module."""
        return self.kind.dress(self, task, module) if self.kind.dress else module


def load_bundle(folder: str | Path) -> Bundle:
    """Open a bundle. Its weights are read when they are used.

    Arguments:
        folder: what `adarank merge` wrote with a task-aware method, such as `emr`.

    Returns:
        The bundle: its tasks, sizes in bytes, and the tensors or the module of each task.

    Raises:
        CheckpointError: it is no bundle, damaged, incomplete, or of a format or kind that is not known.

    Example:
        bundle = adarank.load_bundle("bundle")
        for name, tensor in bundle.tensors("sentiment"):
            print(name, tuple(tensor.shape))
    """
    return Bundle(folder)


def from_bundle(folder: str | Path, task: str) -> nn.Module:
    """The network of one task of a bundle, with its head, in float32 and evaluation mode.

    Arguments:
        folder: what `adarank merge` wrote with a task-aware method.
        task: one of its tasks.

    Returns:
        A module of `transformers`; for `surgery`, `wemoe` and `twin_merging` with hooks for what they add.

    Raises:
        CheckpointError: no such bundle or task, or a file of it is damaged.

    Example:
        model = adarank.from_bundle("bundle", "sentiment")
        logits = model(input_ids=torch.tensor([[2, 5, 6, 3]])).logits  # (1, classes)
    """
    return load_bundle(folder).module(task)


def extract(folder: str | Path, task: str, out: Path, force: bool = False) -> dict[str, Any]:
    """Write one task of a bundle as an ordinary checkpoint, whose tensors have the names that its expert's have.

    Arguments:
        folder: what `adarank merge` wrote with a task-aware method.
        task: one of its tasks.
        out: the folder to write.
        force: replace `out` if adarank wrote it.

    Returns:
        The record that lies in `out`: bundle, task, kind, settings, versions.

    Raises:
        CheckpointError: no such bundle or task, a damaged file, or a kind whose networks are more than a checkpoint.
        OutputError: `out` exists, or cannot be written.

    Example:
        from pathlib import Path

        adarank.extract("bundle", "sentiment", Path("sentiment-alone"))
    """
    bundle = load_bundle(folder)
    if bundle.kind.dress:
        raise CheckpointError(
            f"{bundle.folder}: networks of '{bundle.about.kind}' are more than their weights. Use adarank.from_bundle."
        )
    layout, files = bundle.layout(task), bundle.side_files(task)
    with atomic_folder(out, force) as target:
        write_checkpoint(target, layout, bundle.state(task))
        for file in files:
            shutil.copyfile(file, target / file.name)
        origin = {
            "bundle": str(folder),
            "task": task,
            "kind": bundle.about.kind,
            "settings": dict(bundle.about.settings),
        }
        record = {"extracted": origin, "versions": versions()}
        write_json(target / RECORD, record)
    return record
