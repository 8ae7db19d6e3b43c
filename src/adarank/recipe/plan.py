"""What a merge will do, from headers alone: every tensor's action, the output's layout, the peak memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from adarank.io.writer import layout_bytes
from adarank.method import MergeMethod
from adarank.recipe.job import Job
from adarank.recipe.schema import Recipe

_RUNTIME_BYTES = 300 * 2**20  # PyTorch and Python themselves


def peak_bytes(job: Job) -> int:
    """Predicted peak of anonymous memory in bytes, without the activations of a network's batches."""
    held = job.method.held_bytes(job.outline())
    return _RUNTIME_BYTES + max(held, *(expert.making_bytes for expert in job.experts.values()))


def settings_in_force(job: Job) -> dict[str, Any]:
    """Every setting with its value, defaults included."""
    return in_force(job.method, job.recipe)


def in_force(method: MergeMethod, recipe: Recipe) -> dict[str, Any]:
    """Every setting of a method and of a recipe's data with its value."""
    return {**method.in_force(), "data": recipe.data.model_dump()}


def unheeded(job: Job) -> dict[str, float]:
    """Tensors that are kept from the base though experts changed them -> the largest ‖τ‖ / ‖W₀‖. Reads those tensors."""
    network, found = job.network, {}
    for name, choice in network.choices.items():
        if choice.action != "keep" or not network.tensors[name].dtype.is_floating_point or network.base is None:
            continue
        start = network.base.read(name)
        whole = float(start.norm())
        owners = [own for task, own in network.experts.items() if name in own.names and name not in network.heads[task]]
        change = max((float((expert.read(name) - start).norm()) for expert in owners), default=0.0)
        if change > 0:
            found[name] = change / whole if whole else float("inf")
    return {name: round(share, 5) for name, share in found.items()}


def describe(job: Job, out: Path | None = None) -> dict[str, Any]:
    """The plan as plain data: what `adarank plan` shows and what a record keeps."""
    network = job.network
    layout = job.layout()
    actions = {name: job.method.action(choice.action) for name, choice in network.choices.items()}
    members = {**({"base": network.base} if network.base else {}), **network.experts}
    return {
        "merge_method": job.recipe.merge_method,
        "tasks": list(network.tasks),
        "kind": job.family.kind if job.family else None,
        "reads": job.method.labels or None,
        "actions": dict(Counter(actions.values())),
        "decomposes": job.method.decomposes,
        "notes": job.method.notes(network),
        "tensors": {
            name: {
                "action": actions[name],
                "reason": choice.reason,
                "shape": list(layout[name][0]),
                "dtype": str(layout[name][1]).removeprefix("torch."),
            }
            for name, choice in network.choices.items()
        },
        "heads": {task: list(names) for task, names in network.heads.items()},
        "dropped": {name: dict(member.dropped) for name, member in members.items() if member.dropped},
        "task_aware": bool(job.method.in_use),
        "output_bytes": job.output_bytes(),
        "experts_bytes": len(network.tasks) * layout_bytes(layout),
        "peak_bytes": peak_bytes(job),
        "out": str(out) if out else None,
    }
