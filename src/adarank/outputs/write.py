"""What lies in an output: a bundle's parts; beside weights configuration, tokenizer and processor files, and the tasks' heads."""

from __future__ import annotations

import filecmp
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.io.bundle import HEAD, About, Names, Parts, finish, task_folder, write_parts
from adarank.io.files import read_json
from adarank.io.sentence import ROOT_FILES
from adarank.io.side_files import tokenizer_files
from adarank.io.writer import write_folders, write_json, write_tensors
from adarank.method import Result
from adarank.models.union import save_tokenizer
from adarank.outputs.adapter import write_adapter
from adarank.outputs.template import write_template
from adarank.recipe.job import Job

CONFIG, GENERATION = "config.json", "generation_config.json"


def check_side_files(job: Job) -> None:
    """Look at all that will be copied, before anything is spent.

    Raises:
        CheckpointError: a file is a link out of its model's folder.
    """
    for checkpoint in (
        job.root,
        *([job.tokenizer.source] if job.tokenizer else []),
        *job.experts.values(),
    ):
        checkpoint.side_files()


def write_root_files(folder: Path, job: Job) -> None:
    """Configuration, tokenizer and processor files of the base; the configuration names the output's dtype."""
    for file in _root_files(job):
        shutil.copy(file, folder / file.name)  # with its permissions
    if job.tokenizer and job.tokenizer.made is not None:
        save_tokenizer(job.tokenizer.made, folder)
    write_template(folder, job.chat_template)
    for name in (CONFIG, GENERATION):
        if (folder / name).exists():
            stored = read_json(folder / name)
            content = _root_settings(job, name, stored)
            if content != stored:
                write_json(folder / name, content)
    _write_modules(folder, job)


def _root_settings(job: Job, name: str, stored: dict[str, Any]) -> dict[str, Any]:
    """config.json or generation_config.json of the base as one of the output: its dtype, its vocabulary and their ids."""
    content = _in_dtype(job.config, job) if name == CONFIG and job.config else stored
    if job.tokenizer is None or job.tokenizer.token_ids is None:
        return content
    beside = job.tokenizer.source.folder / name
    return job.tokenizer.token_ids.of(content, read_json(beside) if beside.exists() else {})


def _root_files(job: Job) -> list[Path]:
    """The base's files, with those of the tokenizer that the recipe names in place of the base's; none if it is made."""
    files = job.root.side_files()
    if job.tokenizer is None:
        return files
    replaced = tokenizer_files(files)
    others = [] if job.tokenizer.made is not None else tokenizer_files(job.tokenizer.source.side_files())
    return [*(f for f in files if f not in replaced), *others]


def _write_modules(folder: Path, job: Job) -> None:
    """What the modules of a sentence encoder need beside weights: the base's, else those that all experts agree on.

    The experts' stay behind where they have weights that the base lacks, and so the output.
    """
    encoder = next((c for c in (job.root, *job.experts.values()) if c.modules), None)
    if encoder is None or (encoder is not job.root and any(module.weights for module in encoder.modules)):
        return
    beside = [] if encoder is job.root else [f for name in ROOT_FILES if (f := encoder.folder / name).exists()]
    for file in [*beside, *(file for module in encoder.modules for file in module.files)]:
        target = folder / file.relative_to(encoder.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)  # with its permissions


def write_head(target: Path, job: Job, task: str, head: Mapping[str, Tensor] | None = None) -> None:
    """A task's head, its expert's if none is given, under its expert's names, and its expert's configuration."""
    target.mkdir(parents=True, exist_ok=True)
    metadata = {"backbone": job.network.experts[task].backbone}
    write_tensors(target / HEAD, job.network.head(task) if head is None else head, metadata)
    write_json(target / CONFIG, job.experts[task].config)


def write_task_files(target: Path, job: Job, task: str, head: Mapping[str, Tensor] | None = None) -> None:
    """All that a network of the task needs beside merged weights: its head (its expert's if none is given), its
    configuration, and its expert's side files where the base has others or none."""
    if job.network.heads[task]:
        write_head(target, job, task, head)
    _write_side_files(target, job, task)
    if job.experts[task].config:
        write_json(target / CONFIG, _in_dtype(job.experts[task].config, job))


def _write_side_files(target: Path, job: Job, task: str) -> None:
    """An expert's side files where the base has others or none. A tokenizer or chat template that the recipe names is that of all
    tasks."""
    roots = {file.name: file for file in _root_files(job)}
    files = job.experts[task].side_files()
    shared = tokenizer_files(files) if job.tokenizer or job.chat_template is not None else []
    for file in files:
        same = file.name in roots and filecmp.cmp(roots[file.name], file, shallow=False)
        if file.name != CONFIG and file not in shared and not same:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target / file.name)  # with its permissions


def _in_dtype(config: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """A configuration that names the dtype which the recipe asks for, if it asks."""
    dtype = job.recipe.out_dtype or job.recipe.dtype
    return {**config, "dtype" if "dtype" in config else "torch_dtype": dtype} if dtype else dict(config)


@dataclass(frozen=True)
class Written:
    """What was written of a result.

    Attributes:
        recorded: what the record has of it beside the method's own report.
        digests: path of a file in the output -> its SHA-256, where it is known.
    """

    recorded: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str | None] = field(default_factory=dict)


def write_weights(folder: Path, job: Job, result: Result) -> Written:
    """This process's share of the files of a merged model's weights."""
    paths = [module.path for module in job.root.modules]
    digests = write_folders(folder, job.layout(), result.to_write, paths, job.recipe.max_shard_size)
    return Written(digests=digests)


def write_result(folder: Path, job: Job, result: Result) -> Written:
    """Fill `folder` with what a method gave.

    Raises:
        OutputError: tensors or parts do not follow their layouts.
    """
    for name, write in result.files.items():
        write(folder / name)
    if result.parts is not None:
        return Written({"bundle": write_bundle(folder, job, result.parts, result.heads)})
    written = Written()
    if job.recipe.output.lora is not None:
        settings, base = job.recipe.output.lora, job.recipe.base_model or ""
        of_adapter = write_adapter(folder, job.network, job.layout(), result.tensors, settings.rank, base)
        written = Written({"lora": of_adapter})
        for file in tokenizer_files(_root_files(job)):
            shutil.copy(file, folder / file.name)  # with its permissions
        write_template(folder, job.chat_template)
    else:
        written = write_weights(folder, job, result)
        write_root_files(folder, job)
    for task, names in job.network.heads.items():
        if names:
            write_head(folder / "heads" / task, job, task, result.heads.get(task))
            _write_side_files(folder / "heads" / task, job, task)
        elif job.family is not None and job.family.generates:
            _write_side_files(task_folder(folder, task), job, task)
    return written


def write_bundle(
    folder: Path, job: Job, parts: Parts, heads: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({})
) -> dict[str, Any]:
    """Fill `folder` with a bundle of the job's tasks; returns its sizes (see `bundle.finish`).

    Arguments:
        heads: task -> its head, where it is not its expert's.

    Raises:
        OutputError: the parts do not follow their layouts.
    """
    write_parts(folder, parts.shared, parts.per_task, parts.pieces)
    write_root_files(folder, job)
    for task in job.network.tasks:
        write_task_files(task_folder(folder, task), job, task, heads.get(task))
    names = {task: names_in_expert(job.network, task) for task in job.network.tasks}
    models = job.family.kind if job.family else None
    return finish(folder, About(parts.kind, parts.settings, models, job.layout(), names))


def names_in_expert(network: AlignedCheckpoints, task: str) -> Names:
    """What a task's expert calls the tensors of a network."""
    known = network.experts[task].names
    stored = {name: None if name in network.heads[task] else known.get(name) for name in network.tensors}
    fronts = Counter(
        in_expert.removesuffix(name) for name, in_expert in stored.items() if in_expert and in_expert.endswith(name)
    )
    prefix = fronts.most_common(1)[0][0] if fronts else ""
    return Names(prefix, {name: in_expert for name, in_expert in stored.items() if in_expert != prefix + name})
