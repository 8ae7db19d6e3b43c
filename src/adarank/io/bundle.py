"""Bundles on disk: one folder that gives each of many tasks a network of its own.

    bundle.json              format, kind, settings, tasks, tensors, sizes, every file's length and SHA-256
    shared.safetensors       what all tasks use
    tasks/NAME/              own.safetensors (what only this task uses), head.safetensors (its head), config.json
                             and other side files of its expert that differ from the base's
    config.json, …           the base's configuration, tokenizer and processor files
    adarank.json             the record

A part is one stored tensor. Its name in shared.safetensors and own.safetensors is `PART:TENSOR`, such as
`mask:encoder.0.weight`, or `PART:` if it belongs to the whole model. The part `whole` is a tensor as it is: a task
whose files have `whole:NAME` uses that for NAME. What other parts mean is the kind's business.

Another kind of bundle is another method (`method/contract.py`) whose result are `Parts`: it says how a task's parts become tensors
(`task_tensors`) and, where the network needs more than tensors (an adapter, a router), a module (`dress`). A kind whose
parts come of one tensor's task vectors at a time is a `TaskAwareMethod` (`methods/task_aware/base.py`), which does both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adarank.errors import CheckpointError, itemise
from adarank.io.checkpoint import DTYPES, NAMES, Checkpoint, MemorySource, Source
from adarank.io.files import file_sha256
from adarank.io.hub import local_path
from adarank.io.parsing import parse_json
from adarank.io.weight_files import leads_out
from adarank.io.writer import BUNDLE, RECORD, Layout, TensorFile, layout_bytes, write_json
from adarank.settings import nearest

FORMAT = "adarank-bundle-1"
SHARED = "shared.safetensors"
OWN = "own.safetensors"
HEAD = "head.safetensors"
WHOLE = "whole"
Piece = tuple[str | None, str, Tensor]
"""(task, or None for what is shared; key; the stored tensor)."""


def key(part: str, name: str = "") -> str:
    """What a part of the tensor `name`, or of the whole model, is called in its file."""
    return f"{part}:{name}"


@dataclass(frozen=True)
class Names:
    """What the tensors of a bundle are called in one expert's own files.

    Attributes:
        prefix: what most of them have in front, such as `bert.`.
        renamed: the others: name -> name there, None if the expert has no such tensor.
    """

    prefix: str
    renamed: Mapping[str, str | None]

    def of(self, name: str) -> str | None:
        """The expert's name of a tensor; None if it has none."""
        return self.renamed.get(name, self.prefix + name)


@dataclass(frozen=True)
class About:
    """What a bundle says of itself.

    Attributes:
        kind: what its parts are: the name of the method that made them.
        settings: the method's settings in force.
        models: what its networks do, such as `image-classification`; None if the recipe did not say.
        tensors: every tensor of a task's network but its head -> (shape, dtype).
        names: task -> what its expert calls them.
    """

    kind: str
    settings: Mapping[str, Any]
    models: str | None
    tensors: Layout
    names: Mapping[str, Names]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(self.names)

    def one_model(self, task: str) -> int:
        """Bytes of one expert's tensors without its head, in the dtypes that the bundle yields."""
        return layout_bytes({n: spec for n, spec in self.tensors.items() if self.names[task].of(n) is not None})

    def plain(self) -> dict[str, Any]:
        """As data for JSON."""
        return {
            "kind": self.kind,
            "settings": dict(self.settings),
            "models": self.models,
            "tasks": {task: {"prefix": n.prefix, "renamed": dict(n.renamed)} for task, n in self.names.items()},
            "tensors": {n: {"shape": list(shape), "dtype": NAMES[dtype]} for n, (shape, dtype) in self.tensors.items()},
        }

    @classmethod
    def parsed(cls, content: Mapping[str, Any]) -> About:
        """What `plain` gave. JSON may hold anything: a `ValueError`, `KeyError`, … if it is not that."""
        _check_types(content)
        names = {task: Names(entry["prefix"], dict(entry["renamed"])) for task, entry in content["tasks"].items()}
        bad = [task for task in names if task in ("", ".", "..") or "/" in task or "\\" in task]
        if bad:
            raise ValueError(f"'{bad[0]}' names no task")
        tensors = {n: (tuple(entry["shape"]), DTYPES[entry["dtype"]]) for n, entry in content["tensors"].items()}
        return cls(content["kind"], dict(content["settings"]), content["models"], tensors, names)


def _check_types(content: Mapping[str, Any]) -> None:
    """Names are text, shapes and sizes are counts; a `ValueError` if not."""
    renamed = [entry["renamed"] for entry in content["tasks"].values()]
    texts = [content["kind"], content["models"] or "", *(entry["prefix"] for entry in content["tasks"].values())]
    texts += [name or "" for names in renamed for name in names.values()]
    sizes, shapes = content["bytes"], [entry["shape"] for entry in content["tensors"].values()]
    counts = [sizes["bundle"], sizes["shared"], sizes["experts"], sizes["one"], *sizes["tasks"].values()]
    counts += [length for shape in shapes for length in shape]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a name that is no text")
    if not all(isinstance(count, int) and 0 <= count < 2**63 for count in counts):
        raise ValueError("a size that is no count")


@dataclass(frozen=True)
class Parts:
    """What a bundle is made of: layouts, and a stream of the parts, so that none need be held.

    Attributes:
        kind: who can read them: the name of the method that made them.
        settings: in force when they were made, as plain data.
        shared, per_task, pieces: as for `write_parts`.
    """

    kind: str
    settings: Mapping[str, Any]
    shared: Layout
    per_task: Mapping[str, Layout]
    pieces: Iterator[Piece]


def task_folder(folder: Path, task: str) -> Path:
    """Where the files of one task are."""
    return folder / "tasks" / task


def write_parts(folder: Path, shared: Layout, per_task: Mapping[str, Layout], pieces: Iterator[Piece]) -> None:
    """Stream parts into their files, one in memory at a time.

    Arguments:
        shared: key -> (shape, dtype) of every part that all tasks use.
        per_task: task -> the same of what only it uses.
        pieces: the parts, in any order between files and in the layout's order within each.

    Raises:
        OutputError: the parts do not follow the layouts.
    """
    with ExitStack() as stack:
        files: dict[str | None, TensorFile] = {None: stack.enter_context(TensorFile(folder / SHARED, shared))}
        for task, layout in per_task.items():
            task_folder(folder, task).mkdir(parents=True, exist_ok=True)
            files[task] = stack.enter_context(TensorFile(task_folder(folder, task) / OWN, layout))
        for owner, name, tensor in pieces:
            files[owner].write(name, tensor)
            del tensor  # the next one is made before this name is bound again


def finish(folder: Path, about: About) -> dict[str, Any]:
    """Write bundle.json over the files that are there; returns the sizes.

    Returns:
        In bytes: `bundle` (all its weights files), `shared`, `tasks` (each one's own files), `experts` (all experts,
        whole, in the dtypes that the bundle yields) and `one` (one network without head).
    """
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f not in (folder / BUNDLE, folder / RECORD))
    weights = {f: f.stat().st_size for f in files if f.suffix == ".safetensors"}
    heads = {t: task_folder(folder, t) / HEAD for t in about.tasks}
    experts = {
        t: about.one_model(t) + (sum(i.nbytes for i in Checkpoint(f).tensors.values()) if f.exists() else 0)
        for t, f in heads.items()
    }
    sizes = {
        "bundle": sum(weights.values()),
        "shared": weights[folder / SHARED],
        "tasks": {t: sum(n for f, n in weights.items() if f.parent == task_folder(folder, t)) for t in about.tasks},
        "experts": sum(experts.values()),
        "one": layout_bytes(about.tensors),
    }
    manifest = {f.relative_to(folder).as_posix(): {"bytes": f.stat().st_size, "sha256": file_sha256(f)} for f in files}
    write_json(folder / BUNDLE, {"format": FORMAT, **about.plain(), "bytes": sizes, "files": manifest})
    return sizes


def is_bundle(path: Path) -> bool:
    """True for a bundle's folder."""
    local_path(path)
    return (path / BUNDLE).is_file()


class PartFile:
    """The parts in one file (or, as a `MemorySource`, in memory), found by the tensor that they belong to."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._index: dict[str, list[str]] = {}
        for stored in source.tensors:
            part, _, name = stored.partition(":")
            self._index.setdefault(name, []).append(part)

    def names(self) -> list[str]:
        """The tensors that have parts here."""
        return [name for name in self._index if name]

    def of(self, name: str = "") -> dict[str, Tensor]:
        """Part -> stored tensor, of one tensor or of the whole model. They may be mapped: never write to them."""
        return {part: self._source.read(key(part, name)) for part in self._index.get(name, ())}


def held_parts(tasks: Iterable[str], pieces: Iterable[Piece]) -> tuple[PartFile, dict[str, PartFile]]:
    """The shared parts and each task's own, held in memory: as large as the bundle."""
    held: dict[str | None, dict[str, Tensor]] = {None: {}, **{task: {} for task in tasks}}
    for owner, name, tensor in pieces:
        held[owner][name] = tensor.cpu()
    of_tasks = {
        task: PartFile(MemorySource(tensors, f"parts of '{task}'"))
        for task, tensors in held.items()
        if task is not None
    }
    return PartFile(MemorySource(held[None], "shared parts")), of_tasks


class BundleFolder:
    """A bundle on disk, by its parts.

    Opening it reads bundle.json and checks that every file is there at its length; a file's SHA-256 is checked when it
    is first read from.

    Attributes:
        about: what it says of itself.
        sizes: as `finish` counted them.

    Raises:
        CheckpointError: it is no bundle, of another format, damaged, or files are missing; all are listed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        local_path(folder)
        content = _content(self.folder)
        try:
            self.about = About.parsed(content)
            self.sizes: dict[str, Any] = dict(content["bytes"])
            self._files = {str(f): (int(entry["bytes"]), str(entry["sha256"])) for f, entry in content["files"].items()}
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.folder / BUNDLE}: damaged ({type(error).__name__}: {error}). Copy the bundle again."
            ) from None
        self._check_lengths()
        self._whole: set[Path] = set()

    def shared(self) -> PartFile:
        """What all tasks use."""
        return PartFile(self._open(self.folder / SHARED))

    def parts_of(self, task: str) -> PartFile:
        """What only this task uses."""
        return PartFile(self._open(self.of_task(task) / OWN))

    def head(self, task: str) -> Checkpoint | None:
        """The tensors of a task's head, under its expert's own names; None if it has no head."""
        path = self.of_task(task) / HEAD
        return self._open(path) if path.exists() else None

    def of_task(self, task: str) -> Path:
        """The folder of a task's files.

        Raises:
            CheckpointError: the bundle has no such task.
        """
        self.names(task)
        return task_folder(self.folder, task)

    def names(self, task: str) -> Names:
        """What a task's expert calls the tensors; a `CheckpointError` if the bundle has no such task."""
        if task not in self.about.names:
            raise CheckpointError(f"{self.folder}: no task '{task}' in this bundle.{nearest(task, self.about.tasks)}")
        return self.about.names[task]

    def side_files(self, task: str) -> list[Path]:
        """Configuration, tokenizer and processor files of a task's network: its own, and the base's where it has none."""
        files: dict[str, Path] = {}
        for place in (self.folder, self.of_task(task)):
            paths = [path for name in self._files if (path := self.folder / name).parent == place]
            files |= {path.name: path for path in paths if path.suffix != ".safetensors"}
        self._check(list(files.values()))
        return list(files.values())

    def module_files(self) -> list[Path]:
        """What the modules of a sentence encoder need beside weights, in folders of their own."""
        files = [self.folder / name for name in self._files if "/" in name and not name.startswith("tasks/")]
        self._check(files)
        return files

    def module_paths(self) -> list[str]:
        """The folders that names of tensors start with, of a sentence encoder's modules."""
        named = dict.fromkeys(name.rpartition("/")[0] for name in self.about.tensors if "/" in name)
        return [path for path in named if (self.folder / path).is_dir()]

    def check(self) -> None:
        """Compare every file with its SHA-256.

        Raises:
            CheckpointError: files are changed; all are listed.
        """
        self._check([self.folder / name for name in self._files])

    def _open(self, path: Path) -> Checkpoint:
        self._check([path])
        return Checkpoint(path)

    def _check(self, paths: list[Path]) -> None:
        problems = [text for path in paths if (text := self._difference(path))]
        if problems:
            raise CheckpointError(_unusable(self.folder, problems))

    def _difference(self, path: Path) -> str | None:
        """How a file differs from the manifest, in words. Each is hashed once."""
        name = path.relative_to(self.folder).as_posix()
        if name not in self._files:
            return f"{path}: not in {BUNDLE}'s list of files"
        if path in self._whole:
            return None
        digest, wanted = file_sha256(path), self._files[name][1]
        if digest != wanted:
            return f"{path}: has SHA-256 {digest[:12]}…, and {wanted[:12]}… was needed"
        self._whole.add(path)
        return None

    def _check_lengths(self) -> None:
        problems = [
            f"{BUNDLE} names {name!r}, which is outside of the folder" for name in self._files if leads_out(name)
        ]
        if problems:
            raise CheckpointError(_unusable(self.folder, problems))
        needed = [SHARED, *(f"tasks/{task}/{OWN}" for task in self.about.tasks)]
        problems += [
            f"{self.folder / name}: not in {BUNDLE}'s list of files" for name in needed if name not in self._files
        ]
        for name, (length, _) in self._files.items():
            path = self.folder / name
            if not path.is_file():
                problems.append(f"{path}: is missing")
            elif path.stat().st_size != length:
                problems.append(f"{path}: has {path.stat().st_size} bytes, and {length} were needed")
        if problems:
            raise CheckpointError(_unusable(self.folder, problems))


def _unusable(folder: Path, problems: list[str]) -> str:
    remedy = "Copy the bundle again, or merge again."
    if len(problems) == 1:
        return f"{problems[0]}. {remedy}"
    return itemise(f"{folder}: {len(problems)} files of the bundle are unusable:", problems, remedy)


def _content(folder: Path) -> dict[str, Any]:
    path = folder / BUNDLE
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: not a bundle (no {BUNDLE}). Give a folder that adarank merge wrote with a task-aware method."
        )
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        version = content["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error}). Copy the bundle again.") from None
    if version != FORMAT:
        raise CheckpointError(
            f"{path}: a bundle of format {version!r}, and this adarank reads {FORMAT!r}. Read it with the version that wrote it."
        )
    return dict(content)
