"""An output to the hub: in one commit, checked against its record before, and never over what it does not know."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adarank.errors import AdaRankError, OutputError, itemise
from adarank.io.cards import CARD
from adarank.io.hub import local_path
from adarank.io.lock import hold
from adarank.io.output_folder import RECORD, differences, read_list, record_problems

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

_OF_THE_HUB = ".gitattributes"  # which the hub itself makes


def push(
    out: str | Path, name: str, private: bool = False, force: bool = False, dry_run: bool = False
) -> dict[str, Any]:
    """Upload an output to a repository on the hub, in one commit: it is there whole or not at all.

    What was uploaded before an interruption is not uploaded again. Who may write is said by the hub's login
    (`hf auth login`) or HF_TOKEN; HF_ENDPOINT names another hub.

    Arguments:
        out: a folder that `merge` or `extract` wrote. Its card (README.md) may have been edited since.
        name: `org/name`; made if it is not there.
        private: make it private; a public one is refused.
        force: replace what is there, if it is of another output. The repository's history keeps it.
        dry_run: check the folder and list what would be uploaded, without any connection.

    Returns:
        `name`, `url`, `private`, `files` (name -> bytes), `bytes`, `notes`, and `commit`, None in a dry run.

    Raises:
        OutputError: the folder is not as its record says, the repository holds something else, or the hub refuses.

    Example:
        adarank.push("merged", "org/name", private=True)
    """
    folder = local_path(out, kind=OutputError)
    _check_name(name)
    if not folder.is_dir():
        raise OutputError(f"{out}: no such folder. Give what merge or extract wrote.")
    with hold(folder):
        files, notes = _checked(folder)
        made: dict[str, Any] = {"name": name, "private": private, "files": files, "bytes": sum(files.values()), "notes": notes}  # fmt: skip
        if dry_run:
            return {**made, "url": None, "commit": None}
        with _refusals(name):
            return {**made, **_uploaded(folder, name, private, force, files, notes)}


def _check_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is there, and not in their list

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise OutputError(f"{name!r}: no name of a repository ({error}). Give org/name.") from None
    if name.count("/") != 1:
        raise OutputError(f"{name!r}: org/name is needed, with whose repository it is.")


def _checked(folder: Path) -> tuple[dict[str, int], list[str]]:
    """File -> bytes of all that is uploaded, and what is to be said of it."""
    if not (folder / RECORD).is_file():
        raise OutputError(
            f"{folder}: no {RECORD}, which adarank writes last, so this is no whole output. Give what merge or extract wrote."
        )
    problems, listed = record_problems(folder), read_list(folder / RECORD)
    if listed is None:
        raise OutputError(
            f"{folder}: its {RECORD} lists no files (it is damaged, or an older version wrote it). Merge again."
        )
    changed = differences(folder, listed, whole=True)
    edited = [text for text in changed if text == f"{CARD}: is not as adarank wrote it"]
    problems += [text for text in changed if text not in edited]
    if problems:
        remedy = "Move what was added elsewhere, copy the output again, or merge again."
        raise OutputError(itemise(f"{folder}: is not as its record says, so it is not uploaded:", problems, remedy))
    files = {file: (folder / file).stat().st_size for file in sorted([RECORD, *listed])}
    return files, [f"{CARD} was edited since the merge, and goes along as it is."] if edited else []


def _uploaded(
    folder: Path, name: str, private: bool, force: bool, files: Mapping[str, int], notes: list[str]
) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    there = _there(api, name)
    others: list[str] = []
    if there is None:
        api.create_repo(name, private=private)
    else:
        others = _replaced(there, folder, name, private, force, files)
        notes += [f"Removed from the repository, whose history keeps them: {', '.join(others)}."] if others else []
    commit = api.create_commit(
        name,
        [
            *(CommitOperationAdd(file, folder / file) for file in files),
            *(CommitOperationDelete(file) for file in others),
        ],
        commit_message="Output of adarank",
        parent_commit=there.sha if there else None,
    )
    return {"url": f"{api.endpoint}/{name}", "commit": commit.oid}


def _there(api: HfApi, name: str) -> ModelInfo | None:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(name, files_metadata=True)
    except RepositoryNotFoundError:
        return None


def _replaced(
    there: ModelInfo, folder: Path, name: str, private: bool, force: bool, files: Mapping[str, int]
) -> list[str]:
    """Which files of a repository go, as an output takes their place. None where it holds this very output, or nothing.

    Raises:
        OutputError: it is public, or it holds something else and that is not to be replaced.
    """
    if private and not there.private:
        raise OutputError(f"{name}: is there and public. Make it private on the hub, or give another name.")
    stored = {file.rfilename: file.blob_id for file in there.siblings or () if file.rfilename != _OF_THE_HUB}
    if not stored or stored.get(RECORD) == _git_id((folder / RECORD).read_bytes()):
        return []
    if not force:
        raise OutputError(
            f"{name}: holds {len(stored)} files, and not this output. Give another name, or --force to replace them."
        )
    return [file for file in stored if file not in files]


def _git_id(content: bytes) -> str:
    """What git calls a file with this content (its object id)."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """What the hub or the way to it says, as a sentence."""
    try:
        yield
    except AdaRankError:
        raise
    except Exception as error:  # the hub client's errors share no base class
        raise OutputError(
            f"{name}: the hub did not take it ({type(error).__name__}: {' '.join(str(error).split())[:300]}). Nothing of it can be seen "
            "there yet. Log in (hf auth login, or HF_TOKEN) with a token that may write, and do the same again: it goes on from there."
        ) from error
