"""Bundles in use: the whole state of one task, tensor by tensor; a working module; an ordinary checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adarank.errors import CheckpointError
from adarank.io.bundle import BundleFolder
from adarank.io.checkpoint import check_finite
from adarank.io.files import read_json
from adarank.io.lock import resolved
from adarank.io.output_folder import check_outside
from adarank.io.record import versions
from adarank.io.writer import BUNDLE, Layout, atomic_folder, write_folders, write_record
from adarank.outputs.merged import empty, filled
from adarank.outputs.write import CONFIG
from adarank.recipe.registry import METHODS
from adarank.settings import nearest


class Bundle(BundleFolder):
    """A bundle on disk, which yields a network for each of its tasks.

    Arguments:
        folder: what `adarank merge` wrote with a task-aware method.

    Attributes:
        about: kind, settings, tasks, tensors.
        kind: the method that wrote it.
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
        if self.about.kind not in METHODS or not METHODS[self.about.kind].in_use:
            raise CheckpointError(
                f"{self.folder / BUNDLE}: a bundle of kind '{self.about.kind}', which this adarank does not know."
                f"{nearest(self.about.kind, METHODS)} Read it with the version that wrote it."
            )
        self.kind = METHODS[self.about.kind]

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
        return self.kind.task_tensors(self.about.tensors, self.shared(), self.parts_of(task))

    def state(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """(name as in the expert's files, tensor) of a task's whole network, its head last."""
        names = self.names(task)
        for name, tensor in self.tensors(task):
            in_expert = names.of(name)
            if in_expert is not None:
                yield in_expert, check_finite(tensor, name, str(self.folder))
        head = self.head(task)
        if head is not None:
            yield from ((name, head.read(name)) for name in head.tensors)

    def layout(self, task: str) -> Layout:
        """(shape, dtype) of all that `state` yields, in its order."""
        names, head = self.names(task), self.head(task)
        body = {
            in_expert: spec for name, spec in self.about.tensors.items() if (in_expert := names.of(name)) is not None
        }
        return body | {name: (info.shape, info.dtype) for name, info in (head.tensors if head else {}).items()}

    def module(self, task: str) -> nn.Module:
        """A module of `transformers` with the task's weights and head, in float32 and evaluation mode.

        Raises:
            CheckpointError: no such task, or its expert's configuration names no architecture.
        """
        file = self.of_task(task) / CONFIG
        module = filled(
            empty(read_json(file), self.about.models, file), dict(self.state(task)), f"{self.folder}: task '{task}'"
        )
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
    check_outside(resolved(out), [bundle.folder])
    with atomic_folder(out, force) as target:
        write_folders(target, layout, bundle.state(task), bundle.module_paths())
        for file in files:
            shutil.copy(file, target / file.name)  # with its permissions
        for file in bundle.module_files():
            place = target / file.relative_to(bundle.folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
        origin = {
            "bundle": bundle.folder.resolve().name,
            "task": task,
            "kind": bundle.about.kind,
            "settings": dict(bundle.about.settings),
        }
        record = {"extracted": origin, "versions": versions()}
        write_record(target, record)
    return record
