"""What a merge will do, from headers alone: every tensor's action, the output's layout, the peak memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from adarank.alignment.selection import computed
from adarank.alignment.task_vectors import Member, Network
from adarank.io.writer import layout_bytes
from adarank.methods import Informed, RegMean
from adarank.recipe.job import Job

_RUNTIME_BYTES = 300 * 2**20  # PyTorch and Python themselves


def peak_bytes(job: Job) -> int:
    """Predicted peak of anonymous memory in bytes, without the activations of a network's batches."""
    return _RUNTIME_BYTES + max(_held_bytes(job), *(expert.making_bytes for expert in job.experts.values()))


def _held_bytes(job: Job) -> int:
    """What merging, adapting or training holds."""
    if job.recipe.trains:
        return 4 * _trained_numel(job)
    if job.recipe.modular:
        return _modular_bytes(job)
    if not job.recipe.adaptive:
        merging = max((_streamed_bytes(job, name) for name in job.network.merged()), default=0)
        return max(merging, _measuring_bytes(job))
    spectra = job.recipe.adaptation()[0].spectra
    tasks = len(job.experts)
    total = 0
    for name in job.network.merged():
        info = job.network.tensors[name]
        rows = info.shape[0] if info.shape else 1
        columns = info.numel // max(1, rows)
        decomposed = spectra and job.network.choices[name].action == "decompose"
        total += 3 * info.numel  # origin, live weight, gradient
        total += tasks * (min(rows, columns) * (rows + columns) if decomposed else info.numel)
    kept = sum(i.numel for n, i in job.network.tensors.items() if job.network.choices[n].action == "keep")
    return 4 * (total + kept + _head_numel(job))


def _head_numel(job: Job) -> int:
    return sum(job.network.experts[t].info(n).numel for t in job.experts for n in job.network.heads[t])


def _measuring_bytes(job: Job) -> int:
    """What taking one expert's statistics holds: the network, every head, and the statistics. 0 for data-free methods."""
    if not isinstance(job.method, Informed):
        return 0
    tensors = job.network.tensors
    held = sum(job.method.held(tensors[n].shape, job.network.choices[n].action == "decompose") for n in job.network.merged())  # fmt: skip
    return 4 * (sum(info.numel for info in tensors.values()) + _head_numel(job) + held)


def _modular_bytes(job: Job) -> int:
    """The network twice while one is loaded, the heads, and what modules hold; the start that is adapted, if it is."""
    start = job.recipe.start()
    before = _held_bytes(replace(job, recipe=start)) if start is not None and start.adaptive else 0
    body = sum(info.numel for info in job.network.tensors.values())
    own = sum(layout_bytes(each) for each in job.part_layouts()[1].values())
    return max(before, 4 * (2 * body + _head_numel(job)) + own)


def _trained_numel(job: Job) -> int:
    """Weights, gradients and AdamW's two moments; what is kept once; a second network while one is loaded."""
    body = sum(info.numel for info in job.network.tensors.values())
    trained = sum(job.network.tensors[name].numel for name in job.network.merged())
    return 4 * (trained + _head_numel(job)) + (body - trained) + body


def _streamed_bytes(job: Job, name: str) -> int:
    """What merging one tensor holds at a time: origin, sum, one task vector; casts; the method's workspace."""
    info = job.network.tensors[name]
    copies = 4 + (info.dtype.itemsize < 4) + 2 * job.recipe.dequantize  # codes as floats, and their scales
    decomposed = job.network.choices[name].action == "decompose"
    if job.method is not None:
        copies += job.method.workspace(len(job.experts), decomposed)
    solving = job.method.solving(info.shape) if isinstance(job.method, RegMean) and decomposed else 0
    return 4 * (copies * info.numel + solving)


def settings_in_force(job: Job) -> dict[str, Any]:
    """Every setting with its value, defaults included."""
    data = job.recipe.data.model_dump()
    if job.method is not None:
        return {"parameters": job.method.model_dump(by_alias=True, exclude={"masks"}), "data": data}
    if job.recipe.trains:
        return {"parameters": job.recipe.training().model_dump(), "data": data}
    method, settings = job.recipe.modules() if job.recipe.modular else job.recipe.adaptation()
    return {
        "parameters": method.model_dump(by_alias=True),
        "adapt": settings.model_dump(mode="json"),
        "data": data,
    }


def _decomposes(job: Job) -> bool:
    """False if the method takes matrices as they are."""
    if job.method is not None:
        return job.method.spectral
    if job.recipe.modular:
        return job.recipe.modules()[0].spectral
    return job.recipe.adaptive and job.recipe.adaptation()[0].spectra


def plan_notes(job: Job) -> list[str]:
    """What a user may not expect of this recipe, in sentences."""
    method, notes = job.method, [*job.recipe.notes(), *job.notes]
    if len(job.experts) == 2 and method is not None and method.name == "cart":
        notes.append(
            "About the average, two experts have equal and opposite task vectors: 'cart' gives their average, whatever its settings. "
            "With two experts use a method about the base, such as tsv_m, or adarank."
        )
    return notes


def unheeded(job: Job) -> dict[str, dict[str, Any]]:
    """What the record says of tensors that are kept from the base though experts have others. Reads those tensors.

    Returns:
        `kept_though_changed`: tensor -> the largest ‖τ‖ / ‖W₀‖ of experts that have it in the base's shape;
        `kept_though_of_other_shape`: tensor -> task -> the shape that its expert has.
    """
    changed: dict[str, Any] = {}
    shapes: dict[str, Any] = {}
    for name in _kept_of_learned(job.network):
        start = job.network.reference().read(name)
        whole, change = float(start.norm()), 0.0
        for task, member in _owners(job.network, name).items():
            if member.info(name).shape != tuple(start.shape):
                shapes.setdefault(name, {})[task] = list(member.info(name).shape)
            else:
                change = max(change, float((member.read(name) - start).norm()))
        if change > 0:
            changed[name] = round(change / whole, 5) if whole else float("inf")
    return {"kept_though_changed": changed, "kept_though_of_other_shape": shapes}


def _kept_of_learned(network: Network) -> list[str]:
    """Tensors that are kept from the base, buffers that models compute not among them."""
    if network.base is None:
        return []
    kept = [name for name, choice in network.choices.items() if choice.action == "keep"]
    return [name for name in kept if not computed(network.base.info(name))]


def _owners(network: Network, name: str) -> dict[str, Member]:
    """The experts that have a tensor, and not as part of their head."""
    return {t: m for t, m in network.experts.items() if name in m.names and name not in network.heads[t]}


def describe(job: Job, out: Path | None = None) -> dict[str, Any]:
    """The plan as plain data: what `adarank plan` shows and what a record keeps."""
    network = job.network
    layout = job.layout()
    shown = {n: "train" if job.recipe.trains and c.action != "keep" else c.action for n, c in network.choices.items()}
    members = {**({"base": network.base} if network.base else {}), **network.experts}
    return {
        "merge_method": job.recipe.merge_method,
        "tasks": list(network.tasks),
        "kind": job.family.kind if job.family else None,
        "reads": "labels of the adapt split" if job.recipe.trains else None,
        "actions": dict(Counter(shown.values())),
        "decomposes": _decomposes(job),
        "notes": plan_notes(job),
        "tensors": {
            name: {
                "action": shown[name],
                "reason": choice.reason,
                "shape": list(layout[name][0]),
                "dtype": str(layout[name][1]).removeprefix("torch."),
            }
            for name, choice in network.choices.items()
        },
        "heads": {task: list(names) for task, names in network.heads.items()},
        "dropped": {name: dict(member.dropped) for name, member in members.items() if member.dropped},
        "task_aware": job.task_aware,
        "output_bytes": job.output_bytes(),
        "experts_bytes": len(network.tasks) * layout_bytes(layout),
        "peak_bytes": peak_bytes(job),
        "out": str(out) if out else None,
    }
