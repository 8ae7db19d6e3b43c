"""Seconds and memory of data-free merges beside mergekit and beside the copy that no merge can do without.

    python benchmarks/merge_speed.py --folder FOLDER --venv VENV [--gigabytes 0.4] [--methods linear task_arithmetic …]

All methods that both have are measured unless some are named. VENV is an environment with mergekit 0.1.5. FOLDER gets a Llama of seeded noise and three noisy copies in bfloat16, which stay there for the next
run. Every merge is the command line of its tool, on the same recipe file, in a process of one thread; copy, adarank and mergekit
take turns, so that what else the machine does is spread over all. `processor` is the time of the processor, user and system; `anonymous` the peak
of RssAnon, sampled every 20 ms. The copy reads all four models and writes one. adarank also hashes all that it reads and writes,
and checks that it is finite; mergekit does neither. The record is written anew after each method.

From bfloat16 models mergekit computes in bfloat16 and adarank in float32, so the timed outputs differ by roundings, and where whole entries
are kept or dropped by more. That both do the same is checked by one more merge of each, untimed, which computes and writes float32:
`apart` is of these, the largest difference of any tensor relative to its largest value. Methods that draw random numbers draw others in
either tool, and are not compared. Where the tools are apart by more than rounding, `from_float64` says how far each is from the formula in float64.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from adarank.cli.threads import wait_passively

wait_passively()  # before PyTorch is loaded

import torch
import yaml
from merge_memory import SAMPLE_SECONDS, anonymous
from mergekit_compare import difference
from records import FOLDER, Records, rounded
from transformers import LlamaConfig, LlamaForCausalLM

from adarank.io.checkpoint import Checkpoint
from adarank.io.record import machine, versions

EXPERTS = ("one", "two", "three")
SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16,
         "tie_word_embeddings": False}  # fmt: skip
VOCABULARY, SMALL_VOCABULARY = 32_000, 8_000  # the second below a quarter of a gigabyte
LAYER = 4 * 1024**2 + 3 * 1024 * 2816  # numbers
ALIKE = 1e-5  # two float32 merges are the same up to rounding
PARALLEL = 0.9995  # slerp goes straight between vectors of this cosine
RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.3},
    "task_arithmetic": {"weight": 0.3},
    "ties": {"weight": 0.5, "density": 0.5},
    "breadcrumbs": {"weight": 0.5, "density": 0.5, "gamma": 0.01},
    "breadcrumbs_ties": {"weight": 0.5, "density": 0.5, "gamma": 0.01},
    "model_stock": {},
    "sce": {"select_topk": 0.5},
    "ram": {"epsilon": 0.001},
    "ramplus_tl": {"epsilon": 0.001},
    "slerp": {"t": 0.3},
    "nuslerp": {"weight": 0.5},
    "multislerp": {"weight": 0.5},
    "karcher": {},
    "nearswap": {"t": 0.001},
    "arcee_fusion": {},
    "dare_linear": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "della_linear": {"weight": 0.5, "density": 0.5, "epsilon": 0.1},
    "della": {"weight": 0.5, "density": 0.5, "epsilon": 0.1},
}
PER_MODEL = ("weight", "density", "gamma")
TAKES = {"slerp": 1, "nearswap": 1, "arcee_fusion": 1, "nuslerp": 2}  # experts; the others take any number
WITHOUT_BASE = ("linear", "karcher")
RANDOM = ("dare_linear", "dare_ties", "della_linear", "della")
COPY = """
import pathlib, sys
out, *models = map(pathlib.Path, sys.argv[1:])
out.mkdir()
for model in models:
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as source, (out / file.name).open("ab") as target:
            while block := source.read(1 << 22):
                if model == models[0]:
                    target.write(block)
"""


def make_models(folder: Path, gigabytes: float) -> None:
    """base, one, two and three, unless they are there."""
    if (folder / EXPERTS[-1] / "config.json").exists():
        return
    vocabulary = SMALL_VOCABULARY if gigabytes < 0.25 else VOCABULARY
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * vocabulary * SHAPE["hidden_size"]) / LAYER))
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=vocabulary, num_hidden_layers=layers))
    for name in ("base", *EXPERTS):
        if name != "base":
            with torch.no_grad():
                for tensor in model.parameters():
                    tensor += 0.002 * torch.randn_like(tensor)
        model.to(torch.bfloat16).save_pretrained(folder / name)
        model.to(torch.float32)


def recipe(folder: Path, method: str, name: str = "", dtype: str = "bfloat16") -> Path:
    """A recipe that both tools read; `name`: of a method of adarank's alone, in its place."""
    settings = RECIPES[method]
    of_model = {key: value for key, value in settings.items() if key in PER_MODEL and not name}
    models: list[dict[str, Any]] = [
        {"model": expert, **({"parameters": of_model} if of_model else {})} for expert in EXPERTS[: TAKES.get(method)]
    ]
    models = [{"model": "base"}, *models] if method == "slerp" else models
    content = {"merge_method": name or method, "models": models, "dtype": dtype}
    if method not in WITHOUT_BASE:
        content["base_model"] = "base"
    if shared := {key: value for key, value in settings.items() if key not in PER_MODEL}:
        content["parameters"] = shared
    path = folder / f"{name or method}-{dtype}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def measured(command: list[str], folder: Path) -> dict[str, float]:
    """Seconds, seconds of the processor and peak anonymous bytes of a command."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # both tools start as installed ones do, compiled
    started = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    peak = [0]

    def watch() -> None:
        while (now := anonymous(process.pid)) is not None:
            peak[0] = max(peak[0], now)
            time.sleep(SAMPLE_SECONDS)

    threading.Thread(target=watch, daemon=True).start()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}")
    return {
        "seconds": time.perf_counter() - started,
        "processor": usage.ru_utime + usage.ru_stime,
        "anonymous": peak[0],
    }


def tools_of(folder: Path, method: str, venv: Path, dtype: str) -> dict[str, list[str]]:
    """Tool -> the command by which it merges, or copies."""
    file = recipe(folder, method, dtype=dtype).name
    ours = [sys.executable, "-m", "adarank", "merge", file, f"{method}-adarank", "--no-report", "--threads", "1"]
    theirs = [
        str(venv / "bin" / "mergekit-yaml"),
        file,
        f"{method}-mergekit",
        "--no-copy-tokenizer",
        "--no-write-model-card",
    ]
    models = ["base", *EXPERTS[: TAKES.get(method)]][method in WITHOUT_BASE :]
    return {"copy": [sys.executable, "-c", COPY, f"{method}-copy", *models], "adarank": ours, "mergekit": theirs}


def compared(folder: Path, method: str, venv: Path, repeats: int, check: bool) -> dict[str, Any]:
    """Every tool's runs, in turn, and (`check`) how far the two merges in float32 are from each other."""
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(repeats):
        for tool, command in tools_of(folder, method, venv, "bfloat16").items():
            shutil.rmtree(folder / f"{method}-{tool}", ignore_errors=True)
            runs.setdefault(tool, []).append(measured(command, folder))
    apart = {} if method in RANDOM or not check else checked(folder, method, venv)
    for tool in runs:
        shutil.rmtree(folder / f"{method}-{tool}", ignore_errors=True)
    table = {tool: {key: [run[key] for run in of] for key in of[0]} for tool, of in runs.items()}
    line = "  ".join(
        f"{tool} {median(of['processor']):.1f} s ({min(of['processor']):.1f}-{max(of['processor']):.1f}), "
        f"wall {median(of['seconds']):.1f}, {median(of['anonymous']) / 1e6:.0f} MB"
        for tool, of in table.items()
    )
    print(f"{method:16s} {line}  {apart or 'not compared'}", flush=True)
    return rounded({**table, **apart}, 3)


def checked(folder: Path, method: str, venv: Path) -> dict[str, Any]:
    """The difference of both tools' merges that compute and write float32, from the same bfloat16 models."""
    for tool, command in tools_of(folder, method, venv, "float32").items():
        if tool != "copy":
            shutil.rmtree(folder / f"{method}-{tool}", ignore_errors=True)
            measured(command, folder)
    merged = {tool: Checkpoint(folder / f"{method}-{tool}") for tool in ("adarank", "mergekit")}
    apart = difference(merged["adarank"], merged["mergekit"])
    if not (apart["same_names"] and apart["same_dtypes"]):
        raise SystemExit(f"{method}: the tools' tensors have other names or dtypes.")
    worst = apart["max_relative_difference"]
    if worst <= ALIKE or method != "slerp":
        return {"apart": worst}
    return {"apart": worst, "from_float64": {tool: from_slerp(folder, of) for tool, of in merged.items()}}


def from_slerp(folder: Path, merged: Checkpoint) -> float:
    """How far a merge is from slerp's formula in float64: the largest difference of any tensor, relative to its largest value."""
    base, other = Checkpoint(folder / "base"), Checkpoint(folder / EXPERTS[0])
    share, worst = RECIPES["slerp"]["t"], 0.0
    for name in merged.tensors:
        first, second = base.read(name).double(), other.read(name).double()
        cosine = (first / first.norm() * (second / second.norm())).sum().clamp(-1, 1)
        angle = cosine.acos()
        near = (1 - share, share) if cosine.abs() > PARALLEL else None
        ends = near or tuple((part * angle).sin() / angle.sin() for part in (1 - share, share))
        exact = ends[0] * first + ends[1] * second
        worst = max(worst, float((merged.read(name) - exact).abs().max() / exact.abs().max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--venv", type=Path, required=True, help="an environment with mergekit 0.1.5")
    parser.add_argument("--gigabytes", type=float, default=0.4, help="of each model")
    parser.add_argument("--methods", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--unchecked", action="store_true", help="leave the check in float32 to smaller models")
    parser.add_argument("--note", default="", help="kept in the record, such as what else the machine did")
    parser.add_argument("--records", type=Path, metavar="FILE", default=FOLDER / "costs.jsonl")
    options = parser.parse_args()
    folder = options.folder.resolve()
    make_models(folder, options.gigabytes)
    records = Records(options.records)
    name = f"merge speed, {options.gigabytes:g} GB"
    known = (records.first(kind="cost", name=name) or {}).get("methods", {})
    record = {
        "kind": "cost", "name": name, "what": "merging a base and three experts beside mergekit 0.1.5 and beside a copy, one thread each, in turn",
        "command": f"python benchmarks/merge_speed.py --folder FOLDER --venv VENV --gigabytes {options.gigabytes} --repeats {options.repeats}",
        "bytes_per_model": sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors")),
        "note": options.note, "seed": 0, "versions": versions(), "machine": machine(), "methods": known,
    }  # fmt: skip
    for method in options.methods:
        record["methods"][method] = compared(
            folder, method, options.venv.resolve(), options.repeats, not options.unchecked
        )
        records.write(record)


if __name__ == "__main__":
    main()
