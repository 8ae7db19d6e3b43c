"""Which files of a model's folder go along with its weights: those that a loadable copy needs, and no others."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from adarank.errors import CheckpointError, itemise

# Of tokenizers and what they make of chats.
_TOKENIZER = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*vocab*.json",
    "*vocab*.txt",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "normalizer.json",
    "bpe.codes",
    "dict.txt",
    "*.jinja",
    "chat_template.json",
)
# Of models, tokenizers and processors of `transformers`. Neither code, nor what trainers and trackers leave there.
PATTERNS = (
    "config.json",
    "generation_config.json",
    *_TOKENIZER,
    # image, audio and video processors
    "preprocessor_config.json",
    "*processor_config.json",
    "open_clip_config.json",
    # sentence encoders, but for the folders that modules.json names
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
)


def side_files(folder: Path) -> list[Path]:
    """Configuration, tokenizer, processor and template files that lie in `folder`, in the order of their names.

    Raises:
        CheckpointError: one is a link to a file outside of the folder (of the repository, in a cache of the hub); all
            are named. What lies elsewhere is not part of the model, and would be published with the merge.
    """
    needed = [f for f in sorted(folder.iterdir()) if f.is_file() and any(fnmatchcase(f.name, p) for p in PATTERNS)]
    root = _root(folder.resolve())
    foreign = [f"{f}: leads to {f.resolve()}" for f in needed if not f.resolve().is_relative_to(root)]
    if foreign:
        raise CheckpointError(
            itemise(f"{folder}: links out of a model's folder are not followed.", foreign, "Copy these files there.")
        )
    return needed


def tokenizer_files(files: Iterable[Path]) -> list[Path]:
    """Those of some files that belong to a tokenizer, chat templates among them."""
    return [file for file in files if any(fnmatchcase(file.name, pattern) for pattern in _TOKENIZER)]


def _root(folder: Path) -> Path:
    """The folder within which links of a model's folder may lead: its own; in a cache of the hub, its repository's.

    There `models--ORG--NAME/snapshots/REVISION` holds links into `models--ORG--NAME/blobs`.
    """
    for parent in (folder, *folder.parents):
        if parent.parent.name == "snapshots" and (parent.parent.parent / "blobs").is_dir():
            return parent.parent.parent.resolve()
    return folder
