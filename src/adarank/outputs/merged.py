"""A merged output: one body, and for each task its head and its configuration, where it has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adarank.errors import CheckpointError
from adarank.io.bundle import HEAD, SHARED, is_bundle, task_folder
from adarank.io.checkpoint import Checkpoint
from adarank.io.files import open_safetensors, read_json
from adarank.io.hub import local_path
from adarank.io.sentence import Module
from adarank.io.side_files import side_files
from adarank.io.writer import BUNDLE, RECORD, Layout
from adarank.models import FAMILIES
from adarank.outputs.bundle import Bundle
from adarank.outputs.network import empty, filled, used_names
from adarank.outputs.write import CONFIG
from adarank.settings import nearest


class Merged:
    """An output of one body on disk, which yields a network for each of its tasks.

    Arguments:
        folder: what `adarank merge` wrote, no bundle.

    Attributes:
        tasks: those that have a head; of models without heads, such as those that generate text, all that were merged.
        models: what the networks do, such as `image-classification`; None if the record does not say.
        origin: what a record says of where a task of it came from.

    Raises:
        CheckpointError: no such folder, or a bundle.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        local_path(self.folder)
        if (self.folder / BUNDLE).exists():
            raise CheckpointError(
                f"{self.folder}: a bundle, with weights for each task. Use adarank.load_task or adarank.load_bundle."
            )
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no such folder. Give what `adarank merge` wrote.")
        record = read_json(self.folder / RECORD)
        plan, extracted, settings = (
            block if isinstance(block := record.get(key), dict) else {} for key in ("plan", "extracted", "settings")
        )
        models = plan.get("kind") or extracted.get("models")
        self.models = str(models) if models else None
        heads = self.folder / "heads"
        with_heads = sorted(p.name for p in heads.iterdir()) if heads.is_dir() else []
        family = FAMILIES.get(self.models or "")
        self._headless = not with_heads and family is not None and (family.headless or family.generates)
        merged = plan.get("tasks") or [extracted.get("task")]
        self.tasks = tuple(map(str, merged)) if self._headless else tuple(with_heads)
        self.origin = {"method": plan.get("merge_method"), "settings": settings.get("parameters", {})}

    def config(self, task: str) -> Mapping[str, Any]:
        """The `config.json` of a task's expert; a `CheckpointError` if there is no such task."""
        place = self._of_task(task)
        config: dict[str, Any] = read_json((self.folder if self._headless else place) / CONFIG)
        return config

    def body(self) -> Checkpoint:
        """The merged weights."""
        return Checkpoint(self.folder)

    def head_file(self, task: str) -> Path:
        """The file of a task's head; there may be none."""
        return self._of_task(task) / HEAD

    def module(self, task: str) -> nn.Module:
        """A module of `transformers` with the merged body and the task's head, in float32 and evaluation mode.

        Raises:
            CheckpointError: no such task, or its tensors do not fit its architecture.
        """
        module, body = self._empty(task), self.body()
        head, backbone = self._head(task)
        names = _names(body, module, backbone)
        state = {names[name]: body.read(name) for name in body.tensors}
        return filled(module, {**state, **head}, f"{self.folder}: task '{task}'")

    def checkpoint(self, task: str) -> tuple[Layout, Iterator[tuple[str, Tensor]], list[str]]:
        """A task's whole network as its own files would hold it.

        Returns:
            (shape, dtype) of its tensors; the tensors in that order, one in memory at a time, the head last; and the
            body's tensors that its architecture has no place for, such as a pooler; not a base's head, where the task's takes its place.

        Raises:
            CheckpointError: no such task, or its tensors do not fit its architecture.
        """
        if self._headless:
            self._of_task(task)
            return self.layout_in_base(), self.tensors(task), []
        module, body = self._empty(task), self.body()
        head, backbone = self._head(task)
        names = _names(body, module, backbone)
        specs = {names[name]: (info.shape, info.dtype) for name, info in body.tensors.items()}
        specs |= {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in head.items()}
        used = used_names(module, {name: spec[0] for name, spec in specs.items()}, f"{self.folder}: task '{task}'")
        in_file = {name: stored for name, stored in names.items() if stored in used and stored not in head}
        layout = {stored: specs[stored] for stored in (*in_file.values(), *head)}
        tensors = chain(((stored, body.read(name)) for name, stored in in_file.items()), head.items())
        return layout, tensors, [name for name in names if name not in in_file and names[name] not in head]

    def layout_in_base(self) -> Layout:
        """(shape, dtype) of all that `tensors` yields, in its order."""
        return {name: (info.shape, info.dtype) for name, info in self.body().tensors.items()}

    def tensors(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """(name in the base, tensor) of the body, the same for every task."""
        body = self.body()
        return ((name, body.read(name)) for name in body.tensors)

    def side_files(self, task: str) -> list[Path]:
        """Configuration, tokenizer and processor files of a task's network: its own, and the base's where it has none."""
        places = [place for place in (self.folder, self._of_task(task)) if place.is_dir()]
        files = {file.name: file for place in places for file in side_files(place)}
        return list(files.values())

    def module_paths(self) -> list[str]:
        """Folders of their own that tensors of a sentence encoder's modules lie in; a classifier has none."""
        return [module.path for module in self._modules()]

    def module_files(self) -> list[Path]:
        """What a sentence encoder's modules need beside weights; a classifier has none."""
        return [file for module in self._modules() for file in module.files]

    def _modules(self) -> Sequence[Module]:
        return self.body().modules if self._headless else ()

    def _of_task(self, task: str) -> Path:
        if task not in self.tasks:
            known = (
                nearest(task, self.tasks) if self.tasks else " It has no heads: the folder is an ordinary checkpoint."
            )
            raise CheckpointError(f"{self.folder}: no {'' if self._headless else 'head of '}task '{task}'.{known}")
        return task_folder(self.folder, task) if self._headless else self.folder / "heads" / task

    def _empty(self, task: str) -> nn.Module:
        return empty(self.config(task), self.models, self.folder, len(self.body().tensors))

    def _head(self, task: str) -> tuple[dict[str, Tensor], str]:
        """A task's head under its expert's names, and what these start with inside the body."""
        if self._headless:
            return {}, ""
        with open_safetensors(self.head_file(task)) as handle:
            head = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no iterator)
            return head, (handle.metadata() or {}).get("backbone", "")


def _names(body: Checkpoint, module: nn.Module, backbone: str) -> dict[str, str]:
    """Tensor of the body -> its name in a file of the task's own."""
    wanted = set(module.state_dict())

    def named(name: str) -> str:
        inside = name if backbone + name in body.tensors else backbone + name  # a name is one tensor's
        inner = name.partition(".")[2]  # where the base's names begin with a wrapper's (`model.visual.proj`)
        return next((each for each in (name, inside, inner) if each in wanted), inside)

    return {name: named(name) for name in body.tensors}


def load_task(out: str | Path, task: str) -> nn.Module:
    """The network of one task of an output, with the task's head, in evaluation mode.

    To deploy it alone, write it with `adarank.extract`.

    Arguments:
        out: a folder written by `adarank merge`: one body with a head for each task, or a bundle.
        task: one of its tasks.

    Returns:
        A module of `transformers` with the task's weights and head, in float32; for `surgery`, `wemoe` and
        `twin_merging` with hooks for what they add. Of a sentence encoder it is the transformer alone; `adarank.extract` writes
        its other modules too.

    Raises:
        CheckpointError: no such output or task, or its tensors do not fit the task's architecture.

    Example:
        model = adarank.load_task("merged", "sentiment")
        logits = model(input_ids=torch.tensor([[2, 5, 6, 3]])).logits  # (1, classes)
    """
    return open_output(out).module(task)


def open_output(folder: str | Path) -> Bundle | Merged:
    """What `adarank merge` wrote, of either form.

    Raises:
        CheckpointError: no such folder, or a damaged bundle.
    """
    parted = (
        is_bundle(Path(folder)) or (Path(folder) / SHARED).is_file()
    )  # one without its list of files says so itself
    return Bundle(folder) if parted else Merged(folder)
