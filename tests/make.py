"""Makers of small states, networks and checkpoints on disk."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from adarank.alignment.align import align
from adarank.alignment.selection import Select
from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.io.checkpoint import Checkpoint, MemorySource
from adarank.methods import Masked, Method, merge_tensors
from adarank.spectral.mask_file import MaskFile

State = dict[str, Tensor]
SHAPES: dict[str, tuple[int, ...]] = {
    "embeddings.word_embeddings.weight": (11, 6),
    "layer.0.dense.weight": (6, 4),
    "layer.0.dense.bias": (6,),
    "layer.1.dense.weight": (4, 7),
    "layer.1.dense.bias": (4,),
    "conv.weight": (3, 2, 2, 2),
    "norm.weight": (5,),
    "temperature": (),
}
BUFFER = "position_ids"
MATRICES = ("layer.0.dense.weight", "layer.1.dense.weight")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def agreeing(share: float, inputs: int = 100) -> bytes:
    """What `Signals` has of a task that agrees with its expert on the first of its inputs."""
    return bytes(place < round(share * inputs) for place in range(inputs))


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def state(
    seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, shapes: Mapping[str, tuple[int, ...]] = SHAPES
) -> State:
    """Random floats in `shapes`, and one integer buffer."""
    source = generator(seed)
    floats = {n: scale * torch.randn(shape, generator=source, dtype=torch.float64) for n, shape in shapes.items()}
    return {**{n: t.to(dtype) for n, t in floats.items()}, BUFFER: torch.arange(11).unsqueeze(0)}


def near(base: Mapping[str, Tensor], seed: int, spread: float = 0.1) -> State:
    """A fine-tuned copy of `base`: its floats moved by noise."""
    source = generator(seed)

    def moved(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        noise = torch.randn(tensor.shape, generator=source, dtype=torch.float64)
        return (tensor.double() + spread * noise).to(tensor.dtype)

    return {name: moved(tensor) for name, tensor in base.items()}


def family(
    tasks: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 0.1, scale: float = 1.0
) -> tuple[State, dict[str, State]]:
    """A base and `tasks` experts named task0, task1, …"""
    base = state(seed, dtype, scale)
    return base, {f"task{t}": near(base, 1000 * (seed + 1) + t, spread * scale) for t in range(tasks)}


def network(
    base: Mapping[str, Tensor] | None,
    experts: Mapping[str, Mapping[str, Tensor]],
    select: Select | None = None,
    text_tasks: bool = False,
    task_heads: bool = False,
) -> AlignedCheckpoints:
    """States in memory, aligned. Each is labelled by its role."""
    root = MemorySource(base, "base") if base is not None else None
    sources = {task: MemorySource(own, f"file of {task}") for task, own in experts.items()}
    return align(root, sources, select, text_tasks, task_heads)


def permuted(state: Mapping[str, Tensor], seed: int) -> State:
    """The same state in another key order."""
    names = list(state)
    return {names[i]: state[names[i]] for i in torch.randperm(len(names), generator=generator(seed)).tolist()}


def prefixed(state: Mapping[str, Tensor], prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def save(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Path:
    """A folder with model.safetensors and perhaps config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_shards(folder: Path, state: Mapping[str, Tensor], parts: int = 2) -> Path:
    """A folder in the sharded layout of `transformers`."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        own = {name: state[name] for name in list(state)[part::parts]}
        save_file(own, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict(weight_map)}))


def save_bin(folder: Path, state: Mapping[str, Any]) -> Path:
    """A folder with a legacy pytorch_model.bin."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state), folder / "pytorch_model.bin")
    return folder


def read_all(checkpoint: Checkpoint) -> State:
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Equal names, dtypes, shapes and bytes."""
    return set(first) == set(second) and all(identical(first[name], second[name]) for name in first)


def identical(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)


def close(first: Mapping[str, Tensor], second: Mapping[str, Tensor], atol: float = 1e-5) -> None:
    """Equal names, and values that agree to `atol`."""
    assert set(first) == set(second)
    for name in first:
        torch.testing.assert_close(first[name].double(), second[name].double(), rtol=1e-5, atol=atol, msg=name)


def floats(names: Iterable[str]) -> list[str]:
    return [name for name in names if name != BUFFER]


def assert_accounted(net: AlignedCheckpoints) -> None:
    """Every stored key of every input is merged or kept, a task's head, or dropped for a reason."""
    members = {**({"base": net.base} if net.base else {}), **net.experts}
    for role, member in members.items():
        used = {member.names[n] for n in member.names if n in net.tensors or n in net.heads.get(role, ())}
        lost = set(member.source.tensors) - used - set(member.dropped)
        assert not lost, f"{role}: {sorted(lost)}"
        assert all(member.dropped.values())
    reference = net.reference()
    assert all(name in reference.names for name in net.tensors)
    assert set(net.choices) == set(net.tensors)


def write_rows(folder: Path, suffix: str, table: dict[str, list[Any]]) -> str:
    path = folder / f"rows.{suffix}"
    rows = list(zip(*table.values(), strict=True))
    if suffix == "tsv":
        path.write_text("\n".join("\t".join(map(str, row)) for row in [tuple(table), *rows]) + "\n", encoding="utf-8")
    elif suffix == "csv":
        with path.open("w", encoding="utf-8", newline="") as handle:
            csv.writer(handle).writerows([tuple(table), *rows])
    elif suffix == "jsonl":
        lines = [json.dumps(dict(zip(table, row, strict=True)), ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.table(table), path)
    else:
        np.savez(path, **{name: np.array(values) for name, values in table.items()})
    return path.name


def models_on_disk(folder: Path, names: tuple[str, ...] = ("a", "b")) -> Path:
    base, experts = family(len(names))
    save(folder / "models" / "base", base)
    for name, own in zip(names, experts.values(), strict=True):
        save(folder / "experts" / name, own)
    return folder


def fill_disk(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """From now on a file that is opened to write bytes takes `room` of them, and then the disk is full."""
    opened = Path.open

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data) or 0

    def full(path: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
        return io.BufferedWriter(Full(path, mode), 16) if mode == "wb" else opened(path, mode, *rest, **named)

    monkeypatch.setattr(Path, "open", full)


def merged(method: Method, net: AlignedCheckpoints) -> State:
    return dict(merge_tensors(method, net))


def masked(net: AlignedCheckpoints, origin: str, lam: float, share: float) -> Masked:
    """Masks that keep each task's first ⌊share·r⌋ components, at least one."""
    ranks = {
        n: min(i.shape[0], i.numel // i.shape[0])
        for n, i in net.tensors.items()
        if net.choices[n].action == "decompose"
    }
    count = len(net.tasks)
    masks = {n: (torch.arange(r) < max(1, math.floor(share * r + 1e-9))).repeat(count) for n, r in ranks.items()}
    lams = {name: torch.full((count,), lam) for name in net.merged()}
    return Masked(masks=MaskFile(origin, net.tasks, lams, masks, {n: (r,) * count for n, r in ranks.items()}, {}))


def on_disk(folder: Path, tasks: int, dtype: torch.dtype) -> tuple[State, dict[str, State], AlignedCheckpoints]:
    base, experts = family(tasks, dtype=dtype)
    root = Checkpoint(save_shards(folder / "base", base, 3), "base")
    opened = {task: Checkpoint(save(folder / task, own), task) for task, own in experts.items()}
    return base, experts, align(root, opened)
