"""Outputs on the hub, by a stand-in of it: whole, checked before, gone on with, and over nothing that is there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import adarank
from adarank.cli.main import main
from adarank.errors import OutputError
from hub_stand_in import Hub
from text_zoo import make_zoo, recipe

NAME = "org/merged"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_zoo(tmp_path_factory.mktemp("push"))
    adarank.merge_recipe(recipe(folder, merge_method="average"), folder / "one")
    adarank.merge_recipe(recipe(folder, merge_method="emr"), folder / "bundle")
    return folder


@pytest.fixture
def out(zoo: Path, tmp_path: Path) -> Path:
    return shutil.copytree(zoo / "one", tmp_path / "out")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub().served() as served:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", served.url)
        monkeypatch.setenv("HF_TOKEN", served.token)
        yield served


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def on_hub(hub: Hub) -> dict[str, bytes]:
    return {path: content for path, content in hub.files.items() if path != ".gitattributes"}


@pytest.mark.parametrize("kind", ["one", "bundle"])
@pytest.mark.parametrize("private", [True, False])
def test_all_files_of_an_output_come_in_one_commit(zoo: Path, hub: Hub, kind: str, private: bool) -> None:
    pushed = adarank.push(zoo / kind, NAME, private=private)
    assert on_hub(hub) == contents(zoo / kind)
    assert (hub.name, hub.private, len(hub.commits)) == (NAME, private, 1)
    assert pushed["bytes"] == sum(map(len, contents(zoo / kind).values()))
    assert pushed["url"] == f"{hub.url}/{NAME}"


def test_the_command_reads_hub_and_token_from_the_environment(out: Path, tmp_path: Path) -> None:
    with Hub().served() as hub:
        given = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "adarank", "push", str(out), NAME, "--private", "--json"]
        done = subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["commit"] == f"{1:040x}"
    assert on_hub(hub) == contents(out)
    assert contents(tmp_path / "out") == contents(out)


def test_a_dry_run_lists_and_connects_to_nothing(out: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(out), NAME, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in contents(out))
    assert "Nothing was uploaded" in said
    assert hub.requests == 0


def test_a_push_that_broke_off_goes_on_from_there(zoo: Path, hub: Hub) -> None:
    record = json.loads((zoo / "one" / "adarank.json").read_text())
    large = {name: entry["sha256"] for name, entry in record["files"].items() if name.endswith(".safetensors")}
    hub.refused = {large["heads/mood/head.safetensors"]}
    with pytest.raises(OutputError, match="the hub did not take it"):
        adarank.push(zoo / "one", NAME)
    assert on_hub(hub) == {}  # nothing of it can be seen
    first, hub.refused = set(hub.uploads), set()
    hub.uploads.clear()
    adarank.push(zoo / "one", NAME)
    assert on_hub(hub) == contents(zoo / "one")
    assert first | set(hub.uploads) == set(large.values())
    assert not first & set(hub.uploads)


def test_an_output_that_is_not_as_recorded_is_not_pushed(out: Path, hub: Hub) -> None:
    file = out / "heads" / "mood" / "head.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (out / "notes.txt").write_text("mine")
    for dry in (True, False):
        with pytest.raises(OutputError, match="not as its record says") as raised:
            adarank.push(out, NAME, dry_run=dry)
        assert "head.safetensors" in str(raised.value)
        assert "notes.txt" in str(raised.value)
    file.write_bytes(whole)
    (out / "notes.txt").unlink()
    (out / "config.json").unlink()
    with pytest.raises(OutputError, match=r"config\.json: is missing"):
        adarank.push(out, NAME)
    (out / "adarank.json").unlink()
    with pytest.raises(OutputError, match="no whole output"):
        adarank.push(out, NAME)
    assert hub.requests == 0


def test_an_edited_card_goes_along_and_is_said(out: Path, hub: Hub) -> None:
    adarank.push(out, NAME)
    (out / "README.md").write_text("# Mine\n")
    assert "README.md" in adarank.push(out, NAME)["notes"][0]  # over the same output, without being forced
    assert hub.files["README.md"] == b"# Mine\n"
    assert on_hub(hub) == contents(out)


def test_another_output_is_replaced_only_when_forced(zoo: Path, hub: Hub) -> None:
    adarank.push(zoo / "bundle", NAME)
    with pytest.raises(OutputError, match="--force"):
        adarank.push(zoo / "one", NAME)
    assert on_hub(hub) == contents(zoo / "bundle")
    pushed = adarank.push(zoo / "one", NAME, force=True)
    assert on_hub(hub) == contents(zoo / "one")
    assert "bundle.json" in pushed["notes"][0]


def test_a_public_repository_is_no_private_one(zoo: Path, hub: Hub) -> None:
    adarank.push(zoo / "one", NAME)
    with pytest.raises(OutputError, match="is there and public"):
        adarank.push(zoo / "one", NAME, private=True, force=True)
    assert len(hub.commits) == 1


@pytest.mark.parametrize("name", ["merged", "a/b/c", "org/na me", "", "org/--x"])
def test_names_that_no_repository_has_are_refused(zoo: Path, hub: Hub, name: str) -> None:
    with pytest.raises(OutputError, match="org/name"):
        adarank.push(zoo / "one", name)
    assert hub.requests == 0


def test_without_a_token_the_way_to_log_in_is_said(out: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "another")
    with pytest.raises(OutputError, match="HF_TOKEN"):
        adarank.push(out, NAME)
    assert hub.name is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OutputError, match=r"[Oo]ffline"):
        adarank.push(out, NAME)
