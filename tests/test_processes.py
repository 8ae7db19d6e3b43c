"""Several processes that share a merge write what one writes, byte for byte; one that dies is named, and nothing is half done."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import adarank
from adarank.cli.launch import Launch, launched
from adarank.errors import ProcessError
from adarank.io import processes
from process_zoo import Processes, free_port
from text_zoo import make_zoo, recipe

RECIPES: dict[str, dict[str, Any]] = {
    "cart": {"parameters": {"rank": 0.5}},
    "dare_ties": {"merge_method": "dare_ties", "parameters": {"density": 0.5, "weight": 0.5}},
    "ties_merging": {"merge_method": "ties_merging"},
    "fisher": {"merge_method": "fisher", "parameters": {"examples": 4}},
    "regmean++": {"merge_method": "regmean++", "parameters": {"examples": 8}},
}
DATA_FREE = ("cart", "dare_ties", "ties_merging")
SHARDS = 6000  # bytes: several files, of which the last process has fewest


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, the recipes, and what one process makes of them in `one/`."""
    folder = make_zoo(tmp_path_factory.mktemp("zoo"))
    for name, changes in RECIPES.items():
        adarank.merge_recipe(recipe(folder, f"{name}.yaml", max_shard_size=SHARDS, **changes), folder / "one" / name)
    recipe(folder, "emr.yaml", merge_method="emr", heads="learn")
    return folder


@pytest.fixture(scope="module")
def several() -> Iterator[Processes]:
    with Processes() as started:
        yield started


def content(folder: Path) -> dict[str, bytes]:
    """Every file of an output but its record."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "adarank.json")
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


@pytest.mark.parametrize(("count", "names"), [(2, tuple(RECIPES)), (4, DATA_FREE)])
def test_processes_write_the_bytes_that_one_writes(
    zoo: Path, several: Processes, count: int, names: tuple[str, ...]
) -> None:
    outputs = {name: zoo / f"by-{count}" / name for name in names}
    ended = several.run(count, [], zoo, many=[(f"{name}.yaml", str(out)) for name, out in outputs.items()])
    assert [process.code for process in ended] == [0] * count, ended
    for name, out in outputs.items():
        alone = zoo / "one" / name
        assert len(list(alone.glob("*.safetensors"))) > count
        assert content(out) == content(alone), name
        records = [json.loads((folder / "adarank.json").read_text()) for folder in (alone, out)]
        assert records[0]["files"] == records[1]["files"]
        assert records[0]["inputs"] == records[1]["inputs"]
        assert records[1]["processes"]["count"] == count
    assert not list((zoo / f"by-{count}").glob(".*"))


@pytest.mark.parametrize("launcher", ["torch.distributed.run", "accelerate.commands.launch"])
def test_launchers_start_a_merge_unchanged(zoo: Path, tmp_path: Path, launcher: str) -> None:
    pytest.importorskip(launcher.split(".")[0])
    many = {
        "torch.distributed.run": ["--nproc-per-node", "2", "--standalone"],
        "accelerate.commands.launch": ["--multi_gpu", "--num_processes", "2", "--main_process_port", free_port()],
    }
    command = [sys.executable, "-m", launcher, *many[launcher], "-m", "adarank", "merge", "cart.yaml", tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=zoo, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written in") == 1
    assert content(tmp_path / "out") == content(zoo / "one" / "cart")


@pytest.mark.parametrize(("victim", "name"), [(0, "cart"), (1, "regmean++")])
def test_a_process_that_dies_is_named_and_the_rest_stop(
    zoo: Path, several: Processes, tmp_path: Path, victim: int, name: str
) -> None:
    command = ["merge", str(zoo / f"{name}.yaml"), "out"]
    ended = several.run(2, command, tmp_path, dies=(victim, 2))
    assert ended[victim].code == -9
    assert ended[1 - victim].code == 1
    assert f"process {victim} of 2" in ended[1 - victim].said
    assert "ended without a word" in ended[1 - victim].said
    assert "The same command starts again" in ended[1 - victim].said
    assert not (tmp_path / "out").exists()
    again = several.run(2, command, tmp_path)
    assert [process.code for process in again] == [0, 0], again
    assert content(tmp_path / "out") == content(zoo / "one" / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.html"]


def test_the_first_says_what_another_process_met(zoo: Path, several: Processes, tmp_path: Path) -> None:
    ended = several.run(2, ["merge", str(zoo / "cart.yaml"), "out"], tmp_path, fails=1)
    assert [process.code for process in ended] == [1, 1]
    assert "process 1 of 2" in ended[0].said
    assert "stopped: a disk that cannot be read" in ended[0].said
    assert ended[1].said == ""
    assert not list(tmp_path.iterdir())


def test_work_that_is_not_shared_is_refused_once(zoo: Path, several: Processes, tmp_path: Path) -> None:
    first, second = several.run(2, ["merge", str(zoo / "emr.yaml"), str(tmp_path / "out")], zoo)
    assert first.code == second.code == 1
    assert "merge_method: 'emr' runs in one process, and 2 were started." in first.said
    assert "heads: learning heads runs in one process" in first.said
    assert second.said == ""
    first, second = several.run(2, ["plan", "cart.yaml"], zoo)
    assert first.code == second.code == 1
    assert "merge alone shares its work" in first.said
    assert second.said == ""


@pytest.mark.slow
def test_processes_killed_at_random_leave_the_whole_or_nothing(zoo: Path, several: Processes, tmp_path: Path) -> None:
    draw = random.Random(0)
    for number in range(12):
        count, out = draw.choice([2, 4]), tmp_path / f"out{number}"
        name = draw.choice(list(RECIPES))
        command = ["merge", str(zoo / f"{name}.yaml"), str(out)]
        several.run(count, command, tmp_path, dies=(draw.randrange(count), draw.randint(1, 12)))
        if out.exists():
            assert content(out) == content(zoo / "one" / name)
        else:
            assert [process.code for process in several.run(count, command, tmp_path)] == [0] * count
        assert content(out) == content(zoo / "one" / name)
        assert not list(tmp_path.glob(f".out{number}*"))


def test_one_process_has_all_the_work() -> None:
    assert (processes.rank(), processes.size(), processes.names()) == (0, 1, [])
    assert processes.share([1, 2, 3]) == [1, 2, 3]
    assert processes.mapped(str, [1, 2]) == ["1", "2"]
    assert processes.gathered("a") == ["a"]
    assert processes.from_first(lambda: 5) == 5
    assert torch.equal(processes.add_up(torch.ones(2)), torch.ones(2))


def test_a_launch_is_read_off_the_whole_environment() -> None:
    started = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "here", "MASTER_PORT": "5", "LOCAL_RANK": "1"}
    assert launched(started) == Launch(1, 4, 1)
    assert launched({**started, "WORLD_SIZE": "1"}) is None
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        assert launched({key: value for key, value in started.items() if key != name}) is None


def test_processes_that_do_not_meet_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "no port")
    with pytest.raises(ProcessError, match="does not meet the others"), processes.joined(0, 2):
        pass
