"""What a merge will do, from headers alone: every tensor's action, the output's layout, the peak memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from adarank.alignment.selection import computed, is_kernel, patterns_for
from adarank.alignment.task_vectors import AlignedCheckpoints, Member
from adarank.errors import RecipeError
from adarank.io.writer import layout_bytes
from adarank.method import MergeMethod
from adarank.recipe.job import Job
from adarank.recipe.schema import Recipe
from adarank.recipe.sizes import size_text
from adarank.recipe.sources import license_notes, sources_of


def peak_bytes(job: Job) -> int:
    """Predicted peak of anonymous memory in bytes, without the activations of a network's batches."""
    held = job.method.held_bytes(job.outline())
    if job.recipe.heads == "learn":
        held += _heads_bytes(job)
    return job.process_bytes + max(held, *(expert.making_bytes for expert in job.experts.values()))


def check_memory(job: Job) -> None:
    """Refuse a budget that a merge cannot keep, before anything is spent.

    Raises:
        RecipeError: says what is needed and what may be changed.
    """
    if job.memory is None:
        return
    if job.recipe.device.startswith("cuda"):
        raise RecipeError(
            f"memory: is a budget of the processor's memory, and device is {job.recipe.device}. Give device: cpu, or no budget."
        )
    needed = peak_bytes(job)
    if needed <= job.memory:
        return
    less = job.method.smaller(job.outline())
    ways = [f"{said} ({size_text(job.process_bytes + held)})" for said, held in less.items()]
    raise RecipeError(
        f"memory: {size_text(needed)} are needed and {size_text(job.memory)} were given. '{job.method.name}' holds {job.method.memory()}; "
        f"the process itself holds {size_text(job.process_bytes)}. {' or '.join(['Give that much', *ways])}."
    )


def _heads_bytes(job: Job) -> int:
    """What learning heads after the merge holds: all that is written, and networks, one body more while they are loaded."""
    outline = job.outline()
    body = sum(info.numel for info in outline.network.tensors.values())
    return job.output_bytes() + 4 * (2 * body + outline.head_numel())


def settings_in_force(job: Job) -> dict[str, Any]:
    """Every setting with its value, defaults included."""
    return in_force(job.method, job.recipe)


def in_force(method: MergeMethod, recipe: Recipe) -> dict[str, Any]:
    """Every setting of a method and of a recipe's data with its value."""
    return {**method.in_force(), "data": recipe.data.model_dump()}


def unheeded(job: Job) -> dict[str, dict[str, Any]]:
    """What the record says of tensors that are kept from the base though experts have others. Reads those tensors.

    Returns:
        `kept_though_changed`: tensor -> the largest ‖τ‖ / ‖W₀‖ of experts that have it in the base's shape;
        `kept_though_of_other_shape`: tensor -> task -> the shape that its expert has.
    """
    changed: dict[str, Any] = {}
    shapes: dict[str, Any] = {}
    for network in job.networks:
        for name in _kept_of_learned(network):
            start = network.reference().read(name)
            whole, change = float(start.norm()), 0.0
            for task, member in _owners(network, name).items():
                if member.info(name).shape != tuple(start.shape):
                    shapes.setdefault(name, {})[task] = list(member.info(name).shape)
                else:
                    change = max(change, float((member.read(name) - start).norm()))
            if change > 0:
                changed[name] = round(change / whole, 5) if whole else float("inf")
    return {"kept_though_changed": changed, "kept_though_of_other_shape": shapes}


def _kept_of_learned(network: AlignedCheckpoints) -> list[str]:
    """Tensors that are kept from the base, buffers that models compute not among them."""
    if network.base is None:
        return []
    kept = [name for name, choice in network.choices.items() if choice.action == "keep"]
    return [name for name in kept if not computed(network.base.info(name)) and not network.unchanged(name)]


def _owners(network: AlignedCheckpoints, name: str) -> dict[str, Member]:
    """The experts that have a tensor, and not as part of their head."""
    return {t: m for t, m in network.experts.items() if name in m.names and name not in network.heads[t]}


def _kernel_notes(job: Job) -> list[str]:
    """A sentence where a method that decomposes matrices takes most of a network as it is: kernels of convolutions."""
    if not job.method.decomposes:
        return []
    network = job.network
    merged = {name: network.tensors[name] for name in network.merged()}
    kernels = [name for name, info in merged.items() if is_kernel(info) and network.choices[name].by_default("scale")]
    decomposed = sum(info.numel for name, info in merged.items() if network.choices[name].action == "decompose")
    of_kernels = sum(merged[name].numel for name in kernels)
    if of_kernels <= decomposed:
        return []
    share = of_kernels / sum(info.numel for info in merged.values())
    patterns = patterns_for(kernels, set(network.tensors) - set(kernels))
    listed = ", ".join([f'"{pattern}"' for pattern in patterns[:4]] + ["…"] * (len(patterns) > 4))
    return [
        f"'{job.method.name}' decomposes matrices, but {100 * share:.0f}% of the merged numbers are kernels of convolutions, which it takes whole. "
        f"To decompose them, too, as matrices (out, in·k·k): select: {{decompose: [{listed}]}}."
    ]


def notes_of(job: Job) -> list[str]:
    """What a user may not expect of a merge, in sentences, but for licences."""
    return [*job.recipe.notes(), *job.notes, *job.method.notes(job.network), *_kernel_notes(job)]


def describe(job: Job, out: Path | None = None) -> dict[str, Any]:
    """The plan as plain data: what `adarank plan` shows and what a record keeps."""
    network = job.network
    layout = job.layout()
    actions = {name: job.method.action(choice.action) for name, choice in network.choices.items()}
    sources = sources_of(job)
    members = {**({"base": network.base} if network.base else {}), **network.experts}
    return {
        "merge_method": job.recipe.merge_method,
        "tasks": list(network.tasks),
        "kind": job.family.kind if job.family else None,
        "reads": job.method.labels or None,
        "actions": dict(Counter(actions.values())),
        "decomposes": job.method.decomposes,
        "notes": [*notes_of(job), *license_notes(sources)],
        "sources": sources,
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
        "slices": list(job.slices.rows) if job.slices else [],
        "dropped": {name: dict(member.dropped) for name, member in members.items() if member.dropped},
        "task_aware": bool(job.method.in_use),
        "output_bytes": job.output_bytes(),
        "experts_bytes": len(network.tasks) * layout_bytes(layout),
        "peak_bytes": peak_bytes(job),
        "memory": job.memory,
        "factors_in_files": job.method.factors_in_files(job.outline()),
        "out": str(out) if out else None,
    }
