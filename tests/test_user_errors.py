"""What a user may give by mistake, and what a system may refuse: a sentence, exit code 1, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import adarank
from adarank.adapt.live_weights import LiveWeights
from adarank.cli.main import main
from adarank.errors import CheckpointError, DataError, OutputError, RecipeError
from adarank.io.parsing import parse_yaml
from make import near, save, save_bin, state
from text_zoo import ADAPT, make_zoo, recipe

LONG = "x" * 300
Told = pytest.CaptureFixture[str]


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: base, two experts, a recipe."""
    base = state(0)
    for number, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, base if name == "base" else near(base, number))
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_recipe(folder: Path, name: str = "r.yaml", **changes: Any) -> Path:
    values = {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}],
              "parameters": {"lambda": 0.3}, "device": "cpu", **changes}  # fmt: skip
    (folder / name).write_text(yaml.safe_dump(values))
    return folder / name


def refused(told: Told, *command: str) -> str:
    """What a command that ends by exit code 1 says: no traceback, one sentence or a list."""
    before = sorted(os.listdir("."))
    assert main(list(command)) == 1
    text = told.readouterr().err
    assert "Traceback" not in text
    assert "adarank: " in text
    assert sorted(os.listdir(".")) == before
    return text


@pytest.mark.parametrize(
    ("out", "text"),
    [
        (".", "an output takes its folder's place"),
        ("..", "an output takes its folder's place"),
        ("/", "an output takes its folder's place"),
        ("a\0b", r"no path \(embedded null byte\)"),
        ("\ud800", r"no path \(.*surrogates"),
        (LONG, "File name too long"),
        ("x" * 250, "a name of 250 bytes"),
        ("r.yaml", "is a file"),
        ("r.yaml/out", "is no folder"),
        ("/dev/null", "is a file"),
    ],
)
def test_an_impossible_output_is_refused_before_any_work(
    plain: Path, out: str, text: str, capsys: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr("adarank.io.checkpoint.Checkpoint.read", work)
    told = refused(capsys, "merge", "r.yaml", out)
    assert re.search(text, told), told


def test_a_mount_point_is_refused(plain: Path, capsys: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    (plain / "mounted").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mounted")
    assert "mount points stay where they are" in refused(capsys, "merge", "r.yaml", "mounted")


@pytest.mark.parametrize("given", ["a\0b", "\ud800", LONG, "nowhere", ".", "~nobody-of-this-name/x"])
@pytest.mark.parametrize(
    "command",
    [
        ("plan", "{}"),
        ("merge", "{}", "out"),
        ("inspect", "{}"),
        ("inspect", "a", "--base", "{}"),
        ("extract", "{}", "out", "--task", "a"),
        ("search", "{}", "best.yaml", "--over", "lambda=1,2"),
    ],
)
def test_paths_that_hold_nothing_are_told_in_a_sentence(
    plain: Path, given: str, command: tuple[str, ...], capsys: Told
) -> None:
    refused(capsys, *(part.format(given) for part in command))


@pytest.mark.parametrize("best", ["a\0b", LONG, ".", "a"])
def test_a_best_recipe_that_can_be_no_file_is_refused(plain: Path, best: str, capsys: Told) -> None:
    refused(capsys, "search", "r.yaml", best, "--over", "lambda=1,2")


@pytest.mark.parametrize("given", ["a\0b", "\ud800", LONG, "r.yaml", "/dev/zero", "empty"])
def test_unreadable_checkpoints_and_data_are_named(
    tmp_path: Path, given: str, capsys: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = make_zoo(tmp_path)
    monkeypatch.chdir(zoo)
    (zoo / "empty").mkdir()
    recipe(zoo, "r.yaml", models=[{"model": given}])
    assert main(["plan", "r.yaml"]) == 1
    recipe(zoo, "r.yaml", models=[{"model": "models/mood", "task": {"name": "mood", "data": given}}], **ADAPT)
    assert main(["plan", "r.yaml"]) == 1
    recipe(zoo, "r.yaml", merge_method="masked", parameters={"masks": given})
    assert main(["plan", "r.yaml"]) == 1
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert told.count("adarank: ") == 3


@pytest.mark.parametrize("count", ["-1", "0", "99999999999999999999"])
def test_threads_that_no_machine_has_are_refused(count: str, capsys: Told) -> None:
    assert main(["methods", "--threads", count]) == 1
    assert f"--threads {count}: a number from 1 to" in capsys.readouterr().err


BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 8)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
TAGS = {
    "b: !!bool maybe": "does not fit its tag",
    "b: !!int x": "invalid literal",
    "b: !!timestamp x": "does not fit its tag",
    "b: !!python/object/apply:os.system ['touch ran']": "could not determine a constructor",
    "b: !!binary aGVsbG8=": "read as bytes",
    "b: !!set {x, y}": "read as set",
    "b: 2001-12-14": "read as date",
    "b: !!omap [x: 1]": "read as tuple",
    "b: &b [*b]": "stands inside what it names",
    "b: *nowhere": "undefined alias",
    "b: " + "[" * 1500: "nested too deeply",
    BOMB: "stand for more than",
    "b: \x00": "not readable YAML",
}


@pytest.mark.parametrize("text", TAGS, ids=[text[:20].strip() for text in TAGS])
def test_yaml_that_holds_no_plain_settings_is_refused(plain: Path, text: str, capsys: Told) -> None:
    (plain / "r.yaml").write_text((plain / "r.yaml").read_text() + text + "\n")
    assert TAGS[text] in refused(capsys, "merge", "r.yaml", "out")
    assert not (plain / "ran").exists()


def test_aliases_that_repeat_a_little_are_taken() -> None:
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


def damage_nothing(file: Path) -> None:
    file.write_bytes(b"")


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def make_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)  # nobody will ever write to it


def link_to_itself(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


@pytest.mark.parametrize("spoil", [damage_nothing, make_folder, make_pipe, link_to_itself])
@pytest.mark.parametrize("name", ["a/model.safetensors", "a/pytorch_model.bin", "a/config.json", "r.yaml"])
def test_what_is_no_whole_file_is_told_in_a_sentence(
    plain: Path, spoil: Callable[[Path], None], name: str, capsys: Told
) -> None:
    (plain / "a" / "config.json").write_text("{}")
    if name.endswith(".bin"):
        save_bin(plain / "a", load_file(plain / "a" / "model.safetensors"))
        (plain / "a" / "model.safetensors").unlink()
    spoil(plain / name)
    told = refused(capsys, "merge", "r.yaml", "out")
    assert name.rpartition("/")[2] in told


@pytest.mark.parametrize("spoil", [damage_nothing, make_folder, make_pipe, link_to_itself])
def test_data_that_is_no_whole_file_is_told_in_a_sentence(
    tmp_path: Path, spoil: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, capsys: Told
) -> None:
    zoo = make_zoo(tmp_path)
    monkeypatch.chdir(zoo)
    recipe(zoo, **ADAPT)
    spoil(zoo / "data" / "mood.tsv")
    assert "mood.tsv" in refused(capsys, "merge", "recipe.yaml", "out")


def denied(name: str, number: int) -> Callable[..., Any]:
    """`Path.open` of a system that refuses one file."""
    real = Path.open

    def opened(self: Path, *given: Any, **named: Any) -> Any:
        if self.name == name:
            raise OSError(number, os.strerror(number), str(self))
        return real(self, *given, **named)

    return opened


FAILURES = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EPERM, errno.EACCES, errno.EROFS, errno.EIO]


@pytest.mark.parametrize("number", FAILURES, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["model.safetensors", "adarank.json"])
def test_a_disk_that_refuses_leaves_nothing_behind(
    plain: Path, number: int, name: str, capsys: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = open

    def opened(file: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
        if "w" in mode and name in str(file):
            raise OSError(number, os.strerror(number), str(file))
        return real(file, mode, *given, **named)

    monkeypatch.setattr("io.open", opened)
    told = refused(capsys, "merge", "r.yaml", "out")
    assert "out" in told
    assert not list(plain.glob(".out*"))


@pytest.mark.parametrize("name", ["config.json", "r.yaml"])
def test_a_file_that_may_not_be_read_is_named(
    plain: Path, name: str, capsys: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plain / "a" / "config.json").write_text("{}")
    monkeypatch.setattr(Path, "open", denied(name, errno.EACCES))
    assert name in refused(capsys, "merge", "r.yaml", "out")


def test_a_folder_that_may_not_be_read_is_named(plain: Path, capsys: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.iterdir

    def listed(self: Path) -> Any:
        if self.name == "a":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return real(self)

    (plain / "a" / "model.safetensors").rename(plain / "a" / "other.safetensors")
    monkeypatch.setattr(Path, "iterdir", listed)
    assert "a: cannot be read (Permission denied)" in refused(capsys, "merge", "r.yaml", "out")


@pytest.mark.parametrize("made", [{}, {"w": torch.zeros(0, 3), "b": torch.zeros(0)}])
@pytest.mark.parametrize("form", [save, save_bin])
def test_models_without_a_number_are_refused(plain: Path, made: dict[str, Any], form: Any, capsys: Told) -> None:
    for name in ("base", "a", "b"):
        (plain / name / "model.safetensors").unlink()
        form(plain / name, made)
    for method in ({}, {"merge_method": "emr", "parameters": {}}):
        write_recipe(plain, **method)
        assert "nothing to merge" in refused(capsys, "merge", "r.yaml", "out")
    with pytest.raises(CheckpointError, match="nothing to merge"):
        adarank.merge(made, {"a": made})


@pytest.mark.parametrize(
    "odd",
    [torch.zeros(6, 4).to_sparse(), torch.zeros(6, 4, device="meta"), torch.zeros(6, 4, dtype=torch.complex64),
     torch.quantize_per_tensor(torch.zeros(6, 4), 0.1, 0, torch.qint8)],
    ids=["sparse", "meta", "complex", "quantised"],
)  # fmt: skip
def test_tensors_that_hold_no_plain_numbers_are_named(plain: Path, odd: torch.Tensor, capsys: Told) -> None:
    (plain / "a" / "model.safetensors").unlink()
    save_bin(plain / "a", {"w": odd})
    told = refused(capsys, "merge", "r.yaml", "out")
    assert (
        "pytorch_model.bin: tensor 'w' has dtype" in told
        or "pytorch_model.bin: tensor 'w' holds" in told
        or "needs to run code" in told
    )


def encrypted(file: Path) -> None:
    """Say of every member that it is encrypted, in both places where a zip archive does."""
    content = bytearray(file.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.find(mark)
        while place >= 0:
            content[place + offset] |= 1
            place = content.find(mark, place + 1)
    file.write_bytes(content)


def odd_member(file: Path) -> None:
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("notes.txt", "no array")


def of_objects(file: Path) -> None:
    np.savez(file, text=np.array([{}, {}], dtype=object), label=np.zeros(2))


@pytest.mark.parametrize("spoil", [encrypted, odd_member, of_objects])
def test_an_archive_of_odd_members_is_no_traceback(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    from adarank.data.read import read_table

    file = tmp_path / "x.npz"
    np.savez(file, text=np.array(["good", "bad"]), label=np.arange(2))
    assert len(read_table("x.npz", tmp_path, ["text"])["text"]) == 2
    spoil(file)
    if spoil is odd_member:
        with pytest.raises(DataError, match=r"x\.npz"):
            read_table("x.npz", tmp_path, ["text", "notes.txt", "other"])
        return
    with pytest.raises(DataError, match=r"x\.npz: cannot be read"):
        read_table("x.npz", tmp_path, ["text"])


def test_text_that_is_no_unicode_names_its_row(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path)
    rows = ['{"text": "good", "label": 0}'] * 5 + ['{"text": "bad \\ud800", "label": 1}']
    (zoo / "data" / "mood.jsonl").write_text("\n".join(rows))
    models = [{"model": "models/mood", "task": {"name": "mood", "data": "data/mood.jsonl"}}]
    with pytest.raises(DataError, match=r"task 'mood', row 6: .*surrogate"):
        adarank.merge_recipe(recipe(zoo, models=models, **ADAPT), tmp_path / "out")


def test_a_configuration_with_lone_surrogates_is_copied_as_it_is(plain: Path) -> None:
    text = '{"note": "\\ud800", "model_type": "x"}'
    for name in ("base", "a", "b"):
        (plain / name / "config.json").write_text(text)
    write_recipe(plain, out_dtype="float32")
    assert main(["merge", "r.yaml", "out"]) == 0
    assert json.loads((plain / "out" / "config.json").read_text())["note"] == "\ud800"


@pytest.mark.parametrize("where", ["adarank.outputs.write.write_folders", "adarank.workflow.merge.describe"])
def test_a_bug_says_so_keeps_its_traceback_and_no_file(
    plain: Path, where: str, capsys: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError("nobody planned for this")

    monkeypatch.setattr(where, broken)
    before = sorted(os.listdir("."))
    assert main(["merge", "r.yaml", "out"]) == 70
    told = capsys.readouterr().err
    assert "a bug in adarank (TypeError)" in told
    assert "Traceback" in told
    assert "nobody planned for this" in told
    assert sorted(os.listdir(".")) == before


def test_a_bug_in_an_adaptation_leaves_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError("nobody planned for this")

    zoo = make_zoo(tmp_path)
    monkeypatch.setattr(LiveWeights, "pull_back", broken)
    assert main(["merge", str(recipe(zoo, **ADAPT)), str(tmp_path / "out")]) == 70
    assert not list(tmp_path.glob(".out*"))


def test_memory_that_runs_out_is_told_in_a_sentence(plain: Path, capsys: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("adarank.outputs.write.write_folders", greedy)
    assert "not enough memory" in refused(capsys, "merge", "r.yaml", "out")


def test_an_unfit_path_is_an_error_of_its_own_kind_in_python(plain: Path) -> None:
    with pytest.raises(OutputError):
        adarank.merge_recipe("r.yaml", LONG)
    with pytest.raises(RecipeError):
        adarank.merge_recipe(LONG, "out")
    with pytest.raises(CheckpointError):
        adarank.load_bundle("a\0b")
    with pytest.raises(CheckpointError):
        adarank.load_task(LONG, "a")
