"""An output's place: one run at a time, what killed runs leave, and nothing of the user's is ever removed."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import adarank
import text_zoo
from adarank.cli.main import main
from adarank.errors import OutputError
from adarank.io.lock import hold
from adarank.io.writer import RECORD, atomic_folder, write_record
from adarank.recipe.reader import load_recipe
from adarank.workflow.search import Axis, search

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import concurrent_merges
import kills

AXES = [Axis("lambda", (0.5, 1.0))]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_zoo.make_zoo(tmp_path_factory.mktemp("outputs"))


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def fill(folder: Path, text: str = "new") -> None:
    (folder / "model.safetensors").write_text(text)
    write_record(folder, {"versions": {}})


def made(out: Path, text: str = "old") -> Path:
    with atomic_folder(out) as folder:
        fill(folder, text)
    return out


def in_child(work: Callable[[], Any]) -> int:
    """Do something in a forked process; its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)  # an end of its own is the child's business
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    os.kill(os.getpid(), 9)


def killed_while_filling(out: Path, force: bool = False) -> None:
    def work() -> None:
        with atomic_folder(out, force) as folder:
            (folder / "model-00001-of-00002.safetensors").write_text("half")
            die()

    assert in_child(work) == -9


def test_the_next_run_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    killed_while_filling(tmp_path / "out")
    assert "out" not in names(tmp_path)
    assert len(names(tmp_path)) == 2  # its lock and its workspace
    made(tmp_path / "out")
    assert names(tmp_path) == {"out"}
    assert names(tmp_path / "out") == {"model.safetensors", RECORD}


def test_a_killed_replacement_leaves_the_old_output_in_its_place(tmp_path: Path) -> None:
    out = made(tmp_path / "out")
    before = contents(out)
    killed_while_filling(out, force=True)
    assert contents(out) == before


@pytest.mark.parametrize("last", ["out", "new"])
def test_an_old_output_in_hand_when_killed_is_put_back(tmp_path: Path, last: str) -> None:
    """Where two folders cannot be exchanged in one step, a kill may come between or after two renames."""
    out = made(tmp_path / "out")

    def work() -> None:
        real = Path.rename

        def rename(self: Path, target: Path) -> Path:
            renamed = real(self, target)
            if self.name == last:
                die()
            return renamed

        Path.rename = rename  # type: ignore[method-assign]
        sys.platform = "other"
        with atomic_folder(out, force=True) as folder:
            fill(folder)

    assert in_child(work) == -9
    assert out.exists() == (last == "new")
    with pytest.raises(OutputError, match="already exists"), atomic_folder(out):
        pass
    assert (out / "model.safetensors").read_text() == ("old" if last == "out" else "new")
    assert names(tmp_path) == {"out"}


def test_nothing_of_the_users_is_removed_for_its_name(zoo: Path, tmp_path: Path) -> None:
    for name in (".out.partial", ".out.old", ".out.state", ".out.0123456789abcdef.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("precious")
    (tmp_path / ".out.lock").write_text("precious")
    before = contents(tmp_path)
    adarank.merge_recipe(text_zoo.recipe(zoo), tmp_path / "out")
    adarank.merge_recipe(text_zoo.recipe(zoo), tmp_path / "out", force=True)
    assert before.items() <= contents(tmp_path).items()


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_strange_state_is_refused_before_any_work(zoo: Path, tmp_path: Path, kind: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("precious")
    place = tmp_path / ".out.state"
    {"folder": lambda: other.rename(place), "file": lambda: place.write_text("mine"), "link": lambda: place.symlink_to(other)}[kind]()  # fmt: skip
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=r"\.out\.state: is not adarank's"):
        adarank.merge_recipe(text_zoo.recipe(zoo, **text_zoo.ADAPT), tmp_path / "out")
    assert contents(tmp_path) == before


# One run at a time


def test_an_output_in_another_runs_hands_is_not_judged(tmp_path: Path) -> None:
    """Between its record and its files another run may put others there: whose fault they are cannot be said."""
    out = tmp_path / "out"
    made(out)
    (out / "model.safetensors").write_text("of the next output")
    code = (
        "import sys; from pathlib import Path; from adarank.io.writer import claimed\n"
        "with claimed(Path(sys.argv[1]), force=True): pass"
    )
    for held, said in ((True, "another run is writing there"), (False, "is not as adarank wrote it")):
        with hold(out) if held else nullcontext():
            done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False)
        assert said in done.stderr


def test_a_second_run_is_told_who_holds_the_output(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    code = (
        "import sys; from pathlib import Path; from adarank.io.writer import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])): pass"
    )
    with hold(out):
        done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False)
    assert f"another run is writing there (process {os.getpid()} on {platform.node()})" in done.stderr
    assert names(tmp_path) == set()


def test_another_thread_is_another_run_and_a_nested_call_is_not(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def second() -> None:
        try:
            with hold(tmp_path / "out"):
                pass
        except OutputError as error:
            errors.append(error)

    with hold(tmp_path / "out"):
        with hold(tmp_path / "x" / ".." / "out"):
            pass
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(errors) == 1
    second()
    assert len(errors) == 1
    assert names(tmp_path) == set()


@pytest.mark.parametrize("killed", [False, True])
def test_a_lock_ends_with_its_process(tmp_path: Path, killed: bool) -> None:
    def work() -> None:
        with hold(tmp_path / "out"):
            die() if killed else os._exit(0)

    assert in_child(work) == (-9 if killed else 0)
    with hold(tmp_path / "out"):
        assert names(tmp_path) == {".out.adarank.lock"}
    assert names(tmp_path) == set()


@pytest.mark.parametrize("command", ["merge", "adapt", "extract", "search", "demo"])
def test_every_command_that_writes_takes_the_lock(zoo: Path, tmp_path: Path, capsys: Any, command: str) -> None:
    out = tmp_path / "out"
    recipe = str(text_zoo.recipe(zoo, f"{command}.yaml", **(text_zoo.ADAPT if command == "adapt" else {})))
    bundle = tmp_path / "bundle"
    if command == "extract":
        adarank.merge_recipe(text_zoo.recipe(zoo, "emr.yaml", merge_method="emr"), bundle)
    best = zoo / "held.best.yaml"
    given = {"merge": ["merge", recipe, str(out)], "adapt": ["merge", recipe, str(out)], "demo": ["demo", str(out)],
             "extract": ["extract", str(bundle), str(out), "--task", "mood"],
             "search": ["search", recipe, str(best), "--over", "lambda=0.5,1.0"]}  # fmt: skip
    held = zoo / "held.best.search.json" if command == "search" else out

    def work() -> None:
        sys.stderr = (tmp_path / "said").open("w")
        code = main(given[command])
        sys.stderr.flush()
        os._exit(code)

    with hold(held):
        assert in_child(work) == 1
    assert "another run is writing there (process" in (tmp_path / "said").read_text()
    assert not out.exists()
    assert not best.exists()


def test_races_end_with_one_output_and_one_sentence(tmp_path: Path) -> None:
    ends = concurrent_merges.race(tmp_path, pairs=6, seed=1)
    assert sum(ends.values()) == 6


def test_kills_end_with_the_old_output_or_the_new_one(tmp_path: Path) -> None:
    few = [command for command in kills.COMMANDS if command.name in ("merge regmean", "merge cart --force over task_arithmetic")]  # fmt: skip
    ends = kills.kill_all(tmp_path, kills=6, seed=1, commands=few)
    assert all(seen["killed"] for seen in ends.values())


@pytest.mark.slow
def test_kills_of_every_command_end_well(tmp_path: Path) -> None:
    ends = kills.kill_all(tmp_path, kills=40, seed=2)
    assert sum(seen["killed"] for seen in ends.values()) >= 40


# Links


@pytest.mark.parametrize("there", [True, False])
def test_an_output_that_is_a_link_is_followed(tmp_path: Path, there: bool) -> None:
    real = tmp_path / "disk" / "real"
    real.parent.mkdir()
    if there:
        made(real)
    (tmp_path / "out").symlink_to(real)
    with atomic_folder(tmp_path / "out", force=there) as folder:
        fill(folder)
        assert folder.parent.parent == real.parent  # on the disk that the link leads to
    assert (tmp_path / "out").is_symlink()
    assert (real / "model.safetensors").read_text() == "new"
    assert names(tmp_path / "disk") == {"real"}
    assert names(tmp_path) == {"disk", "out"}


def test_a_link_in_a_circle_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "other")
    (tmp_path / "other").symlink_to(tmp_path / "out")
    with pytest.raises(OutputError, match="Give another path"), atomic_folder(tmp_path / "out"):
        pass


# Searches


@pytest.mark.parametrize("force", [False, True])
def test_a_search_killed_between_its_two_files_is_completed(zoo: Path, force: bool) -> None:
    path, best = text_zoo.recipe(zoo, f"two-{force}.yaml"), zoo / f"two-{force}.best.yaml"
    if force:
        search(path, best, [Axis("lambda", (0.7,))])
    before = best.read_text() if force else None

    def work() -> None:
        real = Path.replace

        def replace(self: Path, target: Path) -> Path:
            renamed = real(self, target)
            if str(target).endswith(".best.search.json"):
                die()
            return renamed

        Path.replace = replace  # type: ignore[method-assign]
        search(path, best, AXES, force)

    assert in_child(work) == -9
    assert (best.read_text() if best.exists() else None) == before
    _, record = search(path, best, AXES, force)
    written = load_recipe(best).parameters
    assert written == record["best"]["settings"]
    assert not list(zoo.glob(f".two-{force}*"))
