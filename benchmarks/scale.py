"""A merge and an adaptation by 1, 2 and 4 processes, and by a model of them that is carried on to 256.

    python benchmarks/scale.py --folder FOLDER [--processes 1 2 4] [--repeats 3] [--commands task_arithmetic ties_merging adarank]
    python benchmarks/scale.py --folder FOLDER --memory 512 [--by block] [--processes 1 2 4]

FOLDER is one that merge_speed.py has filled. Measured is the time of the processor of the busiest process (one thread each), which does not
depend on how many cores there are, nor on what else they do. The model has two constants of a command, fitted to one and to two processes:

    seconds(n) = alone + shared · share(n)

`alone` is what every process does for itself: start, headers, and in adaptation what it sends and receives; `share` is the largest part that one process has. Four processes check it. What is
exchanged is counted, not timed. The curves are of models of 8 to 400 billion parameters; nothing of that size was run.

With `--memory` measured is instead how much the process that holds most of several that adapt holds at its peak, beside what is
predicted: BERTs of this width with three tasks, which are made in FOLDER (any) and deleted after, RssAnon sampled every 20 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from adarank.cli.threads import wait_passively

wait_passively()  # before PyTorch is loaded

import yaml
from merge_memory import SAMPLE_SECONDS, anonymous, make_texts, recipe_of_texts
from merge_speed import recipe
from records import FOLDER, Records

from adarank.io.checkpoint import Checkpoint
from adarank.io.record import machine, versions
from adarank.io.writer import layout_bytes, planned_shards
from adarank.recipe.reader import load_recipe
from adarank.workflow import demo

STEPS, LAYERS = 12, 2
SHARD_BYTES = 70 * 10**6  # of a merge's output
RANKS = (8, 16, 32, 64, 128, 256)
MODELS = {
    "8 B": (8e9, 4096, 32, 7),
    "70 B": (70e9, 8192, 80, 7),
    "400 B": (400e9, 16384, 126, 7),
}  # parameters, width, layers, matrices of a layer
TASKS, BYTES = 8, 2
LINKS = {"1 GB/s": 1e9, "12.5 GB/s": 12.5e9, "100 GB/s": 100e9}


def started(count: int, arguments: list[str], folder: Path) -> list[subprocess.Popen[bytes]]:
    """`count` processes of one thread each that share a command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    several = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if count > 1 else {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **several}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # as installed: compiled
    command = [sys.executable, "-m", "adarank", *arguments, "--threads", "1"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return [
        subprocess.Popen(command, cwd=folder, env={**environment, "RANK": str(rank)}, **silent) for rank in range(count)
    ]


def seconds_of(count: int, arguments: list[str], folder: Path) -> float:
    """Seconds of the processor that the busiest of `count` processes takes for a command."""
    used = []
    for process in started(count, arguments, folder):
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(arguments)}: a process of {count} ended with {status}")
        used.append(usage.ru_utime + usage.ru_stime)
    return max(used)


def peak_of(count: int, arguments: list[str], folder: Path) -> int:
    """Bytes that the one of `count` processes holds at its peak that holds most, beside mapped files."""
    running, peak = started(count, arguments, folder), 0
    while any(process.poll() is None for process in running):
        peak = max(peak, *(anonymous(process.pid) or 0 for process in running))
        time.sleep(SAMPLE_SECONDS)
    if any(process.returncode for process in running):
        raise SystemExit(f"{' '.join(arguments)}: a process of {count} ended with an error")
    return peak


def peaks(folder: Path, width: int, by: str, counts: list[int]) -> dict[str, dict[str, int]]:
    """Count of processes -> peak of the one that holds most, and what is predicted for it."""
    table = {}
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        make_texts(place, width, LAYERS, seed=0)
        recipe_by = recipe_of_texts("adarank")
        recipe_by["adapt"] = {**recipe_by["adapt"], "by": by}
        (place / "recipe.yaml").write_text(yaml.safe_dump(recipe_by))
        for count in counts:
            peak = peak_of(count, ["merge", "recipe.yaml", f"out{count}", "--no-report"], place)
            predicted = json.loads((place / f"out{count}" / "adarank.json").read_text())["plan"]["peak_bytes"]
            table[str(count)] = {"peak_anonymous": peak, "peak_predicted": predicted}
            print(count, table[str(count)], flush=True)
    return table


def adaptation(folder: Path) -> Path:
    """A recipe of a few steps on demo-8."""
    content = load_recipe(demo.ZOO / "recipe.yaml").model_dump(mode="json", by_alias=True, exclude_unset=True)
    content["adapt"] = {"steps": STEPS, "keep": "last", "check_every": STEPS, "learn_heads": False}
    content["parameters"] = {"rank": 0.16, "lambda": 1.0}
    place = folder / "demo"
    place.mkdir(exist_ok=True)
    for file in demo.ZOO.iterdir():  # where the recipe's paths lead
        if file.is_dir() and not (place / file.name).exists():
            (place / file.name).symlink_to(file)
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def measured(name: str, folder: Path, counts: list[int], repeats: int) -> dict[str, float]:
    """Count of processes -> median seconds of the busiest one."""
    path = adaptation(folder) if name == "adarank" else recipe(folder, "task_arithmetic", name)
    shards = [] if name == "adarank" else ["--max-shard-size", f"{SHARD_BYTES // 10**6}MB"]
    runs: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(repeats):
        for count in counts:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                runs[count].append(
                    seconds_of(count, ["merge", str(path), f"{place}/out", *shards, "--no-report"], folder)
                )
    table = {str(count): round(median(of), 2) for count, of in runs.items()}
    print(name, table, flush=True)
    return table


def shares(name: str, folder: Path) -> dict[str, float]:
    """Count of processes -> the largest part that one of them has: of a merge's bytes as its files fall, of an adaptation an equal one."""
    if name == "adarank":
        return {"2": 1 / 2, "4": 1 / 4}
    tensors = Checkpoint(folder / "base").tensors
    layout = {tensor: (info.shape, info.dtype) for tensor, info in tensors.items()}
    sizes = [layout_bytes({t: layout[t] for t in shard.names}) for shard in planned_shards(layout, (), SHARD_BYTES)]
    return {str(n): max(sum(sizes[rank::n]) for rank in range(n)) / sum(sizes) for n in (2, 4)}


def model(table: dict[str, float], share: dict[str, float]) -> dict[str, float]:
    """`alone` and `shared` by what one and two processes took, and how far the model is from what four took."""
    shared = (table["1"] - table["2"]) / (1 - share["2"])
    fitted = {"alone": table["1"] - shared, "shared": shared, "share_2": share["2"], "share_4": share["4"]}
    if "4" in table:
        predicted = fitted["alone"] + shared * share["4"]
        fitted |= {"predicted_4": predicted, "measured_4": table["4"], "off": predicted / table["4"] - 1}
    return {key: round(value, 3) for key, value in fitted.items()}


def curve_of_merge(seconds_per_byte: float) -> list[str]:
    """Minutes that a data-free merge of a base and eight experts takes: the slower of computing and of the shared folder."""
    lines = []
    for name, (parameters, *_) in list(MODELS.items())[1:]:
        read, written = (TASKS + 1) * parameters * BYTES, parameters * BYTES
        for link, speed in LINKS.items():
            minutes = [max(seconds_per_byte * read / ranks, (read + written) / speed) / 60 for ranks in RANKS]
            lines.append(f"| {name} | {link} | " + " | ".join(f"{value:.1f}" for value in minutes) + " |")
    return lines


def curve_of_step() -> list[str]:
    """What a process of an adaptation holds, computes and exchanges in a step."""
    lines = []
    for name, (parameters, width, layers, matrices) in MODELS.items():
        components = layers * matrices * TASKS * width
        for ranks in (1, *RANKS[::2]):
            whole, shared = 2 * 4 * parameters, 4 * (1 + 2 * TASKS) * parameters / ranks
            products = 4 * TASKS * parameters * width / ranks  # compose and pull back
            sent = (2 * 4 * parameters + 2 * 4 * components) * (ranks - 1) / ranks  # weights, gradients, those of masks
            seconds = " | ".join(f"{sent / speed:.1f} s" for speed in LINKS.values())
            lines.append(f"| {name} | {ranks} | {whole / 1e9:.0f} + {shared / 1e9:.0f} GB | {products / 1e15:.2f} PFLOP | {sent / 1e9:.0f} GB | {seconds} |")  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--commands", nargs="+", default=["task_arithmetic", "ties_merging", "adarank"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=int, metavar="WIDTH", help="measure memory, of models of this width")
    parser.add_argument("--by", choices=["model", "block"], default="model", help="with --memory: how it adapts")
    parser.add_argument("--note", default="", help="kept in the record, such as what else the machine did")
    parser.add_argument("--records", type=Path, metavar="FILE", default=FOLDER / "costs.jsonl")
    options = parser.parse_args()
    folder, records = options.folder.resolve(), Records(options.records)
    if options.memory:
        by = " by block" * (options.by == "block")
        records.write(
            {
                "kind": "cost", "name": f"processes, memory{by}", "what": "peak anonymous memory of that of several adapting processes that holds most, PyTorch included, beside what is predicted",
                "command": f"python benchmarks/scale.py --folder FOLDER --memory {options.memory} --by {options.by}", "layers": LAYERS, "tasks": 3,
                "processes": peaks(folder, options.memory, options.by, options.processes), "note": options.note, "seed": 0, "versions": versions(), "machine": machine(),
            }
        )  # fmt: skip
        return
    size = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
    table: dict[str, dict[str, float]] = (records.first(kind="cost", name="processes") or {}).get("seconds", {})
    for name in options.commands:
        table[name] = measured(name, folder, options.processes, options.repeats)
    models = {name: model(of, shares(name, folder)) for name, of in table.items()}
    content: dict[str, Any] = {
        "kind": "cost", "name": "processes", "what": "seconds of the processor of the busiest of several processes, and the model fitted to them",
        "command": f"python benchmarks/scale.py --folder FOLDER --repeats {options.repeats}", "bytes_per_model": size, "steps": STEPS,
        "seconds": table, "model": models, "note": options.note, "seed": 0, "versions": versions(), "machine": machine(),
    }  # fmt: skip
    records.write(content)
    print(models)
    if "task_arithmetic" in models:
        print("\n".join(curve_of_merge(models["task_arithmetic"]["shared"] / (4 * size))))
    print("\n".join(curve_of_step()))


if __name__ == "__main__":
    main()
