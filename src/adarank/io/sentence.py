"""A sentence encoder's folder, as `sentence-transformers` writes it: a transformer, then modules of their own folders.

modules.json lists them in order, each with its folder (`1_Pooling`, `2_Dense`); the transformer's is the root. Most have a
configuration alone, some have weights too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from adarank.errors import CheckpointError, MismatchError, itemise

MODULES = "modules.json"
ROOT_FILES = (MODULES, "config_sentence_transformers.json", "sentence_bert_config.json")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_SIDE = (".json", ".txt", ".model")

Reader = Callable[[Path, type], Any]


@dataclass(frozen=True)
class Module:
    """A module after the transformer.

    Attributes:
        path: its folder, from the root's.
        kind: the last part of its class's name, such as `Pooling`.
        config: its `config.json`.
        weights: its weights file, if it has one.
        files: what else a copy of it needs.
    """

    path: str
    kind: str
    config: Mapping[str, Any]
    weights: tuple[Path, ...]
    files: tuple[Path, ...]


def modules_of(folder: Path, read: Reader) -> tuple[Module, ...]:
    """The modules after the transformer that a folder's modules.json lists; none if it has no such file.

    Arguments:
        read: (file, dict or list) -> what the JSON file holds.

    Raises:
        CheckpointError: the list is damaged, or names what lies outside of the folder.
    """
    modules = []
    for entry in read(folder / MODULES, list):
        path = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(path, str) or not isinstance(entry.get("type"), str):
            raise CheckpointError(f"{folder / MODULES}: an entry without path or type: {entry!r}. Download it again.")
        kind = entry["type"].rsplit(".", 1)[-1]
        if not path or path == ".":
            continue
        place = PurePosixPath(path)
        if place.is_absolute() or ".." in place.parts or "\\" in path:
            raise CheckpointError(f"{folder / MODULES}: '{path}' is outside of the folder. Correct the file.")
        modules.append(_module(folder, place.as_posix(), kind, read))
    return tuple(modules)


def _module(folder: Path, path: str, kind: str, read: Reader) -> Module:
    place = folder / path
    weights = next(((place / name,) for name in _WEIGHTS if (place / name).exists()), ())
    files = sorted(f for f in place.rglob("*") if f.is_file() and f.suffix in _SIDE) if place.is_dir() else []
    return Module(path, kind, read(place / "config.json", dict), weights, tuple(files))


def check_modules(tables: Mapping[str, tuple[Module, ...]]) -> None:
    """Refuse sentence encoders whose modules differ: in order, folder, class or configuration.

    Arguments:
        tables: label -> modules, of the base and the experts. Those without any say nothing.

    Raises:
        MismatchError: two of them differ; how is said of each.
    """
    listed = {label: modules for label, modules in tables.items() if modules}
    if not listed:
        return
    first, wanted = next(iter(listed.items()))
    problems = [
        f"{label}: {text}" for label, modules in listed.items() for text in _differences(first, wanted, modules)
    ]
    if problems:
        heading = f"{MODULES}: the modules after the transformer differ."
        remedy = (
            "Their vectors are made in different ways, which no merge joins. Give sentence encoders of one structure."
        )
        raise MismatchError(itemise(heading, problems, remedy))


def _differences(first: str, wanted: tuple[Module, ...], modules: tuple[Module, ...]) -> list[str]:
    """How modules differ from those of the first that has some, in words."""
    names, others = ([f"{m.path} ({m.kind})" for m in each] for each in (modules, wanted))
    if names != others:
        return [f"has {', '.join(names)}, and {first} has {', '.join(others)}"]
    differences = []
    for module, other in zip(modules, wanted, strict=True):
        for key in sorted(module.config.keys() | other.config.keys()):
            mine, theirs = module.config.get(key), other.config.get(key)
            both = key in module.config and key in other.config
            if mine != theirs and (both or (key.startswith("pooling_mode_") and (mine or theirs))):
                differences.append(f"{module.path} has {key} {mine!r}, and {first} has {theirs!r}")
    return differences
