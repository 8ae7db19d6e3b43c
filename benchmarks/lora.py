"""Merging LoRA adapters over a model of half a billion parameters: peak memory, and time beside task vectors made dense.

    python benchmarks/lora.py --folder FOLDER [--methods cart tsv_m] [--layers 2]

FOLDER gets a base of Qwen2-0.5B's shapes (24 layers, bfloat16, 1 GB, seeded noise), adapters of rank 16 over all its matrices,
and the merged models; all is deleted after. The whole model is merged by factors alone. Both ways are compared on its first
layers, without the embeddings, as a dense SVD of every matrix takes minutes a layer: by turns, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adarank.cli.threads import wait_passively

wait_passively()  # before PyTorch is loaded

import torch
from merge_memory import watch
from records import FOLDER, Records
from torch import Tensor

from adarank.io.adapted import Adapted
from adarank.io.record import machine, versions
from adarank.io.writer import Layout, layout_bytes, write_checkpoint, write_json, write_tensors
from adarank.workflow.merge import merge

LAYERS, HIDDEN, INNER, KEYS, VOCABULARY = 24, 896, 4864, 128, 151_936
SIDES = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN), "self_attn.v_proj": (KEYS, HIDDEN),
         "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
         "mlp.down_proj": (HIDDEN, INNER)}  # fmt: skip


def layout(layers: int, whole: bool) -> Layout:
    """Names and shapes of Qwen2-0.5B; `whole`: with its embeddings."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)} if whole else {}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": sides for name, sides in SIDES.items()}
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (HIDDEN,)
    return {name: (shape, torch.bfloat16) for name, shape in shapes.items()}


def noise(of: Layout) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, (shape, dtype) in of.items():
        yield name, (torch.randn(shape, generator=generator) * 0.02).to(dtype)


def make(folder: Path, layers: int, whole: bool, adapters: int, rank: int) -> int:
    """A base, adapters over it and a recipe for each way; returns the base's bytes."""
    of = layout(layers, whole)
    (folder / "base").mkdir(parents=True)
    write_checkpoint(folder / "base", of, noise(of))
    for number in range(adapters):
        generator = torch.Generator().manual_seed(1 + number)
        tensors = {}
        for name, (shape, _) in of.items():
            if name.endswith("_proj.weight"):
                stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
                tensors[f"{stem}A.weight"] = torch.randn(rank, shape[1], generator=generator) * 0.02
                tensors[f"{stem}B.weight"] = torch.randn(shape[0], rank, generator=generator) * 0.02
        (folder / f"adapter-{number}").mkdir()
        write_tensors(folder / f"adapter-{number}" / "adapter_model.safetensors", tensors, {"format": "pt"})
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": "base"}
        write_json(folder / f"adapter-{number}" / "adapter_config.json", config)
    return layout_bytes(of)


def worker(folder: Path, method: str, dense: bool, adapters: int) -> dict[str, Any]:
    """Merge in this process; `dense`: with nothing known of factors."""
    if dense:
        Adapted.change_rank = lambda self, name, start, stored: None  # type: ignore[method-assign]
    models = [{"model": str(folder / f"adapter-{number}")} for number in range(adapters)]
    values = {"merge_method": method, "base_model": str(folder / "base"), "models": models, "device": "cpu"}
    started = time.perf_counter()
    record = merge(values, folder / "out")
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 2), "peak_resident_with_mapped_files": record["peak_resident_bytes"]}


def measure(arguments: argparse.Namespace, folder: Path, method: str, dense: bool) -> dict[str, Any]:
    command = [
        sys.executable,
        __file__,
        "--folder",
        str(folder),
        "--adapters",
        str(arguments.adapters),
        "--worker",
        method,
    ]
    said, peak = watch([*command, *(["--dense"] if dense else [])])
    shutil.rmtree(folder / "out")
    return {**said, "peak_anonymous": peak}


def run(arguments: argparse.Namespace) -> None:
    record: dict[str, Any] = {
        "kind": "cost",
        "name": "adapters",
        "what": f"merging {arguments.adapters} LoRA adapters of rank {arguments.rank} over a model of 0.5 billion parameters, one thread",
        "command": f"python benchmarks/lora.py --folder FOLDER --methods {' '.join(arguments.methods)} --layers {arguments.layers}",
        "note": arguments.note,
        "seed": 0,
        "versions": versions(),
        "machine": machine(),
        "methods": {method: {} for method in arguments.methods},
    }
    whole, part = (arguments.folder.resolve() / name for name in ("whole", "part"))
    try:
        record["base_bytes"] = make(whole, LAYERS, True, arguments.adapters, arguments.rank)
        for method in arguments.methods:
            record["methods"][method]["whole model"] = of = measure(arguments, whole, method, dense=False)
            held, mapped = (of[key] / 1e9 for key in ("peak_anonymous", "peak_resident_with_mapped_files"))
            print(f"{method}: {of['seconds']} s, peak {held:.2f} GB, {mapped:.2f} with mapped files", flush=True)
        shutil.rmtree(whole)
        make(part, arguments.layers, False, arguments.adapters, arguments.rank)
        for method in arguments.methods:
            runs: dict[str, list[float]] = {"factors": [], "dense": []}
            for way in ("factors", "dense") * arguments.repeats:
                runs[way].append(measure(arguments, part, method, dense=way == "dense")["seconds"])
            ratio = min(runs["dense"]) / min(runs["factors"])
            record["methods"][method] |= {f"seconds of {arguments.layers} layers": runs, "ratio": round(ratio, 1)}
            print(f"{method}: {runs}, {ratio:.1f} times", flush=True)
        Records(arguments.records).write(record)
    finally:
        for folder in (whole, part):
            shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for inputs and outputs; about 2.5 GB")
    parser.add_argument("--methods", nargs="+", default=["cart", "tsv_m"])
    parser.add_argument("--layers", type=int, default=2, help="on which both ways are compared")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--note", default="", help="kept in the record, such as what else the machine did")
    parser.add_argument("--records", type=Path, metavar="FILE", default=FOLDER / "costs.jsonl")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--dense", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        print(json.dumps(worker(arguments.folder, arguments.worker, arguments.dense, arguments.adapters)))
    else:
        run(arguments)


if __name__ == "__main__":
    sys.exit(main())
