"""What every command shows at 80 and 120 columns: nothing cut off, nothing longer than the terminal, every value there."""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from adarank.adapt.agreement import Signals
from adarank.adapt.history import History
from adarank.cli import console, show
from adarank.cli.main import main, parser
from adarank.cli.progress import Screen, screen, steps_view
from adarank.cli.sheets import title_of
from adarank.io.progress import advance, stage
from adarank.recipe.papers import ROWS, SETTINGS
from adarank.recipe.registry import METHODS
from adarank.workflow.adapt import telling_of_collapse
from adarank.workflow.scores import Table
from adarank.workflow.search import Point
from conftest import WIDTHS, Shown, whole
from image_zoo import ADAPT, TASKS, make_zoo, recipe


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, recipes, an adapted output, a bundle and a merged model."""
    folder = make_zoo(tmp_path_factory.mktemp("zoo"))
    recipe(folder, "adapted.yaml", **ADAPT)
    recipe(folder, "bundled.yaml", merge_method="emr")
    recipe(folder, "plain.yaml", merge_method="task_arithmetic", parameters={"lambda": 0.3})
    for name in ("adapted", "bundled", "plain"):
        assert main(["merge", str(folder / f"{name}.yaml"), str(folder / name)]) == 0
    return folder


def words(text: str) -> str:
    """Text without its line ends: a sentence may go over several lines, broken between words."""
    return " ".join(text.split())


def test_plans_name_every_tensor_and_task(zoo: Path, terminal: Shown) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(zoo)
        text = terminal("plan", "adapted.yaml", "--verbose")
    assert all(task in text for task in TASKS)
    assert all(word in text for word in ("decomposed", "merged by λ·delta", "predicted peak memory"))
    described = json.loads(_json("plan", zoo / "adapted.yaml"))
    for name, row in described["tensors"].items():
        line = words(text[text.index(name) :])
        assert "×".join(map(str, row["shape"])) in line[:200]
        assert row["reason"] in line[:300]


def test_a_merge_says_what_it_came_to(zoo: Path, terminal: Shown) -> None:
    text = words(terminal("merge", zoo / "adapted.yaml", zoo / "adapted", "--force"))
    record = json.loads((zoo / "adapted" / "adarank.json").read_text())["adaptation"]
    assert f"{record['steps']} steps" in text
    assert f"{100 * record['components_kept']:.2f}% of the components kept" in text
    assert whole(str(zoo / "adapted")) in whole(text)
    assert "next: adarank evaluate" in text


def test_scores_are_all_in_the_table(zoo: Path, terminal: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(zoo)
    outputs = ["adapted", "bundled", "plain"]
    text = terminal("evaluate", "adapted.yaml", *outputs)
    assert "per cent" in text
    table = json.loads(_json("evaluate", "adapted.yaml", *outputs))
    for row, scores in table["rows"].items():
        line = next(line for line in text.splitlines() if line.startswith(row))
        assert all(f"{score:.1f}" in line for score in scores.values())
        assert f"{table['summary'][row]['mean']:.1f}" in line


def test_inspect_says_what_was_kept_of_whom(zoo: Path, terminal: Shown) -> None:
    text = terminal("inspect", zoo / "adapted")
    inside = json.loads(_json("inspect", zoo / "adapted"))
    for number, task in enumerate(inside["tasks"]):
        masked = [layer for layer in inside["layers"] if layer["kept"]]
        kept, of = (sum(layer[key][number] for layer in masked) for key in ("kept", "sizes"))
        lam = [layer["lam"][number] for layer in inside["layers"]]
        line = next(line for line in text.splitlines() if line.startswith(task))
        assert f"{100 * kept / of:.1f}%" in line
        assert all(f"{value:.3f}" in line for value in (sum(lam) / len(lam), min(lam), max(lam)))
    for layer in ("layer.0", "layer.1"):
        assert re.search(rf"{layer} +\d+\.\d%", text)


def test_full_inspect_has_a_row_for_each_task(zoo: Path, terminal: Shown) -> None:
    text = terminal("inspect", zoo / "adapted", "--full")
    inside = json.loads(_json("inspect", zoo / "adapted"))
    for layer in inside["layers"]:
        place = text.index(layer["name"])
        lines = text[place:].splitlines()[1 : 1 + len(inside["tasks"])]
        for number, (task, line) in enumerate(zip(inside["tasks"], lines, strict=True)):
            assert line.split()[0] == task
            assert f"λ {layer['lam'][number]:.3f}" in line
            if layer["kept"]:
                assert f"kept {layer['kept'][number]} of {layer['sizes'][number]}" in line


def test_inspect_of_checkpoints_and_bundles_is_whole(zoo: Path, terminal: Shown) -> None:
    models = zoo / "models"
    text = terminal("inspect", models / "digits", "--base", models / "base")
    for row in json.loads(_json("inspect", models / "digits", "--base", models / "base")):
        line = words(text[text.index(row["name"]) :])[:200]
        assert f"{row['norm']:.4g}" in line
        assert row["rank95"] is None or f" {row['rank95']} {row['rank']} " in line
    assert "layer.1.output.dense.weight" in terminal("inspect", models / "base")
    text = terminal("inspect", zoo / "bundled")
    assert all(f"{task}, with its head" in text for task in TASKS)


def test_a_search_shows_every_point_whole(zoo: Path, terminal: Shown) -> None:
    best = zoo / "best.yaml"
    text = terminal("search", zoo / "plain.yaml", best, "--over", "lambda=0.1,0.2,0.4", "--force")
    record = json.loads((zoo / "best.search.json").read_text())
    for point in record["points"]:
        line = next(line for line in text.splitlines() if line.split()[:1] == [str(point["settings"]["lambda"])])
        assert all(f"{score:.1f}" in line for score in point["scores"].values())
        assert f"{point['mean']:.2f}" in line


def test_a_plan_of_stages_shows_each_of_them_whole(zoo: Path, terminal: Shown) -> None:
    path = recipe(zoo, "stages.yaml", merge_method="average")
    last = recipe(zoo, "last.yaml", merge_method="task_arithmetic", base_model="first")
    path.write_text(f"name: first\n{path.read_text()}---\n{last.read_text()}")
    text = terminal("plan", path, "--verbose")
    described = json.loads(_json("plan", path))
    stages = [("stage first:", described["stages"]["first"]), ("the output:", described)]
    for (start, of), shown in zip(stages, text.split("the output:"), strict=True):
        assert start in text
        assert f"{of['merge_method']} of {len(TASKS)}" in shown
        for name, row in of["tensors"].items():
            assert words(f"{row['dtype']} {row['action']} {row['reason']}") in words(shown[shown.index(name) :])[:300]


def test_every_class_is_in_the_table(zoo: Path, terminal: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(zoo)
    text = terminal("evaluate", "plain.yaml", "plain", "--per-class")
    of_models = json.loads(_json("evaluate", "plain.yaml", "plain", "--per-class"))["classes"]
    assert set(of_models["plain"]) == set(TASKS)
    for model, of_tasks in of_models.items():
        for task, classes in of_tasks.items():
            for each in classes:
                scores = [f"{each[key]:.1f}" for key in ("precision", "recall", "f1")]
                cells = [task, model, each["name"], str(each["inputs"]), *scores]
                assert re.search(r"[,\s]+".join(map(re.escape, cells)), text), cells


def test_commands_that_look_back_are_whole(zoo: Path, terminal: Shown) -> None:
    assert "is as it was recorded" in words(terminal("verify", zoo / "plain", "--from", zoo))
    text = terminal("report", zoo / "plain", "--to", zoo / "page.html", "--force")
    assert whole(str(zoo / "page.html")) in whole(text)


def test_an_extracted_task_is_named_whole(zoo: Path, terminal: Shown) -> None:
    text = terminal("extract", zoo / "bundled", zoo / "one", "--task", "digits", "--force")
    assert whole(str(zoo / "one")) in whole(text)


def test_the_catalogue_has_every_formula_whole(terminal: Shown) -> None:
    text = terminal("methods")
    for name in METHODS.built_in:
        assert any(line.startswith(name) for line in text.splitlines())
        assert words(METHODS[name].formula) in words(text)


@pytest.mark.parametrize("name", list(METHODS.built_in))
def test_a_methods_page_has_every_setting_whole(name: str, terminal: Shown) -> None:
    text = words(terminal("methods", name))
    entry = json.loads(_json("methods", name))[name]
    for key in ("summary", "formula", "needs", "reads", "memory", "source"):
        assert words(entry[key]) in text
    for setting in entry["settings"]:
        assert all(words(setting[key]) in text for key in ("name", "default", "allowed", "meaning"))


def test_the_papers_rows_have_every_figure_and_recipe(terminal: Shown) -> None:
    text = terminal("methods", "--papers")
    lines = text.splitlines()
    for row in ROWS:
        line = next(line for line in lines if line.startswith(row.name))
        assert [shown for key in SETTINGS if (shown := row.shown(key))] == re.findall(r"\d+\.\d+", line)
        assert words(row.yaml() if row.recipe else row.hint) in words(text)


COMMANDS = re.findall(r"^    ([a-z]+)", parser().format_help(), re.MULTILINE)


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("width", WIDTHS)
def test_help_fits(
    command: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit, match="0"):
        parser().parse_args([*([command] if command else []), "--help"])
    text = capsys.readouterr().out
    assert "usage: adarank" in text
    assert max(map(len, text.splitlines())) <= width


def test_errors_are_broken_between_words(zoo: Path, terminal: Shown) -> None:
    path = recipe(zoo, "wrong.yaml", merge_method="task_arithmetic", parameters={"lamda": 1, "lambda": -1}, seed=-1)
    text = terminal("merge", path, zoo / "never", code=1)
    assert "Did you mean 'lambda'?" in words(text)
    assert "seed:" in text


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize(("tasks", "losses"), [(8, 0), (20, 0), (8, 3), (8, 8)])
def test_a_table_names_every_task_whole_at_any_width(
    width: int, tasks: int, losses: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "out", Console(width=width, highlight=False, markup=False))
    scores = {f"task_number_{i}": i + 12.3 for i in range(tasks)}
    of_losses = list(scores)[:losses]
    rows, metrics = {"merged": scores, "experts": scores}, dict.fromkeys(of_losses, "loss")
    table = Table("test", "disjoint", dict.fromkeys(scores, 1000), rows, metrics=metrics)
    show.scores(table)
    lines = capsys.readouterr().out.splitlines()
    titles = next(n for n in range(1, len(lines)) if words(" ".join(lines[:n])) == title_of(table))
    assert max(map(len, lines)) <= width
    seen: dict[str, str] = {}
    for place in (i for i, line in enumerate(lines) if line.startswith("merged")):
        cells = [(m.end(), m.group()) for m in re.finditer(r"\d+\.\d+", lines[place])]
        top = max((i + 1 for i in range(place) if not lines[i]), default=titles)  # below the title, or an empty line
        starts = [len("merged"), *(end for end, _ in cells)]
        heads = ["".join(line[a:b].strip() for line in lines[top:place]) for a, b in itertools.pairwise(starts)]
        seen |= {head: figure for head, (_, figure) in zip(heads, cells, strict=True) if head.startswith("task")}
    as_loss = {f"{task}(loss)": f"{scores[task]:.3f}" for task in of_losses}
    wanted = as_loss | {task: f"{score:.1f}" for task, score in scores.items() if task not in of_losses}
    assert {head.replace(" ", ""): figure for head, figure in seen.items()} == wanted


def test_points_with_long_settings_are_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "out", Console(width=80, highlight=False, markup=False))
    settings = {"lambda": {f"task_{i}": 0.1 * i for i in range(1, 9)}, "density": 0.25}
    scores = {f"task_{i}": 50.0 + i for i in range(1, 9)}
    show.points([Point(settings, scores)], dict.fromkeys(scores, "f1"))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert all(f"{score:.1f}" in text for score in scores.values())


def history(tasks: int, steps: int, name: str = "a_task_with_quite_a_long_name_indeed") -> History:
    signals = Signals(b"\1" * 56 + b"\0" * 8, 0.1, 0.1, 0.5, 0.3, 0.3)
    names = [f"{name}_{i}" for i in range(tasks)]
    made = History({task: [1.25] * steps for task in names}, kept=[0.5374] * steps, seconds=200.0)
    made.judged[0] = dict.fromkeys(names, signals)
    return made


@pytest.mark.parametrize("width", [50, 80, 120])
@pytest.mark.parametrize("tasks", [2, 40])
def test_the_live_lines_keep_every_figure(width: int, tasks: int) -> None:
    terminal = Console(width=width, height=24, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    terminal.print(steps_view(history(tasks, 1234), 200_000, 0.51, width, 24))
    lines = terminal.export_text().splitlines()
    assert max(map(cell_len, lines)) <= width
    assert len(lines) < 24
    text = words("\n".join(lines))
    assert "step 1234/200000 kept 53.74% 0.51 steps/s 6495 min 37 s left" in text
    of_tasks = [line for line in lines if "agrees" in line]
    assert len(of_tasks) == min(tasks, 18)
    assert all("1.250" in line and "agrees 87.5%" in line for line in of_tasks)
    assert tasks == 2 or "and 22 more tasks" in text


def test_stages_are_silent_in_a_pipe_but_for_long_ones(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with screen(), stage("Scoring", 100):
        for _ in range(100):
            now[0] += 1
            advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["Scoring: 30%, 1 min 10 s left", "Scoring: 60%, 40.0 s left", "Scoring: 90%, 10.0 s left"]


def test_steps_are_told_now_and_then_in_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    shown = Screen()
    for step in range(1, 101):
        now[0] += 1
        shown.step(history(3, step, "task"), 100)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1].rstrip(",") for line in lines] == [f"{n}/100" for n in (1, 6, 36, 66, 96, 100)]
    assert all("mean loss 1.250; agreement at step 0: mean 87.5%" in line for line in lines)


def test_a_collapse_is_told_once_when_it_is_seen() -> None:
    told: list[str] = []
    steps: list[int] = []
    step = telling_of_collapse(told.append, lambda history, total: steps.append(history.step))
    fine = Signals(b"\1" * 9 + b"\0", 0.1, 0.05, 0.5, 0.3, 0.3)
    seen = {
        0: fine,
        10: fine,
        20: replace(fine, largest=0.95, histogram=0.65),
        30: replace(fine, largest=1.0, histogram=0.7),
    }
    for number in range(1, 41):
        run = History({"a": [1.0] * number, "b": [1.0] * number})
        run.judged.update({at: {"a": signals, "b": fine} for at, signals in seen.items() if at <= number})
        step(run, 40)
        assert len(told) == (number >= 20)
    assert steps == list(range(1, 41))
    assert told[0].startswith("a has collapsed at step 20: it gives one class to 95% of its inputs (30% at the start")


def test_a_real_terminal_gets_live_progress_that_fits(zoo: Path) -> None:
    """The command itself, in a pseudo-terminal of 80 columns."""
    mine, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    environment.pop("COLUMNS", None)
    command = [sys.executable, "-m", "adarank", "merge", str(zoo / "adapted.yaml"), str(zoo / "live")]
    running = subprocess.Popen(command, stdout=its, stderr=its, stdin=its, env=environment)
    os.close(its)
    text = b""
    while True:
        try:
            part = os.read(mine, 1 << 16)
        except OSError:  # how Linux ends it
            break
        if not part:
            break
        text += part
    assert running.wait() == 0
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode()).replace("\r", "\n").splitlines()
    assert max(map(cell_len, lines)) <= 80
    joined = "\n".join(lines)
    assert re.search(r"(?m)^step 8/8 .*kept \d+\.\d\d% .*steps/s .* left", joined)
    assert all(re.search(rf"{task} .*agrees \d+\.\d%", joined) for task in TASKS)


def _json(*command: object) -> str:
    """What a command gives as JSON."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(io.StringIO()):
        assert main([*map(str, command), "--json"]) == 0
    return text.getvalue()
