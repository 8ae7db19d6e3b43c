"""A merged task vector written as a LoRA adapter of the base, which `peft` loads.

    W_merged - W_base ≈ B A        the best of rank r (Eckart and Young 1936): exact where the task vector's rank is no more

What is no matrix of a layer goes along whole: biases as `bias: all`, other modules as `modules_to_save`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.errors import OutputError
from adarank.io.adapter import PREFIX, WEIGHTS
from adarank.io.adapter_config import CONFIG
from adarank.io.checkpoint import cast
from adarank.io.low_rank import Factors, stacked
from adarank.io.writer import Layout, write_json, write_tensors
from adarank.recipe.lora_output import Slot, slots_of
from adarank.spectral.svd import Spectrum, as_matrix, decompose, decompose_factors

# For classifiers nothing is named: peft would then expect their heads among modules_to_save.
_TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}


@dataclass
class _Written:
    """What an adapter's file will hold, and how near it comes.

    Attributes:
        tensors: name in the file -> tensor.
        slots: name of a tensor of the merge that changed -> what carries it.
        lost, whole: tensor -> the squared norm of what the adapter lacks of its task vector, of the task vector.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    slots: dict[str, Slot] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)

    def errors(self) -> dict[str, float]:
        """Tensor -> ‖τ - B A‖ / ‖τ‖."""
        return {name: math.sqrt(lost / self.whole[name]) for name, lost in self.lost.items()}

    def total(self) -> float:
        """The same over all tensors together."""
        return math.sqrt(sum(self.lost.values()) / sum(self.whole.values()))


def write_adapter(
    folder: Path,
    network: AlignedCheckpoints,
    layout: Layout,
    tensors: Iterable[tuple[str, Tensor]],
    rank: int,
    base: str,
) -> dict[str, Any]:
    """Fill `folder` with an adapter; returns what the record says of it.

    Arguments:
        layout: name -> (shape, dtype) of the merged model, for what goes along whole.
        tensors: (name, tensor) of the merged model, heads not among them.
        rank: r of every layer.
        base: what the adapter says its model is called.

    Raises:
        OutputError: the merged model is the base, or no matrix of it changed.
    """
    written = _carried(network, layout, tensors, rank)
    if not any(slot.low_rank for slot in written.slots.values()):
        what = "no matrix of a layer changes" if written.slots else "the merged model is the base"
        raise OutputError(f"output.lora: {what}, so there is nothing that an adapter could hold. Write a whole model.")
    write_tensors(folder / WEIGHTS[0], written.tensors, {"format": "pt"})
    write_json(folder / CONFIG, _config(written.slots, rank, base, _task(network)))
    errors = {name: float(f"{error:.4g}") for name, error in written.errors().items()}
    size = sum(tensor.nbytes for tensor in written.tensors.values())
    return {"rank": rank, "bytes": size, "relative_error": float(f"{written.total():.4g}"), "relative_errors": errors}


def _carried(network: AlignedCheckpoints, layout: Layout, tensors: Iterable[tuple[str, Tensor]], rank: int) -> _Written:
    slots, written = slots_of(network), _Written()
    saved: dict[str, dict[str, Tensor]] = {}
    for name, merged in tensors:
        slot = slots.get(name)
        if slot is None:
            continue
        tau = _task_vector(network, name, merged)
        if slot.how == "whole":
            stored = (
                merged.cpu()
                if tau is None
                else cast(merged, layout[name][1], name, "Give another out_dtype, such as bfloat16.").cpu()
            )
            saved.setdefault(slot.module, {})[name] = stored.clone()
        if tau is None or not bool(tau.any()):
            continue
        written.slots[name], written.whole[name], written.lost[name] = slot, _square(tau), 0.0
        if slot.how == "bias":
            written.tensors[PREFIX + name] = (
                cast(merged, layout[name][1], name, "Give another out_dtype.").cpu().clone()
            )
        elif slot.low_rank:
            a, b = _factors(network, name, tau, slot, rank)
            written.lost[name] = _square(tau - _product(a, b, slot, tau.shape))
            written.tensors |= _named(a, b, slot, tau.shape)
    changed = {slot.module for slot in written.slots.values() if slot.how == "whole"}
    for module in changed:
        written.tensors |= {PREFIX + name: tensor for name, tensor in saved[module].items()}
    _rename_biases(written)
    return written


def _task_vector(network: AlignedCheckpoints, name: str, merged: Tensor) -> Tensor | None:
    """What a merge added to the base's tensor, on the CPU; None of a tensor that does not merge."""
    if network.choices[name].action not in ("decompose", "scale"):
        return None
    assert network.base is not None
    start = network.base.read(name)
    return merged.cpu().to(start.dtype) - start


def _factors(network: AlignedCheckpoints, name: str, tau: Tensor, slot: Slot, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in…) and B (out, rank), matrices of the best approximation; rows and columns beyond its rank are zero."""
    spectrum = _spectrum(network, name, as_matrix(tau)).first(rank)
    root = spectrum.s.sqrt()
    left, right = spectrum.u * root, spectrum.v * root
    return (left.T, right) if slot.how in ("transposed", "embedding") else (right.T, left)


def _spectrum(network: AlignedCheckpoints, name: str, tau: Tensor) -> Spectrum:
    """The SVD of a merged task vector: by the adapters' directions where it lies within them, else of the whole."""
    changes = network.changes(name, "cpu")
    if len(changes) == len(network.experts):
        span = stacked(list(changes.values()), [1.0] * len(changes))
        if 0 < span.rank < min(tau.shape):
            outer = span.to("cpu", tau.dtype).orthogonal()
            inner = Factors(outer.left, outer.left.T @ tau @ outer.right.T, outer.right, orthonormal=True)
            if _square(tau - inner.dense()) <= _rounding(network, name, tau) ** 2:
                return decompose_factors(inner, name)
    return decompose(tau, name)


def _rounding(network: AlignedCheckpoints, name: str, tau: Tensor) -> float:
    """What W + τ - W may differ from τ by, as a norm: each entry by an ε of W."""
    assert network.base is not None
    epsilon = torch.finfo(tau.dtype).eps
    return epsilon * (math.sqrt(_square(network.base.read(name))) + 8 * math.sqrt(_square(tau)))


def _product(a: Tensor, b: Tensor, slot: Slot, shape: torch.Size) -> Tensor:
    product = b @ a
    return (product.T if slot.how in ("transposed", "embedding") else product).reshape(shape)


def _named(a: Tensor, b: Tensor, slot: Slot, shape: torch.Size) -> dict[str, Tensor]:
    """The two under the names and in the shapes that peft has them."""
    stem = f"{PREFIX}{slot.module}.lora_"
    if slot.how == "embedding":
        return {f"{stem}embedding_A": a.contiguous(), f"{stem}embedding_B": b.contiguous()}
    ones = (1,) * (len(shape) - 2)
    return {f"{stem}A.weight": a.reshape(len(a), *shape[1:]).contiguous() if ones else a.contiguous(),
            f"{stem}B.weight": b.reshape(*b.shape, *ones).contiguous()}  # fmt: skip


def _rename_biases(written: _Written) -> None:
    """A layer that has A and B is wrapped, and so is its bias."""
    wrapped = {slot.module for slot in written.slots.values() if slot.low_rank}
    for name, slot in written.slots.items():
        if slot.how == "bias" and slot.module in wrapped:
            written.tensors[f"{PREFIX}{slot.module}.base_layer.bias"] = written.tensors.pop(PREFIX + name)


def _config(slots: dict[str, Slot], rank: int, base: str, task: str | None) -> dict[str, Any]:
    def modules(*kinds: str) -> list[str]:
        return list(dict.fromkeys(slot.module for slot in slots.values() if slot.how in kinds))

    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": modules("linear", "transposed", "embedding", "kernel"),
        "fan_in_fan_out": bool(modules("transposed")),
        "bias": "all" if modules("bias") else "none",
        "modules_to_save": modules("whole") or None,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _task(network: AlignedCheckpoints) -> str | None:
    """What peft calls the task that the base's class is of, if it generates text."""
    assert network.base is not None
    named = network.base.source.config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)


def _square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())
