"""Where a model lies: a local path, or a hub id with an optional revision, to a local folder.

This file, `cards` and `push` are the only ones that name `huggingface_hub`.
"""

from __future__ import annotations

import errno
import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adarank.errors import AdaRankError, CheckpointError
from adarank.io.hub_files import ANY, used_files


def is_hub_id(reference: str) -> bool:
    """True for `org/name`, `org/name/folder` or either with `@revision`, that is not an existing path."""
    name = reference.split("@", 1)[0]
    if Path(reference).exists() or name.startswith((".", "/", "~")):
        return False
    return name.count("/") >= 1 and all(name.split("/")) and not Path(name).suffix


def local_path(given: str | Path, folder: Path | None = None, kind: type[AdaRankError] = CheckpointError) -> Path:
    """A path as a user gives it, absolute or counted from `folder` (the working directory if there is none).

    Raises:
        AdaRankError (of the kind asked for): no file can have this name, or it cannot be looked at.
    """
    try:
        path = Path(given).expanduser()
        path = path if path.is_absolute() else (folder or Path.cwd()) / path
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # nothing is there: the caller says what was needed
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise kind(f"{path}: is a link that leads back to itself. Give another path.") from None
        raise kind(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from None
    except (ValueError, RuntimeError) as error:  # a NUL, a lone surrogate; `~name` of nobody
        raise kind(f"{str(given)!r}: no path ({error}). Give another.") from None
    return path


def same_model(one: str, other: str | None, folder: Path) -> bool:
    """Whether two references are to one model, however their paths are written. Relative ones count from `folder`.

    What lies under two paths by a link counts as two models.
    """
    if other is None:
        return False
    first, second = (os.path.abspath(folder / Path(reference).expanduser()) for reference in (one, other))
    return first == second


def split_adapter(reference: str, folder: Path | None = None) -> tuple[str, str | None]:
    """A reference `model+adapter` as its two parts; the adapter is None where it is one of a model alone.

    A `+` may be part of a path: the first at which both sides are there, or may be on the hub, is the one that is meant.
    """
    if "+" not in reference or local_path(reference, folder).exists():
        return reference, None
    pairs = [(reference[:place], reference[place + 1 :]) for place, sign in enumerate(reference) if sign == "+"]
    fitting = (pair for pair in pairs if all(is_hub_id(side) or local_path(side, folder).exists() for side in pair))
    return next(fitting, pairs[0])


def called(reference: str, folder: Path) -> str:
    """The last part of a model's path or hub id, or its adapter's, without the revision."""
    model, adapter = split_adapter(reference, folder)
    reference = adapter or model
    name = Path(reference.split("@")[0]).name
    return name if name not in ("", "..") else (folder / reference).resolve().name


def repository(path: Path) -> tuple[str, Path] | None:
    """Of a path in a cache of the hub the repository's id and its folder there; None elsewhere.

    Example:
        repository(Path("models--org--name/snapshots/0a1b/sub")) == ("org/name", Path("models--org--name/snapshots/0a1b"))
    """
    for folder in (path, *path.parents):
        kind, *name = folder.parent.parent.name.split("--")
        if folder.parent.name == "snapshots" and kind == "models" and name:
            return "/".join(name), folder
    return None


def resolve(reference: str, folder: Path | None = None, adapter: bool = False) -> Path:
    """The local path of a checkpoint or an adapter.

    Arguments:
        reference: a path (relative ones count from `folder`), or `org/name[/folder][@revision]` on the hub.
        folder: where relative paths start; the working directory if not given.
        adapter: of what is on the hub, bring the files of an adapter and not those of a model beside it.

    Raises:
        CheckpointError: there is no such path, and it is no hub id or the hub cannot give it.
    """
    path = local_path(reference, folder)
    if path.exists():
        return path
    if not is_hub_id(reference):
        wanted = "the folder of an adapter" if adapter else "a folder, a weights file,"
        what = "adapter" if adapter else "checkpoint"
        raise CheckpointError(f"{path}: no such {what}. Give {wanted} or a hub id 'org/name@revision'.")
    return _download(reference, adapter)


def resolve_without_download(reference: str, folder: Path | None = None, adapter: bool = False) -> Path | None:
    """As `resolve`, but a model that would have to be downloaded is left where it is: None if the hub has it."""
    if not local_path(reference, folder).exists() and "+" not in reference and is_hub_id(reference):
        path, _, revision = reference.partition("@")
        if _listed("/".join(path.split("/")[:2]), revision or None) is not None:
            return None
    return resolve(reference, folder, adapter)


@contextmanager
def offline() -> Iterator[None]:
    """While it is open the hub's client asks nobody: what is read lies in a local folder, whatever its files name."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _download(reference: str, adapter: bool) -> Path:
    from huggingface_hub import snapshot_download  # imported on use: it is slow, and local merges never need it

    path, _, revision = reference.partition("@")
    organisation, repository, *inside = path.split("/")
    name, folder = f"{organisation}/{repository}", "/".join(inside)
    try:
        listed = _listed(name, revision or None)
        files = ANY if listed is None else [glob.escape(file) for file in used_files(listed, folder, adapter)]
        place = Path(snapshot_download(name, revision=revision or None, allow_patterns=files)) / folder
    except Exception as error:  # the hub client's errors share no base class
        raise CheckpointError(
            f"{reference}: not a local path, and the hub did not give it ({type(error).__name__}: {' '.join(str(error).split())[:200]}). "
            "Check the name and revision, log in if it is private, or download it and give the folder."
        ) from error
    if not place.is_dir():
        raise CheckpointError(f"{reference}: {name} on the hub has no folder '{folder}'. Check its name.")
    return place


def _listed(name: str, revision: str | None) -> list[str] | None:
    """The names of a repository's files; None where the hub does not tell them, and its cache is all there is."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return HfApi().list_repo_files(name, revision=revision)
    except Exception:  # the hub client's errors share no base class; the download says what is wrong
        return None


def listed_files(name: str, dataset: bool = False) -> tuple[dict[str, int | None] | None, bool]:
    """A repository's files with their sizes in bytes, and whether they are those that lie in the cache of this machine.

    None where neither the cache nor the hub has them. Nothing is fetched but the list.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="dataset" if dataset else "model")
    if not constants.HF_HUB_OFFLINE:
        try:
            api = HfApi()
            info = api.dataset_info(name, files_metadata=True) if dataset else api.model_info(name, files_metadata=True)
            return {file.rfilename: file.size for file in info.siblings or ()}, folder.is_dir()
        except Exception:  # the hub client's errors share no base class; the cache may have it all the same
            pass
    reference = folder / "refs" / "main"
    snapshot = folder / "snapshots" / (reference.read_text(encoding="utf-8").strip() if reference.is_file() else "")
    files = [file for file in sorted(snapshot.rglob("*")) if file.is_file()] if reference.is_file() else []
    sizes: dict[str, int | None] = {file.relative_to(snapshot).as_posix(): file.stat().st_size for file in files}
    return (sizes, True) if sizes else (None, False)


def configuration_errors() -> tuple[type[Exception], ...]:
    """What the configurations of `transformers` raise of values that they refuse: by version, classes of the hub's client."""
    from huggingface_hub import errors

    strict = getattr(errors, "StrictDataclassError", ValueError)
    return (strict, ValueError, TypeError, LookupError, AttributeError, ImportError, OSError)
