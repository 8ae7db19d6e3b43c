"""Curves of a merge that adapts or trains, to the trackers that a recipe names: TensorBoard, Weights & Biases, Trackio.

Losses come after every step, agreement with the experts where it is judged. What a run is called is kept beside its state, so
that an interrupted run goes on in the same curves.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from adarank.adapt.history import History, Progress
from adarank.errors import RecipeError
from adarank.io.files import read_json
from adarank.io.record import Note
from adarank.io.writer import write_json

_RUN = "tracked.json"
_PROJECT = "adarank"


class Tracker(Protocol):
    """Where curves go."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Values of a step, the later the higher."""

    def finish(self) -> None:
        """Nothing more comes."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        RecipeError: some are not; all are named.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise RecipeError(
            f"report_to: {', '.join(missing)} not installed. Install it (pip install {' '.join(missing)}; pip install "
            "'adarank[track]' for all trackers), or leave it out of the recipe."
        )


@contextmanager
def tracked(
    names: Sequence[str], out: Path, state: Path, about: Mapping[str, Any], note: Note, progress: Progress | None
) -> Iterator[Progress | None]:
    """Progress that tells the trackers, too. Their runs end with the block.

    Arguments:
        names: of the trackers; without any, progress is given back as it is.
        out: the output: runs are called after it, and TensorBoard's files lie in `runs/` beside it.
        state: the folder of the run's state.
        about: settings that the trackers show beside the curves.
    """
    if not names:
        yield progress
        return
    telling = _Telling(names, out, state, about, note, progress)
    try:
        yield telling.step
    finally:
        telling.finish()


@dataclass
class _Telling:
    names: Sequence[str]
    out: Path
    state: Path
    about: Mapping[str, Any]
    note: Note
    progress: Progress | None
    trackers: dict[str, Tracker] = field(default_factory=dict)
    loops: int = 0  # that have begun: a method may adapt its start before it trains
    last: int = 0

    def step(self, history: History, steps: int) -> None:
        """Tell what a step gave, and what was judged before the first and at it."""
        now = history.step
        if self.loops == 0 or now <= self.last:
            self._open(now)
        if now == 1 and 0 in history.judged:
            self._tell(_judged(history, 0), 0)
        self._tell({**_losses(history), **_judged(history, now)}, now)
        self.last = now
        if self.progress is not None:
            self.progress(history, steps)

    def finish(self) -> None:
        """End the runs."""
        for name, tracker in list(self.trackers.items()):
            self._try(name, tracker.finish)
        self.trackers.clear()

    def _open(self, step: int) -> None:
        self.finish()
        self.loops += 1
        run = self._run()
        for name in self.names:
            self._try(name, partial(self._begin, name, run, step))

    def _begin(self, name: str, run: str, step: int) -> None:
        self.trackers[name] = _OPEN[name](run, self.out, self.about, step)

    def _run(self) -> str:
        """What the run is called: the output's name and what tells it from others of that name."""
        content = read_json(self.state / _RUN)
        mark = content.get("mark")
        if not isinstance(mark, str):
            mark = secrets.token_hex(4)
            self.state.mkdir(parents=True, exist_ok=True)
            write_json(self.state / _RUN, {"mark": mark})
        return f"{self.out.name}-{mark}" + (f"-{self.loops}" if self.loops > 1 else "")

    def _tell(self, values: Mapping[str, float], step: int) -> None:
        for name, tracker in list(self.trackers.items()):
            self._try(name, partial(tracker.log, values, step))

    def _try(self, name: str, call: Callable[[], Any]) -> None:
        """A tracker that fails is left out from there on: curves are no reason to lose a merge."""
        try:
            call()
        except Exception as error:  # whatever a tracker raises
            self.trackers.pop(name, None)
            self.note(f"{name} takes no more curves ({type(error).__name__}: {' '.join(str(error).split())[:200]}).")


def _losses(history: History) -> dict[str, float]:
    losses = {task: values[-1] for task, values in history.losses.items()}
    kept = {"components_kept": history.kept[-1]} if history.kept else {}
    return {"loss/mean": sum(losses.values()) / len(losses), **{f"loss/{t}": v for t, v in losses.items()}, **kept}


def _judged(history: History, step: int) -> dict[str, float]:
    seen = history.judged.get(step, {})
    if not seen:
        return {}
    values = {f"agreement/{task}": signals.agreement for task, signals in seen.items()}
    mean = sum(values.values()) / len(values)
    return {"agreement/mean": mean, **values, **{f"divergence/{t}": signals.divergence for t, signals in seen.items()}}


class _TensorBoard:
    def __init__(self, run: str, out: Path, about: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place = os.environ.get("TENSORBOARD_LOGGING_DIR") or out.parent / "runs"
        self._writer = SummaryWriter(str(Path(place) / run), purge_step=step if step > 1 else None)
        self._writer.add_text("settings", f"```\n{json.dumps(about, indent=1)}\n```", 0)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, run: str, out: Path, about: Mapping[str, Any], step: int) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT") or _PROJECT
        self._run = wandb.init(project=project, name=run, id=run, config=dict(about), resume="allow")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def finish(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, run: str, out: Path, about: Mapping[str, Any], step: int) -> None:
        import trackio

        self._trackio = trackio
        project = os.environ.get("TRACKIO_PROJECT") or _PROJECT
        trackio.init(project=project, name=run, config=dict(about), resume="allow")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def finish(self) -> None:
        self._trackio.finish()


_OPEN: Mapping[str, Callable[[str, Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "trackio": _Trackio,
}
