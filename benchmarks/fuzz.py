"""Thousands of damaged, odd and hostile files through the commands: every answer must be a result or a sentence.

    python benchmarks/fuzz.py [--first 0] [--count 10000] [--seed 0] [--only KIND] [--log FILE]

Case i is decided by (seed, i), so a range can be run again, or continued, alone. A case takes the inputs of its kind (tiny models,
data, recipes, outputs), changes a file of them, and calls what reads it. It fails if anything but an `AdaRankError` is raised, if it
takes longer than 20 seconds, if a file outside of the output is made, changed or removed, if something is left where an output was
refused, or if a connection or a process is opened. Exit code 1 if a case fails.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"  # a case that asks the network would wait for it
import fuzz_mutations as mutations
import torch

from adarank.cli.main import parser
from adarank.errors import AdaRankError, Interrupted

SECONDS = 20
# Event -> which of its arguments are paths, and which the numbers of the folders that these count from.
FOLDERS = {"os.remove": {0: 1}, "os.rmdir": {0: 1}, "os.mkdir": {0: 2}, "os.rename": {0: 2, 1: 3}, "os.link": {1: 3}, "os.symlink": {1: 2},
           "os.chmod": {0: 2}, "os.chown": {0: 3}, "os.truncate": {0: 0}}  # fmt: skip
MEMORY = 12 * 2**30  # address space: what asks for more is to be refused in a sentence
ENDS = {".safetensors": mutations.mutated_safetensors, ".json": mutations.mutated_json, ".yaml": mutations.mutated_yaml, ".bin": mutations.mutated_pickle,
        ".pt": mutations.mutated_pickle, ".npz": mutations.mutated_arrays, ".jsonl": mutations.mutated_bytes, ".parquet": mutations.mutated_bytes}  # fmt: skip


class Hang(BaseException):
    """A case took longer than it may."""


@dataclass
class Kind:
    """Inputs in a folder, the files of them that are changed, and what is called then.

    Attributes:
        files: patterns of the files to change.
        calls: each is given the folder; one is chosen.
        made: files that are no change of one that is there: name -> maker.
    """

    name: str
    make: Callable[[Path], object]
    files: tuple[str, ...]
    calls: tuple[Callable[[Path], object], ...]
    made: Mapping[str, Callable[[random.Random], bytes]] = field(default_factory=dict)


@dataclass
class Watch:
    """What the process opens, by Python's audit hook: connections, processes, and files to write that lie outside of `allowed`."""

    allowed: tuple[str, ...] = ()
    events: list[str] = field(default_factory=list)
    on: bool = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in (
            "socket.connect",
            "socket.getaddrinfo",
            "subprocess.Popen",
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "os.fork",
        ):
            self.events.append(f"{event} {arguments[:2]!r}")
        elif event == "open":
            path, mode, flags = arguments
            writes = (
                any(letter in mode for letter in "wax+") if mode else bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
            )
            if writes:
                self._path(event, path)
        elif event in FOLDERS:
            for path, folder in FOLDERS[event].items():
                self._path(event, arguments[path], arguments[folder] if folder else -1)

    def _path(self, event: str, path: Any, folder: Any = -1) -> None:
        """A path of an event, counted from a folder that is given by its number."""
        if isinstance(path, int) or path is None:
            return
        place = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else ""
        given = os.path.join(place, os.fsdecode(path))
        follows = event in ("open", "os.truncate", "os.chmod", "os.chown")  # the others are about a link itself
        full = (
            os.path.realpath(given)
            if follows
            else os.path.join(os.path.realpath(os.path.dirname(given) or "."), os.path.basename(given))
        )
        if not full.startswith(self.allowed):
            self.events.append(f"{event} {full}")


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every file and folder -> mode, size, time of its last change."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            stat = os.lstat(os.path.join(place, name))
            found[os.path.join(place, name)] = (stat.st_mode, stat.st_size, stat.st_mtime_ns)
    return found


class Bed:
    """The inputs of a kind, restored after each case."""

    def __init__(self, root: Path, kind: Kind) -> None:
        self.kind, self.root = kind, root
        self.inputs, self.out = root / "inputs", root / "results"
        self.inputs.mkdir(parents=True)
        kind.make(self.inputs)
        self.pristine = root / "pristine"
        shutil.copytree(self.inputs, self.pristine, symlinks=True)
        self.files = sorted({f for pattern in kind.files for f in self.inputs.glob(pattern)})
        assert self.files or kind.made, kind.name

    def prepare(self, rng: random.Random) -> str:
        """Change the inputs; returns what was changed."""
        self.out.mkdir()
        changed = []
        for _ in range(rng.choice([1, 1, 1, 2])):
            if self.kind.made and (not self.files or rng.random() < 0.5):
                name = rng.choice(list(self.kind.made))
                remove(self.inputs / name)
                (self.inputs / name).write_bytes(self.kind.made[name](rng))
            else:
                file = rng.choice(self.files)
                name = str(file.relative_to(self.inputs))
                if rng.random() < 0.02:
                    displaced(rng, file)
                elif file.is_file():
                    mutate = ENDS.get(file.suffix) or mutations.mutated_bytes
                    if file.suffix in (".tsv", ".csv"):
                        separator = "\t" if file.suffix == ".tsv" else ","
                        mutate = lambda rng, content, by=separator: mutations.mutated_table(rng, by, content)  # noqa: E731
                    file.write_bytes(changed_bytes(mutate, rng, file.read_bytes()))
            changed.append(name)
        return ", ".join(changed)

    def restore(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.rmtree(self.inputs)
        shutil.copytree(self.pristine, self.inputs, symlinks=True)


def changed_bytes(mutate: Callable[[random.Random, bytes], bytes], rng: random.Random, content: bytes) -> bytes:
    """A mutation; of bytes alone where an earlier one left nothing that could be taken apart."""
    try:
        return mutate(rng, content)
    except Exception:  # the mutation's, of a file that was changed before
        return mutations.mutated_bytes(rng, content)


def remove(file: Path) -> None:
    """Whatever is there."""
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)


def displaced(rng: random.Random, file: Path) -> None:
    """Something else in the file's place: a folder, nothing, an empty file, a broken link, itself."""
    remove(file)
    kind = rng.randrange(5)
    if kind == 0:
        file.mkdir()
    elif kind == 1:
        file.touch()
    elif kind in (2, 3):
        file.symlink_to(file if kind == 2 else file.with_name("nowhere"))


def run_case(bed: Bed, watch: Watch, rng: random.Random) -> tuple[str, str]:
    """(what happened, details): `result`, `sentence`, or what is wrong."""
    what = bed.prepare(rng)
    call = rng.choice(bed.kind.calls)
    before = {path: own for path, own in snapshot(bed.root).items() if not path.startswith(str(bed.out))}
    watch.allowed, watch.events, watch.on = (str(bed.out.resolve()), f"/proc/{os.getpid()}/", "/dev/null"), [], True
    end, text = "result", ""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            call(bed.root)
    except Interrupted:
        end = "interrupted"
    except AdaRankError as error:
        end, text = "sentence", str(error)
    except Hang:
        end, text = "hang", traceback.format_exc()
    except (Exception, SystemExit, KeyboardInterrupt):
        end, text = "traceback", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        watch.on = False
    after = {path: own for path, own in snapshot(bed.root).items() if not path.startswith(str(bed.out))}
    touched = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    if end in ("result", "sentence") and (touched or watch.events):
        end, text = "touched", "\n".join([*touched, *watch.events])
    left = [own.name for own in bed.out.iterdir() if not own.name.endswith((".lock", ".state", "kept"))]
    if end == "sentence" and left:
        end, text = "left", f"{left}\n{text}"
    return end, f"{what}: {text}"


def place_of(text: str) -> str:
    """The kind of a failure: its exception and the last lines of adarank that it passed through."""
    lines = text.strip().splitlines() or [""]
    frames = [line.strip() for line in lines if "/adarank/" in line]

    last = next(
        (own for own in reversed(lines) if re.match(r"[\w.]+(Error|Exception|Warning|Hang|Exit|Interrupt)\b", own)),
        lines[-1],
    )
    return f"{last[:110]} | {' < '.join(frames[-1:])}"


def run(first: int, count: int, seed: int, only: str = "", log: Path | None = None) -> dict[str, Any]:
    """Run a range of cases; returns counts, and every failure."""
    from fuzz_kinds import KINDS

    kinds = [kind for kind in KINDS if only in ("", kind.name)]
    watch, beds, failures = Watch(), {}, []
    sys.addaudithook(watch)
    counts: Counter[tuple[str, str]] = Counter()
    seconds: Counter[str] = Counter()
    longest = 0.0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder, alarm():
        for number in range(first, first + count):
            rng = random.Random(f"{seed}/{number}")
            kind = kinds[number % len(kinds)]
            if kind.name not in beds:
                beds[kind.name] = Bed(Path(folder) / kind.name, kind)
            started = time.perf_counter()
            torch.manual_seed(0)
            end, text = run_case(beds[kind.name], watch, rng)
            taken = time.perf_counter() - started
            seconds[kind.name] += taken
            longest = max(longest, taken)
            beds[kind.name].restore()
            counts[kind.name, end] += 1
            if end in ("traceback", "hang", "touched", "left"):
                failures.append({"case": number, "kind": kind.name, "end": end, "place": place_of(text), "text": text})
                if log:
                    with log.open("a") as handle:
                        handle.write(json.dumps(failures[-1]) + "\n")
    return {"counts": counts, "failures": failures, "seconds": seconds, "longest": longest}


@contextlib.contextmanager
def alarm() -> Iterator[None]:
    """Cases that take too long are interrupted, and memory is bounded."""

    def raised(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, raised)
    bound = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, bound[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, bound)
        signal.signal(signal.SIGALRM, before)


def command(*arguments: str) -> Callable[[Path], object]:
    """A call of the command line's function, paths counted from the case's folder."""

    def call(root: Path) -> object:
        before = Path.cwd()
        os.chdir(root / "inputs")
        try:
            options = parser().parse_args(list(arguments))
            return options.run(options)
        finally:
            os.chdir(before)

    return call


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("first", 0), ("count", 10_000), ("seed", 0)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--only", default="", help="one kind of files, such as headers")
    options.add_argument("--log", type=Path, help="file that failures are added to, a line of JSON each")
    given = options.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    faulthandler.enable()
    sys.dont_write_bytecode = True
    found = run(given.first, given.count, given.seed, given.only, given.log)
    for (kind, end), count in sorted(found["counts"].items()):
        print(
            f"{kind:12} {end:12} {count:6}   {1000 * found['seconds'][kind] / sum(n for (k, _), n in found['counts'].items() if k == kind):.0f} ms"
        )
    for place, count in Counter(own["place"] for own in found["failures"]).most_common():
        cases = [str(own["case"]) for own in found["failures"] if own["place"] == place]
        print(f"{count:5} × {place}   cases {', '.join(cases[:4])}")
    print(f"{given.count} cases, {len(found['failures'])} failures, longest {found['longest']:.1f} s")
    return int(bool(found["failures"]))


if __name__ == "__main__":
    sys.exit(main())
