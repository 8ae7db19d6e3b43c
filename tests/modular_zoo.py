"""Recipes of modular methods over the small zoos, and what their bundles hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import image_zoo
import text_zoo
from adarank.data.task import TaskData
from adarank.recipe.job import open_job
from adarank.recipe.reader import load_recipe
from adarank.workflow.load_tasks import load_tasks
from adarank.workflow.merge import merge
from make import randn


def whole(zoo: Path, folder: Path, bundle: Any) -> Path:
    """The network that routers are put on, as a merged output: its MLPs hold the base's weights."""
    target = folder / "whole"
    if not target.exists():
        made(zoo, target, merge_method="task_arithmetic")
        save_file({n: t.clone() for n, t in bundle.tensors(bundle.tasks[0])}, target / "model.safetensors")
    return target


LOOP = {"batch_size": 4, "check_every": 3}


TEXT = list(text_zoo.TASKS)


IMAGE = list(image_zoo.TASKS)


Zoo = Callable[..., Path]


def of(method: str, steps: int = 0, adapt: Mapping[str, Any] | None = None, **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "parameters": parameters,
        "adapt": {**LOOP, "steps": steps, "keep": "last", **(adapt or {})},
    }


def write(zoo: Path, name: str = "recipe.yaml", **changes: Any) -> Path:
    kind = image_zoo if (zoo / "data" / "digits.npz").exists() else text_zoo
    return kind.recipe(zoo, name, **changes)


def made(zoo: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return merge(load_recipe(write(zoo, **changes)), out)


def data_of(zoo: Path) -> dict[str, TaskData]:
    return load_tasks(open_job(load_recipe(write(zoo, "data.yaml"))))


def inputs(data: TaskData, count: int = 6) -> Mapping[str, Tensor]:
    return data.examples.batch(data.splits.rows["test"][:count])


@torch.no_grad()
def logits(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    found: Tensor = module(**batch).logits
    return found


def one(batch: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """One input of a batch, without its padding."""
    length = int(batch["attention_mask"][number].sum()) if "attention_mask" in batch else None
    return {k: v[number : number + 1, :length] if length else v[number : number + 1] for k, v in batch.items()}


def near(first: Tensor, second: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(first, second, rtol=1e-4, atol=atol)


METHODS = {
    "surgery": of("surgery", 4, rank=3, lr=0.01),
    "wemoe": of("wemoe", 4, lr=0.05),
    "twin_merging": of("twin_merging", 4, rank=0.5, lr=0.05),
}


def stir(out: Path, seed: int = 0) -> dict[str, Tensor]:
    """Routers of a WEMoE bundle that decide by the input; returns its shared parts."""
    shared = load_file(out / "shared.safetensors")
    for number, name in enumerate(sorted(shared)):
        if name.split(":")[0] in ("a1", "a2"):
            shared[name] = randn(seed + number, *shared[name].shape) * (0.3 if name.startswith("a2") else 1.0)
    rewrite(out, "shared.safetensors", shared)
    return shared


def rewrite(out: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Replace a file of a bundle, and what its manifest says of it."""
    save_file(dict(tensors), out / name)
    manifest = json.loads((out / "bundle.json").read_text())
    content = (out / name).read_bytes()
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (out / "bundle.json").write_text(json.dumps(manifest))
