"""One task of an output as an ordinary folder of `transformers`, which loads without adarank.

A classifier's folder holds what its expert's does: weights under the expert's names with the task's head, configuration with
the task's labels, tokenizer or image processor. `Auto` classes and `pipeline` take it. That of a model without a head, which
generates text or encodes sentences, holds the merged weights with the expert's tokenizer, chat template and settings of generation.

No class of `transformers` has CLIP's image tower under a fixed zero-shot head. There the folder holds the whole CLIP, whose
configuration names the task's classes (`id2label`) and prompt templates (`prompt_templates`), for `CLIPModel` and the
zero-shot pipeline; and beside it, in `heads/TASK`, the head as it was scored, which `adarank.load_task` puts on.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adarank.io.checkpoint import check_finite
from adarank.io.files import read_json
from adarank.io.lock import resolved
from adarank.io.output_folder import check_outside
from adarank.io.record import versions
from adarank.io.sentence import ROOT_FILES
from adarank.io.side_files import tokenizer_files
from adarank.io.writer import RECORD, Layout, atomic_folder, write_folders, write_json, write_record
from adarank.models import FAMILIES, classes_of
from adarank.outputs.bundle import Bundle
from adarank.outputs.card import write_card
from adarank.outputs.merged import Merged, open_output
from adarank.outputs.network import empty
from adarank.outputs.write import CONFIG
from adarank.recipe.sources import recorded_sources

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def extract(output: str | Path, task: str, out: str | Path, force: bool = False) -> dict[str, Any]:
    """Write one task of an output as an ordinary folder of `transformers`: weights, head, configuration, tokenizer, processor.

    What it loads as has the very tensors that `load_task` gives, in the dtype of the output. Of a task of zero-shot CLIP the
    folder is that of the whole CLIP: see `docs/bundles.md`.

    Arguments:
        output: what `adarank merge` wrote: one body with a head for each task, or a bundle.
        task: one of its tasks.
        out: the folder to write.
        force: replace `out` if adarank wrote it.

    Returns:
        The record that lies in `out`: `extracted` (output, task, method, settings, `left_out`: tensors of the body that
        the task's architecture has no place for), `notes`, versions.

    Raises:
        CheckpointError: no such output or task, a damaged file, or a method whose networks are more than weights.
        OutputError: `out` exists, or cannot be written.

    Example:
        import transformers

        adarank.extract("merged", "sentiment", "sentiment-alone")
        model = transformers.AutoModelForSequenceClassification.from_pretrained("sentiment-alone")
    """
    out = Path(out)
    source = open_output(output)
    apart = source.models in FAMILIES and FAMILIES[str(source.models)].head_apart
    layout, tensors, left_out = source.checkpoint(task)
    if apart:
        layout, tensors, left_out = source.layout_in_base(), source.tensors(task), []
    config = _zero_shot_config(source, task) if apart else _classifier_config(source, task, layout)
    files = _side_files(source, task)
    record: dict[str, Any] = {
        "extracted": {
            "output": source.folder.resolve().name,
            "task": task,
            "models": source.models,
            **source.origin,
            "left_out": left_out,
            "sources": recorded_sources(read_json(source.folder / RECORD)),
        },
        "notes": _notes(source.models, files),
        "versions": versions(),
    }
    check_outside(resolved(out), [source.folder])
    with atomic_folder(out, force) as target:
        given = _finite(tensors, source.folder)
        digests = write_folders(target, layout, lambda wanted: given, source.module_paths())
        for file, name in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target / name)  # with its permissions
        if config:
            write_json(target / CONFIG, config)
        if apart:
            beside = target / "heads" / task
            beside.mkdir(parents=True)
            shutil.copy(source.head_file(task), beside)
            write_json(beside / CONFIG, source.config(task))
        write_card(target, record)
        write_record(target, record, digests)
    return record


def _finite(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield name, check_finite(tensor, name, str(folder))


def _classifier_config(source: Bundle | Merged, task: str, layout: Layout) -> dict[str, Any]:
    """The expert's configuration, with the class that the weights are of and their dtype."""
    config = dict(source.config(task) or read_json(source.folder / CONFIG))
    if source.models and not any(part in classes_of(config) for part in FAMILIES[source.models].architectures):
        config["architectures"] = [type(empty(config, source.models, source.folder)).__name__]
    return _in_dtype(config, layout)


def _zero_shot_config(source: Bundle | Merged, task: str) -> dict[str, Any]:
    """The whole CLIP's configuration, with the task's classes and templates."""
    of_task = source.config(task)
    names = ("id2label", "label2id", "prompt_templates")
    labels = {name: of_task[name] for name in names if name in of_task}
    return {**read_json(source.folder / CONFIG), **labels}


def _in_dtype(config: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """A configuration that names the dtype which most of the weights have, if it names one."""
    key = next((key for key in ("dtype", "torch_dtype") if config.get(key)), None)
    counts = Counter(dtype for _, dtype in layout.values() if dtype.is_floating_point)
    if key is None or not counts:
        return config
    return {**config, key: str(counts.most_common(1)[0][0]).removeprefix("torch.")}


def _side_files(source: Bundle | Merged, task: str) -> dict[Path, str]:
    """File -> its path in the new folder: all that lies beside weights, but for the configuration."""
    files = {file: file.name for file in source.side_files(task) if file.name != CONFIG}
    modules = source.module_files()
    if not modules:  # a classifier on a sentence encoder's transformer is none
        files = {file: name for file, name in files.items() if name not in ROOT_FILES}
    return files | {file: file.relative_to(source.folder).as_posix() for file in modules}


def _notes(models: str | None, files: Mapping[Path, str]) -> list[str]:
    """What inputs would need to be prepared with and the output does not hold, in sentences."""
    if models not in FAMILIES:
        return []
    if not FAMILIES[models].paths:  # of images paths stand in the data's columns
        lacking = [] if tokenizer_files(files) else ["no tokenizer"]
    else:
        lacking = [] if set(files.values()) & set(_PROCESSORS) else ["no image processor (preprocessor_config.json)"]
    return [f"The output holds {what}: copy the expert's files into the new folder." for what in lacking]
