"""What the commands that analyse and share show at 80 and 120 columns: nothing cut off, every value there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from adarank.cli.main import main
from conftest import Shown, whole
from image_zoo import TASKS, make_zoo, recipe
from open_clip_zoo import Clip


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, a recipe and what a merge of it wrote."""
    folder = make_zoo(tmp_path_factory.mktemp("zoo"))
    recipe(folder, "plain.yaml", merge_method="task_arithmetic", parameters={"lambda": 0.3})
    assert main(["merge", str(folder / "plain.yaml"), str(folder / "plain")]) == 0
    return folder


def test_an_analysis_names_its_files_and_findings(zoo: Path, terminal: Shown, tmp_path: Path) -> None:
    text = terminal("analyse", "ranks", zoo / "plain.yaml", tmp_path / "ranks", "--image", "none")
    written = json.loads((tmp_path / "ranks.json").read_text())
    assert written["figure"] == "ranks"
    assert whole(str(tmp_path / "ranks.csv")) in whole(text)
    terminal("analyse", "ranks", zoo / "plain.yaml", tmp_path / "ranks", "--image", "none", "--dry-run", "--force")


def test_a_card_and_what_would_be_pushed_are_whole(
    zoo: Path, terminal: Shown, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(zoo / "plain.yaml"), str(zoo / "plain"), "--json"]) == 0
    (tmp_path / "scores.json").write_text(capsys.readouterr().out)
    terminal("merge", zoo / "plain.yaml", tmp_path / "out")
    assert whole(str(tmp_path / "out")) in whole(terminal("card", tmp_path / "out", tmp_path / "scores.json"))
    text = terminal("push", tmp_path / "out", "org/name", "--dry-run")
    for file in (tmp_path / "out").rglob("*"):
        if file.is_file():
            assert file.relative_to(tmp_path / "out").as_posix() in text
    assert all(f"heads/{task}" in text for task in TASKS)


def test_suites_and_their_files_are_whole(terminal: Shown, tmp_path: Path) -> None:
    assert "vision-20-l14" in terminal("reproduce")
    text = whole(terminal("reproduce", "glue-7-roberta", "--dry-run", "--from", tmp_path))
    assert "notknown" in text


def test_a_converted_checkpoint_is_named_whole(terminal: Shown, tmp_path: Path) -> None:
    torch.save(Clip().state_dict(), tmp_path / "finetuned.pt")
    assert whole(str(tmp_path / "out")) in whole(terminal("convert", tmp_path / "finetuned.pt", tmp_path / "out"))
