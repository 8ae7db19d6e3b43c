"""Progress for the terminal, on stderr: of adaptation and of a search."""

from __future__ import annotations

import sys

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table as Grid
from rich.text import Text

from adarank.adapt.history import History
from adarank.cli.console import clock, err, recent
from adarank.workflow.search import Point


class Searching:
    """Progress of a search on stderr: a line for each point that beats all before it, and a bar."""

    def __enter__(self) -> Searching:
        self._best: Point | None = None
        self._bar = Progress(TextColumn("searching"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                             console=err, disable=not err.is_terminal)  # fmt: skip
        self._task = self._bar.add_task("", total=None)
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self, point: Point, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)
        if self._best is None or point.worth > self._best.worth:
            self._best = point
            settings = ", ".join(f"{name} {value}" for name, value in point.settings.items())
            err.print(f"point {done}/{total}: {settings}: mean {point.mean:.2f}", style="dim")


class Adapting:
    """Live progress of adaptation on stderr: loss and last agreement per task, components kept, speed, time left."""

    def __init__(self) -> None:
        self._live: Live | None = None
        self._first = self._last = 0
        self._spent = 0.0

    def __call__(self, history: History, steps: int) -> None:
        if history.step <= self._last:  # another adaptation began
            self.close()
            self._first = 0
        self._last = history.step
        if self._first == 0:
            self._first, self._spent = history.step, history.seconds
        done = history.step - self._first
        speed = done / (history.seconds - self._spent) if done and history.seconds > self._spent else 0.0
        if err.is_terminal:
            self._draw(history, steps, speed)
        elif history.step in (1, steps) or history.step % max(1, steps // 10) == 0:
            losses = ", ".join(f"{task} {values[-1]:.3f}" for task, values in history.losses.items())
            print(
                f"step {history.step}/{steps}{_kept(history, ', ')}, {speed:.2f} steps/s; loss: {losses}"
                + _last_check(history),
                file=sys.stderr,
            )

    def close(self) -> None:
        """Leave the last state on the terminal."""
        if self._live:
            self._live.stop()
            self._live = None

    def _draw(self, history: History, steps: int, speed: float) -> None:
        left = clock((steps - history.step) / speed) if speed else "…"
        line = Text(f"step {history.step}/{steps}{_kept(history, '  ')}  {speed:.2f} steps/s  {left} left")
        grid = Grid(box=None, show_header=False, pad_edge=False)
        seen = history.judged[max(history.judged)] if history.judged else {}
        for task, values in history.losses.items():
            agreement = f"agrees {100 * seen[task].agreement:.1f}%" if task in seen else ""
            grid.add_row(f"  {task}", f"{recent(values):.3f}", _spark(values), agreement)
        view = Group(ProgressBar(total=steps, completed=history.step, width=60), line, grid)
        if self._live is None:
            self._live = Live(view, console=err, refresh_per_second=4)
            self._live.start()
        self._live.update(view)


def _kept(history: History, before: str) -> str:
    """Share of components kept, in words; nothing where there are none."""
    return f"{before}kept {100 * history.kept[-1]:.2f}%" if history.kept else ""


def _last_check(history: History) -> str:
    """Agreement with the experts where the weights were judged last, in words; nothing before that."""
    if not history.judged:
        return ""
    step = max(history.judged)
    parts = ", ".join(f"{task} {100 * signals.agreement:.1f}%" for task, signals in history.judged[step].items())
    return f"; agreement at step {step}: {parts}"


def _spark(values: list[float], width: int = 24) -> str:
    """A line of blocks: the loss over time, each block the mean of its stretch, scaled to the highest."""
    if not values:
        return ""
    count = min(width, len(values))
    means = [
        sum(part) / len(part)
        for i in range(count)
        if (part := values[i * len(values) // count : (i + 1) * len(values) // count])
    ]
    top = max(means) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * mean / top))] for mean in means)
