"""The command line and the hub: what a person types and sees."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest

import adarank
from adarank.cli.main import main, parser
from adarank.errors import CheckpointError
from adarank.io.hub import is_hub_id, resolve
from text_zoo import ADAPT, TASKS, make_zoo, recipe


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_plan_names_every_tensor_and_reads_no_weights(
    zoo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("plan read a tensor")

    monkeypatch.setattr("adarank.io.checkpoint.Checkpoint.read", read)
    plan = json.loads(shown(capsys, "plan", str(recipe(zoo, **ADAPT)), "--json"))
    assert set(plan["tasks"]) == set(TASKS)
    assert set(plan["splits"]) == set(TASKS)
    assert plan["peak_bytes"] > plan["output_bytes"] > 0
    assert {row["action"] for row in plan["tensors"].values()} >= {"decompose", "scale", "keep"}


def test_plan_finds_a_missing_column_without_work(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = {"name": "mood", "data": "data/mood.tsv", "columns": {"text": "sentence"}}
    path = recipe(zoo, "column.yaml", **{**ADAPT, "models": [{"model": "models/mood", "task": task}]})
    assert main(["plan", str(path)]) == 1
    assert "no column 'sentence'" in capsys.readouterr().err


def test_plan_lists_all_unreadable_checkpoints(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(zoo, "lost.yaml", models=[{"model": "models/one"}, {"model": "models/two"}])
    assert main(["plan", str(path)]) == 1
    error = capsys.readouterr().err
    assert "models/one" in error
    assert "models/two" in error


@pytest.mark.parametrize("mask", ["binary", "soft"])
def test_evaluate_and_inspect_print_what_json_holds(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mask: str
) -> None:
    changes = {**ADAPT, "parameters": {**ADAPT.get("parameters", {}), "mask": mask}}
    path, out = str(recipe(zoo, **changes)), str(tmp_path / "out")
    assert ("soft masks" in shown(capsys, "merge", path, out)) == (mask == "soft")
    table = json.loads(shown(capsys, "evaluate", path, out, "--json"))
    text = shown(capsys, "evaluate", path, out)
    assert all(f"{table['summary'][row]['mean']:.1f}" in text for row in ("base", out, "experts"))
    layers = json.loads(shown(capsys, "inspect", out, "--json"))["layers"]
    text = shown(capsys, "inspect", out, "--full")
    assert all(layer["name"] in text for layer in layers)
    assert ("Masks are soft" in text) == (mask == "soft")
    tensors = json.loads(
        shown(capsys, "inspect", str(zoo / "models" / "mood"), "--base", str(zoo / "models" / "base"), "--json")
    )
    moved = [row for row in tensors if row["rank95"]]
    assert moved
    assert all(0 < row["rank95"] <= row["rank"] for row in moved)


def test_every_method_has_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    entries = json.loads(shown(capsys, "methods", "--json"))
    for name, entry in entries.items():
        page = shown(capsys, "methods", name)
        assert all(setting["name"] in page for setting in entry["settings"])
        assert entry["formula"] in page
    listed = shown(capsys, "methods")  # formulas in one piece: they hold brackets, which are no markup
    assert all(entry["formula"] in listed for entry in entries.values())
    assert main(["methods", "adarnak"]) == 1
    assert "'adarank'" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_state_and_the_same_command_goes_on(
    zoo: Path, tmp_path: Path, number: signal.Signals
) -> None:
    long = {**ADAPT, "adapt": {**ADAPT["adapt"], "steps": 100_000, "check_every": 100_000}}
    path, out = recipe(zoo, f"long-{number}.yaml", **long), tmp_path / "out"
    command = [sys.executable, "-m", "adarank.cli.main", "merge", str(path), str(out)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert running.stderr
    while not running.stderr.readline().startswith("step 1/"):
        assert running.poll() is None
    time.sleep(0.2)
    running.send_signal(number)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Run the same command to continue" in error
    assert (tmp_path / ".out.state" / "state.pt").exists()
    assert not out.exists()


def test_hub_ids_are_told_from_paths(tmp_path: Path) -> None:
    assert is_hub_id("org/name")
    assert is_hub_id("org/name@v1")
    assert not is_hub_id("./org/name")
    assert not is_hub_id("folder/weights.bin")
    assert is_hub_id("org/name/folder@v1")
    assert not is_hub_id("org//folder")


def test_a_hub_id_is_downloaded_at_its_revision_without_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def snapshot(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve("org/name@v2") == tmp_path
    assert asked["name"] == "org/name"
    assert asked["revision"] == "v2"
    assert not any(pattern.endswith(".py") for pattern in asked["patterns"])


def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(*_: object, **__: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(CheckpointError, match=r"org/name: not a local path.*no route"):
        resolve("org/name")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["merge", "--help"]], ids=" ".join)
def test_help_and_version_load_no_pytorch(arguments: list[str]) -> None:
    script = f"import sys, adarank.cli.main as m\ntry: code = m.main({arguments})\nexcept SystemExit as end: code = end.code\nassert 'torch' not in sys.modules\nsys.exit(code)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert adarank.__version__ in done.stdout if arguments == ["--version"] else "usage: adarank" in done.stdout


def test_the_package_is_a_command_too() -> None:
    done = subprocess.run([sys.executable, "-m", "adarank", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"adarank {adarank.__version__}\n")


def test_merge_takes_a_size_of_files_before_the_recipes(zoo: Path, tmp_path: Path) -> None:
    path = recipe(zoo, merge_method="average", max_shard_size="1GB")
    assert main(["merge", str(path), str(tmp_path / "out"), "--max-shard-size", "8KB"]) == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert main(["merge", str(path), str(tmp_path / "other"), "--max-shard-size", "8"]) == 1
    assert main(["merge", str(path), str(tmp_path / "other"), "--max-shard-size", "huge"]) == 1


@pytest.mark.parametrize(
    ("paths", "options"),
    [
        (["extract", "out", "task", "folder"], ["--force"]),
        (["extract", "out", "folder"], ["--task=t", "--force"]),
        (["evaluate", "r.yaml", "one", "two"], ["--split", "select"]),
        (["search", "r.yaml", "best.yaml"], ["--over", "lambda=1,2"]),
        (["merge", "r.yaml", "out"], ["--force"]),
        (["report", "one", "two"], ["--force"]),
        (["methods", "cart"], ["--json"]),
    ],
    ids=lambda part: part[0],
)
def test_options_may_stand_anywhere_after_the_command(paths: list[str], options: list[str]) -> None:
    read = [vars(parser().parse_args([*paths[:n], *options, *paths[n:]])) for n in range(1, len(paths) + 1)]
    assert all(each == read[0] for each in read)
    given = {str(value) for entry in read[0].values() for value in (entry if isinstance(entry, list) else [entry])}
    assert given >= set(paths[1:])


def test_a_path_too_few_or_too_many_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for given, said in ((["extract", "out"], "required: out"), (["extract", "a", "b", "c", "d"], "arguments: d")):
        with pytest.raises(SystemExit, match="2"):
            main(given)
        assert said in capsys.readouterr().err
