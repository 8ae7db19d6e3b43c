"""What lies beside merged weights: configuration, tokenizer and processor files, and the tasks' heads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adarank.bundle import HEAD
from adarank.plan import Job
from adarank.writer import write_json, write_tensors

CONFIG = "config.json"


def write_root_files(folder: Path, job: Job) -> None:
    """Configuration, tokenizer and processor files of the base; the configuration names the output's dtype."""
    for file in job.root.side_files():
        shutil.copyfile(file, folder / file.name)
    if job.recipe.output_dtype() is not None and (folder / CONFIG).exists():
        write_json(folder / CONFIG, _in_dtype(job.root.config, job))


def write_head(target: Path, job: Job, task: str, head: Mapping[str, Tensor] | None = None) -> None:
    """A task's head, its expert's if none is given, under its expert's own names, and its expert's configuration."""
    target.mkdir(parents=True, exist_ok=True)
    metadata = {"backbone": job.network.experts[task].backbone}
    write_tensors(target / HEAD, job.network.head(task) if head is None else head, metadata)
    write_json(target / CONFIG, job.experts[task].config)


def write_task_files(target: Path, job: Job, task: str) -> None:
    """All that a network of the task needs beside merged weights: its head, its configuration, and what its expert has
    in files of its own where the base has others or none."""
    if job.network.heads[task]:
        write_head(target, job, task)
    roots = {file.name: file.read_bytes() for file in job.root.side_files()}
    for file in job.experts[task].side_files():
        if file.name != CONFIG and roots.get(file.name) != file.read_bytes():
            shutil.copyfile(file, target / file.name)
    if job.experts[task].config:
        write_json(target / CONFIG, _in_dtype(job.experts[task].config, job))


def _in_dtype(config: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """A configuration that names the dtype which the recipe asks for, if it asks."""
    asked = job.recipe.out_dtype or job.recipe.dtype
    return {**config, "dtype" if "dtype" in config else "torch_dtype": asked} if asked else dict(config)
