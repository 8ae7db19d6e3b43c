"""Curves in trackers: every step and judgement once, also after an interruption; a tracker that lacks or fails costs no merge."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import adarank
from adarank.adapt.history import History
from adarank.errors import Interrupted, RecipeError
from text_zoo import ADAPT, TASKS, make_zoo, recipe

ADAPTED = {
    **ADAPT,
    "adapt": {"steps": 4, "batch_size": 4, "check_every": 2},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("tracking"))


@pytest.fixture
def zoo(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "zoo")


class Runs:
    """A module in the place of a tracker's: run -> step -> values; with the settings that a run was opened with."""

    def __init__(self) -> None:
        self.curves: dict[str, dict[int, dict[str, float]]] = {}
        self.opened: list[dict[str, Any]] = []
        self.ended = 0
        self.fails = False

    def init(self, **given: Any) -> Runs:
        self.opened.append(given)
        self.curves.setdefault(given["name"], {})
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        if self.fails:
            raise OSError("no way out")
        self.curves[self.opened[-1]["name"]].setdefault(step, {}).update(values)

    def finish(self) -> None:
        self.ended += 1


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Runs]:
    module, runs = ModuleType(request.param), Runs()
    module.__spec__ = ModuleSpec(request.param, None)
    for name in ("init", "log", "finish"):
        setattr(module, name, getattr(runs, name))
    monkeypatch.setitem(sys.modules, request.param, module)
    return request.param, runs


def curves_of(record: dict[str, Any]) -> dict[int, dict[str, float]]:
    """What a record says of each step."""
    of_loop = record["adaptation"]
    steps: dict[int, dict[str, float]] = {int(step): {} for step in of_loop["judged"]}
    for step, seen in of_loop["judged"].items():
        steps[int(step)] |= {f"agreement/{task}": signals["agreement"] for task, signals in seen.items()}
    for task, losses in of_loop["losses"].items():
        for step, loss in enumerate(losses, 1):
            steps.setdefault(step, {})[f"loss/{task}"] = loss
    return steps


def assert_as_recorded(curves: dict[int, dict[str, float]], record: dict[str, Any]) -> None:
    wanted = curves_of(record)
    assert sorted(curves) == sorted(wanted)
    for step, values in wanted.items():
        names = {name for name in curves[step] if name.split("/")[-1] in TASKS and not name.startswith("divergence")}
        assert names == set(values)
        assert {name: curves[step][name] for name in names} == pytest.approx(values, abs=1e-5)


def test_every_step_and_judgement_is_told_once(zoo: Path, tracker: tuple[str, Runs]) -> None:
    name, runs = tracker
    record = adarank.merge_recipe(recipe(zoo, **ADAPTED, report_to=name), zoo / "out")
    (curves,) = runs.curves.values()
    assert_as_recorded(curves, record)
    assert runs.ended == 1
    assert runs.opened[0]["config"]["settings"]["adapt"]["steps"] == 4
    assert next(iter(runs.curves)).startswith("out-")
    adarank.merge_recipe(recipe(zoo, **ADAPTED, report_to=[name]), zoo / "out", force=True)
    assert len(runs.curves) == 2  # another run, not more of the first


def test_an_interrupted_run_goes_on_in_its_curves(zoo: Path, tracker: tuple[str, Runs]) -> None:
    name, runs = tracker
    path = recipe(zoo, **ADAPTED, report_to=[name])

    def stop(history: History, steps: int) -> None:
        if history.step == 2:
            signal_self()

    with pytest.raises(Interrupted):
        adarank.merge_recipe(path, zoo / "out", progress=stop)
    record = adarank.merge_recipe(path, zoo / "out")
    (curves,) = runs.curves.values()
    assert_as_recorded(curves, record)
    assert [given["resume"] for given in runs.opened] == ["allow", "allow"]
    assert runs.ended == 2


def signal_self() -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGINT)


def test_a_tracker_that_fails_costs_no_merge(zoo: Path, tracker: tuple[str, Runs]) -> None:
    name, runs = tracker
    runs.fails = True
    notes: list[str] = []
    record = adarank.merge_recipe(recipe(zoo, **ADAPTED, report_to=[name]), zoo / "out", note=notes.append)
    assert record["adaptation"]["steps"] == 4
    assert [text for text in notes if "no way out" in text] == [f"{name} takes no more curves (OSError: no way out)."]


def test_weights_do_not_depend_on_trackers(zoo: Path, tracker: tuple[str, Runs]) -> None:
    tracked = adarank.merge_recipe(recipe(zoo, **ADAPTED, report_to=[tracker[0]]), zoo / "one")
    plain = adarank.merge_recipe(recipe(zoo, **ADAPTED), zoo / "two")
    assert tracked["files"]["model.safetensors"] == plain["files"]["model.safetensors"]
    assert adarank.verify(zoo / "one").ok
    assert len(tracker[1].curves) == 1  # merging again by the masks tells nobody


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_first(
    zoo: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adarank.workflow.track.find_spec", lambda package: None)
    notes: list[str] = []
    with pytest.raises(RecipeError, match=rf"report_to: {name} not installed.*adarank\[track\]"):
        adarank.merge_recipe(recipe(zoo, **ADAPTED, report_to=[name]), zoo / "out", note=notes.append)
    assert notes == []
    assert not (zoo / "out").exists()


def test_other_trackers_are_refused_by_name(zoo: Path) -> None:
    with pytest.raises(RecipeError, match="report_to"):
        adarank.load_recipe(recipe(zoo, **ADAPTED, report_to=["tensorbord"]))


def test_a_method_without_steps_has_no_curves(zoo: Path, tracker: tuple[str, Runs]) -> None:
    record = adarank.merge_recipe(recipe(zoo, report_to=[tracker[0]]), zoo / "out")
    assert any(text.startswith("report_to: ") for text in record["plan"]["notes"])
    assert tracker[1].opened == []
    assert json.loads((zoo / "out" / "adarank.json").read_text())["recipe"]["report_to"] == [tracker[0]]


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="no tensorboard")
def test_tensorboard_reads_the_curves(zoo: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = adarank.merge_recipe(recipe(zoo, **ADAPTED, report_to="tensorboard"), zoo / "out")
    (run,) = (zoo / "runs").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    curves: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            curves.setdefault(event.step, {})[name] = event.value
    assert_as_recorded(curves, record)
