"""Progress on stderr: of stages, of adaptation and of a search. On a terminal it is live; elsewhere there is a line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table as Grid
from rich.text import Text

from adarank.adapt.history import History
from adarank.cli import console
from adarank.cli.console import clock, recent, write
from adarank.io.progress import listening
from adarank.workflow.search import Point

PACED = 5  # steps after which the pace tells how long all will take
PLAIN_SECONDS = 30.0  # between two lines of one stage where there is no terminal


class Screen:
    """All progress of one command; one thing is live at a time."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._stage = ""
        self._live: Live | None = None
        self._said = self._began = time.monotonic()
        self._first = self._last = 0
        self._spent = 0.0
        self._best: Point | None = None

    def note(self, text: str) -> None:
        """A stage as it begins."""
        self.close()
        write(text, style="dim", console=console.err)

    def advance(self, what: str, done: float, total: float | None) -> None:
        """How far a stage is: a bar that goes when the stage ends."""
        if console.err.is_terminal:
            self._draw_bar(what, done, total)
        elif what != self._stage:
            self._stage = what
            self._said = self._began = time.monotonic()
        elif time.monotonic() - self._said >= PLAIN_SECONDS and done != total:
            self._said = time.monotonic()
            write(f"{what}: {self._plain(done, total)}", console=console.err)

    def _plain(self, done: float, total: float | None) -> str:
        """How far a stage is, in words, with the time that the rest takes at its pace."""
        if not total:
            return f"{done:g} done"
        left = (self._said - self._began) * (total - done) / done if done else 0.0
        return f"{100 * done / total:.0f}%" + (f", {clock(left)} left" if done else "")

    def step(self, history: History, steps: int) -> None:
        """A step of adaptation: on a terminal loss and last agreement per task, components kept, speed, time left."""
        if history.step <= self._last:  # another adaptation began
            self.close()
            self._first = 0
        self._last = history.step
        if self._first == 0:
            self._first, self._spent = history.step, history.seconds
        done = history.step - self._first
        speed = done / (history.seconds - self._spent) if done and history.seconds > self._spent else 0.0
        if console.err.is_terminal:
            self._draw_steps(history, steps, speed)
        elif history.step in (1, self._first + PACED, steps) or time.monotonic() - self._said >= PLAIN_SECONDS:
            self._said = time.monotonic()
            write(_plain_step(history, steps, speed), hang=2, console=console.err)

    def point(self, point: Point, done: int, total: int) -> None:
        """A point of a search: a line for each that beats all before it, and a bar."""
        if self._best is None or point.worth > self._best.worth:
            self._best = point
            settings = ", ".join(f"{name} {value}" for name, value in point.settings.items())
            mean = f"{point.mean:.3f}" if point.losses else f"{point.mean:.2f}%"
            write(f"point {done}/{total}: {settings}: mean {mean}", hang=2, style="dim", console=console.err)

    def close(self) -> None:
        """Take the bar away; leave the last state of an adaptation on the terminal."""
        if self._bar:
            self._bar.stop()
            self._bar = None
        if self._live:
            self._live.stop()
            self._live = None

    def _draw_bar(self, what: str, done: float, total: float | None) -> None:
        if self._live:
            return  # steps have a bar of their own
        if self._bar is None or what != self._stage:
            self.close()
            self._stage = what
            self._bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=20), TaskProgressColumn(),
                                 TimeRemainingColumn(), console=console.err, transient=True)  # fmt: skip
            self._task = self._bar.add_task(what, total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total)
        if done == total:
            self.close()

    def _draw_steps(self, history: History, steps: int, speed: float) -> None:
        if self._bar:
            self.close()
        view = steps_view(history, steps, speed, console.err.width, console.err.height)
        if self._live is None:
            self._live = Live(view, console=console.err, refresh_per_second=4)
            self._live.start()
        self._live.update(view)


@contextmanager
def screen() -> Iterator[Screen]:
    """Progress of a command while it runs."""
    shown = Screen()
    try:
        with listening(shown.advance):
            yield shown
    finally:
        shown.close()


def steps_view(history: History, steps: int, speed: float, width: int, height: int) -> Group:
    """What is live during adaptation. Where it is narrow the tasks' names are shortened, never a figure.

    Arguments:
        speed: steps per second; 0 if it is not known yet.
        width, height: of the terminal. Tasks that have no line are counted.
    """
    left = clock((steps - history.step) / speed) if speed else "…"
    line = Text(f"step {history.step}/{steps}{_kept(history, '  ')}  {speed:.2f} steps/s  {left} left")
    seen = history.judged[max(history.judged)] if history.judged else {}
    tasks = list(history.losses)
    most = max(1, height - 5)
    shown = tasks if len(tasks) <= most else tasks[: most - 1]
    grid = Grid(box=None, show_header=False, pad_edge=False)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    for _ in range(3):
        grid.add_column(no_wrap=True, justify="right")
    spark = max(0, min(24, width - 46))
    room = max(4, width - spark - 28)  # loss, agreement and gaps
    for task in shown:
        values = history.losses[task]
        agreement = f"agrees {100 * seen[task].agreement:.1f}%" if task in seen else ""
        grid.add_row(Text("  " + _short(task, room)), f"{recent(values):.3f}", _spark(values, spark), agreement)
    rest = [Text(f"  and {len(tasks) - len(shown)} more tasks")] if len(shown) < len(tasks) else []
    bar = Grid.grid()  # a bar by itself does not end its line
    bar.add_row(ProgressBar(total=steps, completed=history.step, width=min(60, width)))
    return Group(bar, line, grid, *rest)


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _plain_step(history: History, steps: int, speed: float) -> str:
    losses = [recent(values) for values in history.losses.values() if values]
    pace = f", {speed:.2f} steps/s, {clock((steps - history.step) / speed)} left" if speed else ""
    text = f"step {history.step}/{steps}{_kept(history, ', ')}{pace}"
    text += f"; mean loss {sum(losses) / len(losses):.3f}" if losses else ""
    if history.judged:
        step = max(history.judged)
        shares = {task: 100 * signals.agreement for task, signals in history.judged[step].items()}
        least = min(shares, key=lambda task: shares[task])
        mean = sum(shares.values()) / len(shares)
        text += f"; agreement at step {step}: mean {mean:.1f}%, least {least} {shares[least]:.1f}%"
    return text


def _kept(history: History, before: str) -> str:
    """Share of components kept, in words; nothing where there are none."""
    return f"{before}kept {100 * history.kept[-1]:.2f}%" if history.kept else ""


def _spark(values: list[float], width: int) -> str:
    """A line of blocks: the loss over time, each block the mean of its stretch, scaled to the highest."""
    count = min(width, len(values))
    means = [
        sum(part) / len(part)
        for i in range(count)
        if (part := values[i * len(values) // count : (i + 1) * len(values) // count])
    ]
    top = max(means, default=0) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * mean / top))] for mean in means)
