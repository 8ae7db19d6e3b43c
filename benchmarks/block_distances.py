"""How far merges of minilm-8 are from the experts behind every block, and how often they agree with them.

    python benchmarks/block_distances.py FOLDER NAME=OUTPUT [NAME=OUTPUT …]

FOLDER as for table.py. Distances are ‖z - e‖² / ‖e‖² over all tokens of 96 select inputs a task; no label is read. The record is
of the kind "block distances" in records/minilm-8.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adarank.cli.threads import wait_passively

wait_passively()  # before PyTorch is loaded

import torch
from records import FOLDER, Records
from table_bench import Bench
from table_rows import MINILM
from torch import Tensor, nn

from adarank.alignment.task_vectors import member_tensors
from adarank.io.checkpoint import Checkpoint
from adarank.io.record import machine, versions
from adarank.models.predict import split_batches
from adarank.workflow.build_networks import family_of

INPUTS = 96  # per task
Seen = tuple[list[Tensor], Tensor]
"""What every block gives at all tokens, and the predicted classes."""


@torch.no_grad()
def seen(bench: Bench, task: str, filled: Iterable[tuple[str, Tensor]]) -> Seen:
    """What a task's network gives with these tensors."""
    bench.models.fill(filled)
    module, family = bench.models.modules[task], family_of(bench.job)
    blocks = [part for name, part in module.named_modules() if name.split(".")[-2:-1] == ["layer"]]
    states: list[list[Tensor]] = [[] for _ in blocks]
    classes = []
    given: list[Tensor] = []

    def keep(block: nn.Module, taken: Any, output: Any) -> None:
        given.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    for _, batch in split_batches(family, bench.data[task].spread("select", INPUTS), "select", "cpu"):
        given.clear()
        classes.append(family.logits(module, batch).argmax(dim=-1))
        for of_block, state in zip(states, given, strict=True):
            of_block.append(state[batch["attention_mask"].bool()])
    for handle in handles:
        handle.remove()
    return [torch.cat(of_block) for of_block in states], torch.cat(classes)


def compared(merged: Seen, expert: Seen) -> dict[str, Any]:
    """Distances behind every block, and the agreement."""
    pairs = zip(merged[0], expert[0], strict=True)
    return {
        "distance": [round(float((z - e).square().sum() / e.square().sum()), 3) for z, e in pairs],
        "agreement": round(float((merged[1] == expert[1]).float().mean()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("outputs", nargs="+", metavar="NAME=OUTPUT")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    records = Records(FOLDER / "minilm-8.jsonl")
    bench = Bench(MINILM, arguments.folder, records)
    network = bench.job.network
    experts = {task: seen(bench, task, member_tensors(network, network.experts[task])) for task in bench.data}
    for name, _, output in (given.partition("=") for given in arguments.outputs):
        checkpoint = Checkpoint(Path(output))
        of_tasks = {}
        for task in bench.data:
            filled = ((tensor, checkpoint.read(tensor)) for tensor in network.tensors)
            of_tasks[task] = compared(seen(bench, task, filled), experts[task])
            print(name, task, of_tasks[task], flush=True)
        command = "python benchmarks/block_distances.py FOLDER NAME=OUTPUT"
        about = {"command": command, "versions": versions(), "machine": machine("cpu")}
        records.write({"kind": "block distances", "name": name, "inputs_per_task": INPUTS, "tasks": of_tasks, **about})


if __name__ == "__main__":
    sys.exit(main())
