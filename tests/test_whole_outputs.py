"""An output appears whole or not at all, and what stands in its place is kept until then."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adarank.errors import CheckpointError, OutputError
from adarank.io.writer import RECORD, atomic_folder, check_output, write_checkpoint, write_record
from make import fill_disk, state
from test_checkpoint_contract import write


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def fill(folder: Path, error: BaseException | None = None) -> None:
    (folder / "model.safetensors").write_text("new")
    (folder / RECORD).write_text("{}")
    if error:
        raise error


def test_a_finished_folder_appears_alone(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "deep" / "out") as folder:
        fill(folder)
        assert not (tmp_path / "deep" / "out").exists()
    assert names(tmp_path / "deep") == {"out"}
    assert names(tmp_path / "deep" / "out") == {"model.safetensors", RECORD}


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(1), CheckpointError("x")])
def test_a_failed_folder_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), atomic_folder(tmp_path / "out") as folder:
        fill(folder, error)
    assert names(tmp_path) == set()


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk(monkeypatch, 1000)  # behind the header
    with pytest.raises(OutputError, match="disk is full"), atomic_folder(tmp_path / "out") as folder:
        write(folder, state(0))
    assert names(tmp_path) == set()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_disk_that_cannot_be_written_is_a_sentence(tmp_path: Path, number: int) -> None:
    with pytest.raises(OutputError, match="cannot be written"), atomic_folder(tmp_path / "out") as folder:
        fill(folder, OSError(number, "no"))
    assert names(tmp_path) == set()


def existing(folder: Path, record: bool) -> Path:
    folder.mkdir()
    (folder / "mine.txt").write_text("precious")
    if record:
        write_record(folder, {"versions": {}})
    return folder


@pytest.mark.parametrize(("record", "force"), [(True, False), (False, False), (False, True)])
def test_an_existing_folder_is_refused_untouched(tmp_path: Path, record: bool, force: bool) -> None:
    out = existing(tmp_path / "out", record)
    with pytest.raises(OutputError, match="out"), atomic_folder(out, force) as folder:
        fill(folder)
    assert (out / "mine.txt").read_text() == "precious"
    assert names(tmp_path) == {"out"}


def test_force_replaces_an_output_of_adarank(tmp_path: Path) -> None:
    out = existing(tmp_path / "out", record=True)
    with atomic_folder(out, force=True) as folder:
        fill(folder)
    assert names(out) == {"model.safetensors", RECORD}
    assert names(tmp_path) == {"out"}


def test_a_failed_replacement_keeps_the_old_output(tmp_path: Path) -> None:
    out = existing(tmp_path / "out", record=True)
    with pytest.raises(RuntimeError), atomic_folder(out, force=True) as folder:
        fill(folder, RuntimeError("x"))
    assert (out / "mine.txt").exists()
    assert names(tmp_path) == {"out"}


def test_a_failed_last_rename_keeps_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = existing(tmp_path / "out", record=True)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(errno.EIO, "I/O error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr("sys.platform", "other")  # where folders are not exchanged in one step
    with pytest.raises(OutputError, match="I/O"), atomic_folder(out, force=True) as folder:
        fill(folder)
    assert (out / "mine.txt").exists()


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        fill(folder)
    assert names(tmp_path / "out") == {"model.safetensors", RECORD}


def test_a_file_is_never_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / "out", force=True)
    assert (tmp_path / "out").read_text() == "precious"


def test_an_output_inside_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OutputError), atomic_folder(tmp_path / "file" / "out") as folder:
        fill(folder)


def test_a_failure_while_tensors_stream_leaves_nothing(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.ones(2)
        raise CheckpointError("b is damaged")

    with pytest.raises(CheckpointError), atomic_folder(tmp_path / "out") as folder:
        write_checkpoint(folder, dict.fromkeys("ab", ((2,), torch.float32)), tensors())
    assert names(tmp_path) == set()
