"""Ctrl-C: exit code 130, and words that are true of what is kept and of what the same command does next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from adarank.cli.main import main
from adarank.errors import Interrupted
from adarank.workflow import demo
from text_zoo import ADAPT, make_zoo, recipe

# Runs a command that gets a real SIGINT as soon as it says or does something.
SCRIPT = """
import os, signal, sys
from adarank.cli.main import main
from adarank.cli.progress import Screen
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, shells have it ignored
kind, text, *command = sys.argv[1:]
before = getattr(Screen, kind)
def interrupted(self, *given):
    before(self, *given)
    if text in str(given):
        os.kill(os.getpid(), signal.SIGINT)
setattr(Screen, kind, interrupted)
sys.exit(main(command))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture
def zoo(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the zoo's models and data in it."""
    for name in ("models", "data"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def interrupt(kind: str, text: str, *command: str) -> str:
    """What a command says on stderr that is interrupted when `Screen`'s method of this kind is given the text."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("COLUMNS", None)  # or its last sentence is folded
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, text, *command], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def states(folder: Path) -> Sequence[str]:
    return sorted(path.name for path in folder.glob(".*") if path.is_dir())


def test_a_merge_without_adaptation_keeps_nothing(zoo: Path) -> None:
    recipe(zoo, "r.yaml", merge_method="average")
    assert "nothing is kept" in interrupt("note", "Writing", "merge", "r.yaml", "out")
    assert not (zoo / "out").exists()
    assert not states(zoo)


def test_what_was_computed_of_experts_is_kept(zoo: Path) -> None:
    recipe(zoo, "r.yaml", **ADAPT)
    text = interrupt("note", "Decomposing", "merge", "r.yaml", "out")
    assert "What was computed of the experts is kept" in text
    assert ".out.state" in text
    assert list((zoo / ".out.state").rglob("experts.pt"))
    assert not (zoo / "out").exists()
    assert main(["merge", "r.yaml", "out"]) == 0
    assert not states(zoo)


def test_a_stopped_adaptation_goes_on(zoo: Path) -> None:
    recipe(zoo, "r.yaml", **ADAPT)
    text = interrupt("step", "History", "merge", "r.yaml", "out")
    assert "Run the same command to continue" in text
    assert list((zoo / ".out.state").rglob("state.pt"))
    assert main(["merge", "r.yaml", "out"]) == 0


def stages(zoo: Path, first: dict[str, Any], last: dict[str, Any]) -> None:
    """A recipe of a stage that is merged first, and of an output that it is the base of."""
    texts = [recipe(zoo, "r.yaml", **values).read_text() for values in (first, last)]
    (zoo / "r.yaml").write_text("name: first\n" + "---\n".join(texts))


AVERAGE = {"merge_method": "average"}


def test_of_stages_the_first_leaves_nothing_before_it_is_merged(zoo: Path) -> None:
    stages(zoo, AVERAGE, {**AVERAGE, "base_model": "first"})
    assert "nothing is kept" in interrupt("note", "Writing", "merge", "r.yaml", "out")
    assert not (zoo / "out").exists()
    assert not states(zoo)


def test_stages_that_are_merged_are_kept(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages(zoo, AVERAGE, {**AVERAGE, "base_model": "first"})
    text = interrupt("note", "Stage 2 of 2", "merge", "r.yaml", "out")
    assert "Nothing was written to out. 1 merged stage is kept in" in text
    assert ".out.state" in text
    assert not (zoo / "out").exists()
    assert main(["merge", "r.yaml", "out"]) == 0
    assert "Stage 1 of 2, first: merged already" in capsys.readouterr().err
    assert not states(zoo)


@pytest.mark.parametrize(
    ("kind", "at", "said", "file"),
    [
        ("note", "Decomposing", "hat was computed of the experts", "experts.pt"),
        ("step", "History", "Run the same command to continue", "state.pt"),
    ],
    ids=["experts", "step"],
)
@pytest.mark.parametrize("number", [1, 2])
def test_an_adapted_stage_goes_on(number: int, kind: str, at: str, said: str, file: str, zoo: Path) -> None:
    of_last = {"base_model": "first"}
    stages(zoo, *((ADAPT, {**AVERAGE, **of_last}) if number == 1 else (AVERAGE, {**ADAPT, **of_last})))
    text = interrupt(kind, at, "merge", "r.yaml", "out")
    assert said in text
    assert ("1 merged stage and" in text) == (number == 2 and kind == "note")
    assert list((zoo / ".out.state").rglob(file))
    assert main(["merge", "r.yaml", "out"]) == 0
    assert not states(zoo)


def test_an_evaluation_keeps_nothing_and_says_so(zoo: Path) -> None:
    recipe(zoo, "r.yaml")
    before = sorted(path.name for path in zoo.iterdir())
    assert "keeps nothing on the way" in interrupt("note", "Scoring the experts", "evaluate", "r.yaml")
    assert sorted(path.name for path in zoo.iterdir()) == before


def test_a_search_goes_on_after_its_finished_points(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(zoo, "r.yaml", merge_method="task_arithmetic", parameters={"lambda": 0.3})
    command = ("search", "r.yaml", "best.yaml", "--over", "lambda=0.1,0.2,0.3")
    assert "1 finished point(s) are kept" in interrupt("point", "0.1", *command)
    assert not (zoo / "best.yaml").exists()
    assert main(list(command)) == 0
    assert (zoo / "best.yaml").exists()
    assert not states(zoo)


def test_a_search_stopped_before_a_point_keeps_nothing(zoo: Path) -> None:
    recipe(zoo, "r.yaml", merge_method="task_arithmetic", parameters={"lambda": 0.3})
    text = interrupt("note", "Loading the networks", "search", "r.yaml", "best.yaml", "--over", "lambda=0.1,0.2")
    assert "no point was finished" in text
    assert not states(zoo)


@pytest.mark.parametrize(
    ("row", "said"), [("AdaMerging", "nothing is kept"), ("AdaRank", "the same command computes the other rows again")]
)
def test_the_demo_tells_what_is_kept_of_it(
    row: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "zoo"
    copy.mkdir()
    for path in demo.ZOO.iterdir():
        if path.name != "recipe.yaml":
            (copy / path.name).symlink_to(path)
    values = yaml.safe_load((demo.ZOO / "recipe.yaml").read_text())
    for entry in values["models"]:
        entry["task"]["limit"] = 4
    (copy / "recipe.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(demo, "ROWS", {"average": demo.ROWS["average"], row: demo.ROWS[row]})
    with pytest.raises(Interrupted) as caught:
        demo.run(tmp_path / "out", zoo=copy, progress=lambda history, steps: os.kill(os.getpid(), signal.SIGINT))
    assert f"in the row {row}" in str(caught.value)
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert ((tmp_path / ".out.state" / "state.pt").exists()) == (row == "AdaRank")
