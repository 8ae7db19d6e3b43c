"""Checkpoints of open_clip, task_vectors and TALL-masks, and of torch.distributed.checkpoint, as folders that adarank reads, and `transformers` or
open_clip."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from adarank.errors import CheckpointError
from adarank.io.checkpoint import Checkpoint, check_any, check_finite
from adarank.io.distributed import is_distributed
from adarank.io.files import file_sha256
from adarank.io.hub import local_path
from adarank.io.lock import resolved
from adarank.io.output_folder import check_outside
from adarank.io.pickled import LEGACY
from adarank.io.pickled_modules import load_module_state
from adarank.io.record import versions
from adarank.io.writer import Layout, atomic_folder, write_checkpoint, write_json, write_record
from adarank.models.image import PROCESSOR_FILES
from adarank.models.open_clip import (
    SETTINGS_FILE,
    OpenClipSettings,
    Shapes,
    from_open_clip,
    vision_config,
    without_prefix,
)

ConvertLayout = Literal["transformers", "open_clip"]


def convert(
    file: str | Path, out: str | Path, force: bool = False, layout: ConvertLayout = "transformers"
) -> dict[str, Any]:
    """Write an open_clip checkpoint as a folder: weights as safetensors, configuration, settings of the image processor.

    A folder of torch.distributed.checkpoint is written as safetensors: its model's tensors under their names, whole, and the
    configuration and tokenizer files that lie beside them.

    Arguments:
        file: such a folder; or what `torch.save` wrote of a module or its state dict (`finetuned.pt` of task_vectors and TALL-masks), or
            safetensors. Nothing of a pickle's code is imported or run.
        out: the folder to write.
        force: replace `out` if adarank wrote it.
        layout: `transformers` has q, k and v apart and projections transposed, and loads there. `open_clip` keeps every
            tensor as it is, under open_clip's own names: q, k and v in one matrix, which is decomposed as one, as in
            the papers' code.

    Returns:
        The record: `converted` (file, its SHA-256, architecture, number of tensors), versions.

    Raises:
        CheckpointError: the file is damaged, or no CLIP of open_clip's layout.
        OutputError: `out` exists, or cannot be written.

    Example:
        adarank.convert("ViT-B-32/SUN397/finetuned.pt", "sun397")
    """
    source = local_path(file)
    if is_distributed(source):
        return _dense(Checkpoint(source, str(file)), Path(out), force)
    if not source.is_file():
        raise CheckpointError(f"{source}: no such file. Give a checkpoint of open_clip, such as finetuned.pt.")
    if layout not in get_args(ConvertLayout):
        raise CheckpointError(f"convert: layout {layout!r}. Give one of {', '.join(get_args(ConvertLayout))}.")
    state = _state(source)
    settings = OpenClipSettings.beside(source.parent)
    shapes = {name: tuple(tensor.shape) for name, tensor in without_prefix(state, str(source)).items()}
    tensors, configuration, architecture = _laid_out(state, shapes, settings, layout, str(source))
    record: dict[str, Any] = {
        "converted": {
            "file": source.name,
            "sha256": file_sha256(source),
            "architecture": architecture,
            "tensors": len(tensors),
        },
        "versions": versions(),
    }
    of_tensors: Layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    processor = settings.processor(vision_config(shapes, settings, str(source))["image_size"])
    check_outside(resolved(Path(out)), [source])
    with atomic_folder(Path(out), force) as folder:
        write_checkpoint(folder, of_tensors, ((n, check_finite(t, n, str(source))) for n, t in tensors.items()))
        for name, content in {**configuration, PROCESSOR_FILES[0]: processor}.items():
            write_json(folder / name, content)
        write_record(folder, record)
    return record


def _dense(stored: Checkpoint, out: Path, force: bool) -> dict[str, Any]:
    """A sharded checkpoint as safetensors, one tensor in memory at a time."""
    check_any(stored)
    layout: Layout = {name: (info.shape, info.dtype) for name, info in stored.tensors.items()}
    record: dict[str, Any] = {
        "converted": {
            "file": stored.path.name,
            "sha256": stored.sha256(),
            "architecture": next(iter(stored.config.get("architectures", ())), "a state dict"),
            "tensors": len(layout),
            "left_out": dict(stored.unused),
        },
        "versions": versions(),
    }
    check_outside(resolved(out), [stored.path])
    with atomic_folder(out, force) as folder:
        write_checkpoint(
            folder, layout, ((name, check_finite(stored.read(name), name, stored.label)) for name in layout)
        )
        for file in stored.side_files():
            shutil.copy(file, folder / file.name)  # with its permissions
        write_record(folder, record)
    return record


def _state(source: Path) -> dict[str, Tensor]:
    if source.suffix in LEGACY:
        return load_module_state(source)
    stored = Checkpoint(source)
    return {name: stored.read(name) for name in stored.tensors}


def _laid_out(
    state: Mapping[str, Tensor], shapes: Shapes, settings: OpenClipSettings, layout: ConvertLayout, where: str
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]], str]:
    """Tensors, configuration (file -> content), and what the model is called."""
    if layout == "open_clip":
        tensors = {name: tensor.contiguous() for name, tensor in without_prefix(state, where).items()}
        return tensors, {SETTINGS_FILE: settings.as_file(shapes, where)}, "CLIP of open_clip"
    tensors, config = from_open_clip(state, where, settings)
    return tensors, {"config.json": config}, config["architectures"][0]
