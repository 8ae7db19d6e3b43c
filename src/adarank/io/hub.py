"""Where a model lies: a local path, or a hub id with an optional revision, to a local folder.

The only file that names `huggingface_hub`.
"""

from __future__ import annotations

from pathlib import Path

from adarank.errors import CheckpointError

# What a merge can use: weights, configuration, tokenizer and processor files. Never code.
PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.bin", "*.bin.index.json"]


def is_hub_id(reference: str) -> bool:
    """True for `org/name` or `org/name@revision` that is not an existing path."""
    name = reference.split("@", 1)[0]
    if Path(reference).exists() or name.startswith((".", "/", "~")):
        return False
    return name.count("/") == 1 and all(name.split("/")) and not Path(name).suffix


def resolve(reference: str, folder: Path | None = None) -> Path:
    """The local path of a checkpoint.

    Arguments:
        reference: a path (relative ones count from `folder`), or `org/name[@revision]` on the hub.
        folder: where relative paths start; the working directory if not given.

    Raises:
        CheckpointError: there is no such path, and it is no hub id or the hub cannot give it.
    """
    path = Path(reference).expanduser()
    if not path.is_absolute():
        path = (folder or Path.cwd()) / path
    if path.exists():
        return path
    if not is_hub_id(reference):
        raise CheckpointError(
            f"{path}: no such checkpoint. Give a folder, a weights file, or a hub id 'org/name@revision'."
        )
    return _download(reference)


def _download(reference: str) -> Path:
    from huggingface_hub import snapshot_download  # imported on use: it is slow, and local merges never need it

    name, _, revision = reference.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=PATTERNS))
    except Exception as error:  # the hub client's errors share no base class
        raise CheckpointError(
            f"{reference}: not a local path, and the hub did not give it ({type(error).__name__}: {error}). "
            "Check the name and revision, log in if it is private, or download it and give the folder."
        ) from error
