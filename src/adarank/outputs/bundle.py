"""Bundles in use: the whole state of one task, tensor by tensor, and a working module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adarank.errors import CheckpointError
from adarank.io.bundle import HEAD, BundleFolder
from adarank.io.checkpoint import check_finite
from adarank.io.files import read_json
from adarank.io.writer import BUNDLE, Layout
from adarank.outputs.network import empty, filled
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
            kinds = [name for name in METHODS if METHODS[name].in_use]
            raise CheckpointError(
                f"{self.folder / BUNDLE}: a bundle of kind '{self.about.kind}', which this adarank does not know."
                f"{nearest(self.about.kind, kinds)} Read it with the version that wrote it."
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

    def checkpoint(self, task: str) -> tuple[Layout, Iterator[tuple[str, Tensor]], list[str]]:
        """A task's whole network as its expert's files would hold it: `layout`, `state`, and nothing that is left out.

        Raises:
            CheckpointError: no such task, or its network is more than weights.
        """
        if self.kind.dress:
            raise CheckpointError(
                f"{self.folder}: networks of '{self.about.kind}' are more than their weights, so no ordinary folder holds one. Use adarank.load_task('{self.folder}', '{task}') in Python."
            )
        return self.layout(task), self.state(task), []

    def layout_in_base(self) -> Layout:
        """(shape, dtype) of all that `tensors` yields, in its order."""
        return self.about.tensors

    def head_file(self, task: str) -> Path:
        """The file of a task's head, checked as files are that are read from."""
        self.head(task)
        return self.of_task(task) / HEAD

    def config(self, task: str) -> Mapping[str, Any]:
        """The `config.json` of a task's expert."""
        config: dict[str, Any] = read_json(self.of_task(task) / CONFIG)
        return config

    @property
    def models(self) -> str | None:
        """What the networks do, such as `image-classification`; None if the recipe did not say."""
        return self.about.models

    @property
    def origin(self) -> dict[str, Any]:
        """What a record says of where a task of it came from."""
        return {"method": self.about.kind, "settings": dict(self.about.settings)}

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
