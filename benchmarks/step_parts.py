"""What a step of adaptation takes beside the networks alone: composing the merged weights, and pulling their gradients back.

    python benchmarks/step_parts.py [--repeats 5] [--records FILE]

Of demo-8 as it is, and of MiniLM's shapes (6 layers of 384, 8 tasks, batches of 16 inputs of 32 tokens) with random components, as what a step takes depends on
shapes alone. One thread; every part is timed by the processor's time of this process, the parts in turn, after a round that does not count. The networks alone are each
task's forward and backward pass. Both precisions of the products are measured on the same blocks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from adarank.cli.threads import wait_passively

wait_passively()  # before PyTorch is loaded

import torch
from records import FOLDER, Records
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from adarank.adapt.live_weights import Learn, LiveWeights
from adarank.io.record import machine, versions
from adarank.recipe.job import open_job
from adarank.recipe.reader import load_recipe
from adarank.spectral.blocks import Blocks
from adarank.workflow import demo
from adarank.workflow.build_networks import build_models
from adarank.workflow.load_tasks import load_tasks
from adarank.workflow.problem import problem_of

WIDTH, LAYERS, TASKS, BATCH, TOKENS = 384, 6, 8, 16, 32
PRECISIONS = ("float32", "bfloat16")
Bed = tuple[Mapping[str, Tensor], Mapping[str, Blocks], list[Callable[[], Tensor]]]
"""The parameters, their blocks, and each task's loss."""


def demo_8() -> Bed:
    """The shipped models and inputs."""
    job = open_job(load_recipe(demo.ZOO / "recipe.yaml"))
    models, method = build_models(job), job.method
    settings = method.settings.model_copy(update={"objective": "entropy"})
    live = method.start(job.network, models.shared, settings, "cpu")
    losses = problem_of(job, models, load_tasks(job), settings, {}).losses()
    return live.parameters, live.blocks, [lambda loss=loss: loss(0) for loss in losses.values()]


def minilm_shapes() -> Bed:
    """A network of MiniLM's shapes with random components."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=12, intermediate_size=4 * WIDTH, vocab_size=1000)  # fmt: skip
    network = BertForSequenceClassification(config).eval().requires_grad_(False)
    parameters = {name: tensor for name, tensor in network.named_parameters() if "encoder" in name}
    inputs = [torch.randint(0, 1000, (BATCH, TOKENS)) for _ in range(TASKS)]
    losses = [lambda rows=rows: network(input_ids=rows).logits.logsumexp(-1).mean() for rows in inputs]
    return parameters, {name: _random_blocks(tensor.detach().clone()) for name, tensor in parameters.items()}, losses


def _random_blocks(origin: Tensor) -> Blocks:
    rows, columns = (*origin.shape, 1)[:2]
    if origin.dim() < 2:
        nothing = (origin.new_zeros(rows, 0), origin.new_zeros(0), origin.new_zeros(columns, 0))
        return Blocks(origin, [1e-3 * torch.randn(rows, 1) for _ in range(TASKS)], *nothing, (0,) * TASKS)
    rank = min(rows, columns)
    u, v = (torch.randn(side, rank * TASKS) / side**0.5 for side in (rows, columns))
    s = torch.cat([0.01 * torch.rand(rank).sort(descending=True).values for _ in range(TASKS)])
    return Blocks(origin, [None] * TASKS, u, s, v, (rank,) * TASKS)


def measured(bed: Bed, repeats: int) -> dict[str, Any]:
    """Median seconds of each part, and the step beside the networks alone, by precision."""
    parameters, blocks, losses = bed
    lives = {p: LiveWeights(parameters, blocks, Learn(mask="soft", precision=p), 1.0, 0.1) for p in PRECISIONS}
    for live in lives.values():
        with torch.no_grad():
            live.logits += 1e-3 * torch.randn(live.logits.shape, generator=torch.Generator().manual_seed(0))
    first = lives["float32"]

    def networks() -> None:
        first.zero_grad()
        for loss in losses:
            loss().backward()

    parts = {"networks": networks}
    for precision, live in lives.items():
        parts |= {f"compose, {precision}": live.write, f"pull back, {precision}": live.pull_back}
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats + 1):
        for name, run in parts.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    middle = {name: median(values[1:]) for name, values in seconds.items()}
    spread = {name: [round(min(values[1:]), 4), round(max(values[1:]), 4)] for name, values in seconds.items()}
    steps = {p: 1 + (middle[f"compose, {p}"] + middle[f"pull back, {p}"]) / middle["networks"] for p in PRECISIONS}
    return {
        "seconds": {name: round(value, 4) for name, value in middle.items()},
        "least_and_most": spread,
        "step_over_networks": {precision: round(value, 3) for precision, value in steps.items()},
    }


BEDS = {"demo-8": demo_8, "MiniLM's shapes": minilm_shapes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--beds", nargs="+", choices=list(BEDS), default=list(BEDS))
    parser.add_argument("--note", default="", help="kept in the record, such as what else the machine did")
    parser.add_argument("--records", type=Path, metavar="FILE", default=FOLDER / "costs.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    records = Records(options.records)
    content: dict[str, Any] = (records.first(kind="cost", name="step parts") or {}) | {
        "kind": "cost", "name": "step parts", "what": "composing and pulling back beside the networks alone, soft masks, seconds of the processor, one thread",
        "command": f"python benchmarks/step_parts.py --repeats {options.repeats}", "note": options.note, "seed": 0,
        "versions": versions(), "machine": machine(),
    }  # fmt: skip
    for name in options.beds:
        content[name] = measured(BEDS[name](), options.repeats)
        print(name, content[name], flush=True)
        records.write(content)


if __name__ == "__main__":
    main()
