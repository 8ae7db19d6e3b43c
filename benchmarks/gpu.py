"""AdaRank on a GPU beside the processor: the same results, and what a merge and an adaptation step take on each.

    python benchmarks/gpu.py [--steps 20] [--width 1024] [--threads 8]

On demo-8: data-free merges, and the first steps of the default adaptation from the same start, on both devices. On one matrix of
`width`² for each of eight tasks: decomposition, composition and the closed-form gradient of masks and λ. A difference is relative to a
tensor's largest value: of the matrices from the processor's float64, of the rest from its float32.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from adarank.cli.threads import wait_passively

wait_passively()  # before PyTorch is loaded

import torch
from records import FOLDER, Records
from torch import Tensor

from adarank.io.checkpoint import Checkpoint
from adarank.io.record import machine, versions
from adarank.methods import METHODS, Method, merge_tensors
from adarank.recipe.job import open_job
from adarank.recipe.reader import load_recipe, parse_recipe
from adarank.settings import parse
from adarank.spectral.blocks import task_vector_blocks
from adarank.workflow import demo
from adarank.workflow.merge import merge

DEVICES = ("cpu", "cuda")
DATA_FREE: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"lambda": 0.3},
    "ties_merging": {"lambda": 0.3},
    "cart": {"rank": 0.16, "lambda": 1.0},
    "tsv_m": {"lambda": 1.0},
    "iso_c": {"lambda": 1.0},
    "iso_cts": {"lambda": 1.0},
}
TASKS = 8


def seconds(run: Callable[[], Any], device: str, repeats: int) -> dict[str, float]:
    """Minimum, median and maximum of some runs after one that does not count."""
    found = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    own = found[1:]
    return {"min": min(own), "median": statistics.median(own), "max": max(own)}


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Largest difference of any tensor, relative to the tensor's largest value in `one`."""
    return max(
        float((one[n].double() - other[n].double().cpu()).abs().max() / one[n].double().abs().max().clamp(min=1e-30))
        for n in one
    )


def merges(repeats: int) -> dict[str, Any]:
    """Each data-free method on demo-8, as one file's worth of tensors in memory."""
    job, found = open_job(load_recipe(demo.ZOO / "recipe.yaml")), {}
    for name, settings in DATA_FREE.items():
        method = parse(METHODS[name], settings, name)

        def merged(device: str, method: Method = method) -> dict[str, Tensor]:
            return {tensor: own.cpu() for tensor, own in merge_tensors(method, job.network, device)}

        results = {device: merged(device) for device in DEVICES}
        found[name] = {
            "difference": difference(results["cpu"], results["cuda"]),
            **{f"seconds_{device}": seconds(partial(merged, device), device, repeats) for device in DEVICES},
        }
    return found


def adaptation(steps: int) -> dict[str, Any]:
    """The first steps of the default on demo-8: losses side by side, then merged weights and seconds per step."""
    recipe = load_recipe(demo.ZOO / "recipe.yaml")
    values = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    found: dict[str, Any] = {"steps": steps}
    losses, tensors = {}, {}
    for device in DEVICES:
        adapt = {"steps": steps, "check_every": steps, "keep": "last"}
        own = parse_recipe({**values, "adapt": adapt, "device": device, "out_dtype": "float32"}, recipe.folder)
        with tempfile.TemporaryDirectory() as folder:
            stamps: list[float] = []
            history: list[Any] = []

            def note(state: Any, _: int, stamps: list[float] = stamps, history: list[Any] = history) -> None:
                stamps.append(time.perf_counter())
                history[:] = [state]

            merge(own, Path(folder) / "out", progress=note)
            written = Checkpoint(Path(folder) / "out")
            tensors[device] = {name: written.read(name).float() for name in written.tensors}
        losses[device] = history[0].losses
        between = [after - before for before, after in pairwise(stamps)]
        found[f"seconds_per_step_{device}"] = {
            "min": min(between),
            "median": statistics.median(between),
            "max": max(between),
        }
    gaps = [
        [abs(a - b) for a, b in zip(losses["cpu"][task], losses["cuda"][task], strict=True)] for task in losses["cpu"]
    ]
    found["loss_difference_first_step"] = max(own[0] for own in gaps)
    found["loss_difference_largest"] = max(max(own) for own in gaps)
    found["weights_difference"] = difference(tensors["cpu"], tensors["cuda"])
    return found


def matrices(width: int, repeats: int) -> dict[str, Any]:
    """One square matrix of eight tasks: decompose, compose, and the gradient of masks and λ."""
    generator = torch.Generator().manual_seed(0)
    origin = torch.randn(width, width, generator=generator)
    deltas = {str(task): torch.randn(width, width, generator=generator) / width for task in range(TASKS)}
    grad, lam = torch.randn(width, width, generator=generator), torch.rand(TASKS, generator=generator)
    mask = torch.rand(TASKS * width, generator=generator)
    exact = task_vector_blocks(origin.double(), {task: delta.double() for task, delta in deltas.items()})
    wanted, slopes = exact.compose(lam.double(), mask.double()), exact.gradient(grad.double(), lam, mask, True)
    whole = origin.double() + sum(delta.double() for delta in deltas.values())
    ones, all_kept = torch.ones(TASKS), torch.ones(TASKS * width)
    found: dict[str, Any] = {"width": width, "tasks": TASKS}
    for device in DEVICES:
        start, slope = origin.to(device), grad.to(device)
        vectors = {task: delta.to(device) for task, delta in deltas.items()}
        u, s, v = (own.to(device, torch.float32) for own in (exact.u, exact.s, exact.v))
        blocks = replace(exact, origin=start, wholes=[None] * TASKS, u=u, s=s, v=v)
        gradient = blocks.gradient(slope, lam, mask, True)
        found[device] = {
            "spectra_difference": difference(
                {"w": whole}, {"w": task_vector_blocks(start, vectors).compose(ones, all_kept)}
            ),
            "compose_difference": difference({"w": wanted}, {"w": blocks.compose(lam, mask)}),
            "gradient_difference": difference(vars(slopes), vars(gradient)),
            "seconds": {
                "decompose": seconds(partial(task_vector_blocks, start, vectors), device, repeats),
                "compose": seconds(partial(blocks.compose, lam, mask), device, repeats),
                "gradient": seconds(partial(blocks.gradient, slope, lam, mask, True), device, repeats),
            },
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, metavar="FILE", default=FOLDER / "costs.jsonl")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=8)
    own = parser.parse_args()
    torch.set_num_threads(own.threads)
    content = {
        "kind": "cost",
        "name": "gpu",
        "what": "the same work on the processor and on a GPU",
        "command": f"python benchmarks/gpu.py --steps {own.steps} --width {own.width} --threads {own.threads}",
        "seed": 0,
        "versions": versions(),
        "machine": machine("cuda"),
        "matrices": matrices(own.width, own.repeats),
        "merges": merges(own.repeats),
        "adaptation": adaptation(own.steps),
    }
    Records(own.records).write(content)
    print(content)


if __name__ == "__main__":
    main()
