"""Random kills (SIGKILL) over every command that writes.

    python benchmarks/kills.py [--kills 300] [--seed 0]

Half of them come at a random time, half at a random file operation of the run, so that the short moments count in which
outputs change places. After a kill the output's path must hold the whole old output or the whole new one, or nothing where
nothing was; the same command, repeated until it is not killed, must end with the bits of a run that was never killed, and
with nothing beside them.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from trials import State, counting, dying_at, fork, fresh, make_zoo, run, state


@dataclass
class Command:
    """A command that writes.

    Attributes:
        arguments: with {place} and {zoo} for the folder of the output and that of models and recipes.
        outputs: what it writes in {place}.
        old: recipe or command whose output lies there before; None if nothing does.
    """

    name: str
    arguments: tuple[str, ...]
    outputs: tuple[str, ...] = ("out",)
    old: str | None = None

    def at(self, zoo: Path, place: Path) -> list[str]:
        return [part.format(zoo=zoo, place=place) for part in self.arguments]


def _merge(name: str, old: str | None = None) -> Command:
    force = ("--force",) if old else ()
    return Command(f"merge {name}{f' --force over {old}' if old else ''}",
                   ("merge", f"{{zoo}}/{name}.yaml", "{place}/out", "--no-report", *force), old=old)  # fmt: skip


def _search(best: str, axis: str, force: bool = False) -> tuple[str, ...]:
    return ("search", "{place}/cart.yaml", f"{{place}}/{best}", "--over", axis, *(["--force"] if force else []))


_FOUND = ("best.yaml", "best.search.json")
COMMANDS = [
    *(_merge(name) for name in ("cart", "adarank", "emr", "surgery", "multitask", "regmean")),
    _merge("cart", old="task_arithmetic"),
    _merge("adarank", old="cart"),
    _merge("emr", old="cart"),
    Command("search", _search("best.yaml", "rank=0.1,0.5"), _FOUND),
    Command("search --force", _search("best.yaml", "rank=0.1,0.5", force=True), _FOUND, old="search"),
    Command("extract", ("extract", "{zoo}/bundle", "{place}/out", "--task", "mood")),
    Command("extract --force", ("extract", "{zoo}/bundle", "{place}/out", "--task", "mood", "--force"), old="cart"),
]


@dataclass
class Known:
    """What a command does when nobody kills it: seconds, file operations, and what it writes."""

    seconds: float
    operations: int
    old: dict[str, State | None]
    new: dict[str, State | None]


def prepare(command: Command, folder: Path, zoo: Path) -> Path:
    """A fresh place, with the old output if there is to be one."""
    place = fresh(folder / "place")
    if command.name.startswith("search"):
        shutil.copyfile(zoo / "cart.yaml", place / "cart.yaml")
        for name in ("models", "data"):
            (place / name).symlink_to(zoo / name)
    if command.old == "search":
        for name in _FOUND:
            shutil.copyfile(zoo / "old" / name, place / name)
    elif command.old:
        shutil.copytree(zoo / "old" / command.old, place / "out")
    return place


def measure(command: Command, folder: Path, zoo: Path) -> Known:
    """Run a command twice without a kill."""
    place = prepare(command, folder, zoo)
    old = outputs(command, place)
    seconds = run(command.at(zoo, place), folder / "said")
    new = outputs(command, place)
    place, report = prepare(command, folder, zoo), folder / "operations"
    report.unlink(missing_ok=True)
    code = fork(command.at(zoo, place), folder / "said", counting(place, report)).wait()
    assert code == 0
    assert outputs(command, place) == new, f"{command.name}: does not give the same bits twice"
    return Known(seconds, report.stat().st_size, old, new)


def outputs(command: Command, place: Path) -> dict[str, State | None]:
    """What lies where the command writes."""
    return {name: state(place / name) for name in command.outputs}


def strike(command: Command, known: Known, folder: Path, zoo: Path, draw: random.Random) -> Counter[str]:
    """Kill a command, up to three times in a row, then let it end; returns what happened."""
    place = prepare(command, folder, zoo)
    seen = Counter[str]()
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        by_time = draw.random() < 0.5
        number = draw.randint(1, known.operations)
        moment = draw.uniform(0, known.seconds)
        child = fork(command.at(zoo, place), folder / "said", None if by_time else dying_at(number, place))
        if by_time:
            time.sleep(moment)
        code = child.kill() if by_time else child.wait()
        case = f"{command.name}, killed at {f'{moment:.3f} s' if by_time else f'operation {number}'}: {child.said()}"
        assert code in (0, -9), case
        seen["killed" if code else "was done before"] += 1
        found = outputs(command, place)
        for name in command.outputs:
            assert found[name] in (known.old[name], known.new[name]), f"corrupt: {name}, {case}"
        if found == known.new and not command.old:
            break
    if command.old or found != known.new:
        run(command.at(zoo, place), folder / "said")
    assert outputs(command, place) == known.new, f"other bits than without a kill: {case}"
    if found != known.new or command.old:  # else a kill after the last rename may leave what the next run clears
        left = {path.name for path in place.iterdir()} - {*command.outputs, "cart.yaml", "models", "data"}
        assert not left, f"left behind: {left}, {case}"
    return seen


def kill_all(folder: Path, kills: int, seed: int, commands: list[Command] = COMMANDS) -> dict[str, Counter[str]]:
    """Kill the commands in turn until there were so many kills; command -> what happened."""
    zoo = make_zoo(folder / "zoo")
    run(["merge", str(zoo / "emr.yaml"), str(zoo / "bundle")], folder / "said")
    for name in ("cart", "task_arithmetic"):
        run(["merge", str(zoo / f"{name}.yaml"), str(zoo / "old" / name)], folder / "said")
    place = prepare(Command("search", ()), folder, zoo)
    run([part.format(place=place) for part in _search("best.yaml", "lambda=0.5,1.0")], folder / "said")
    for name in _FOUND:
        shutil.copyfile(place / name, zoo / "old" / name)
    known = {command.name: measure(command, folder, zoo) for command in commands}
    draw, ends = random.Random(seed), {command.name: Counter[str]() for command in commands}
    while sum(seen["killed"] for seen in ends.values()) < kills:
        for command in commands:
            ends[command.name] += strike(command, known[command.name], folder, zoo, draw)
        print(f"{sum(seen['killed'] for seen in ends.values())} kills so far", file=sys.stderr, flush=True)
    return ends


def main() -> None:
    """Strike as often as is asked for, and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="adarank-kills-") as folder:
        ends = kill_all(Path(folder), options.kills, options.seed)
    for name, seen in ends.items():
        print(f"{seen['killed']:5d}  {name}")
    print(f"{sum(seen['killed'] for seen in ends.values()):5d}  kills; corrupt: 0, other bits afterwards: 0")


if __name__ == "__main__":
    main()
