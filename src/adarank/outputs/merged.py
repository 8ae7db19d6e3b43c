"""A merged output, loaded for one of its tasks: body, the task's head and its configuration in one module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adarank.errors import CheckpointError
from adarank.io.checkpoint import Checkpoint
from adarank.io.files import open_safetensors, read_json
from adarank.io.hub import local_path
from adarank.io.writer import BUNDLE, RECORD
from adarank.models import FAMILIES, foreign_code, kind_of
from adarank.models.loading import LOCALLY, loading
from adarank.settings import nearest


def load_task(out: str | Path, task: str) -> nn.Module:
    """The merged model of an output folder with one task's head, in evaluation mode.

    Save it with `save_pretrained` to deploy it alone.

    Arguments:
        out: a folder written by `adarank merge`.
        task: one of its tasks.

    Returns:
        A module of `transformers` with the merged body and the task's head, in float32.

    Raises:
        CheckpointError: no such output or task, or its tensors do not fit the task's architecture.

    Example:
        model = adarank.load_task("merged", "sentiment")
        logits = model(input_ids=torch.tensor([[2, 5, 6, 3]])).logits  # (1, classes)
    """
    folder = Path(out)
    local_path(folder)
    if (folder / BUNDLE).exists():
        raise CheckpointError(f"{folder}: a bundle, with weights for each task. Use adarank.from_bundle.")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Give what `adarank merge` wrote.")
    heads = folder / "heads"
    known = sorted(p.name for p in heads.iterdir()) if heads.is_dir() else []
    if task not in known:
        raise CheckpointError(
            f"{folder}: no head of task '{task}'.{nearest(task, known) if known else ' It has no heads.'}"
        )
    module = empty(read_json(heads / task / "config.json"), _kind(folder), folder)
    with open_safetensors(heads / task / "head.safetensors") as handle:
        head = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no iterator)
        backbone = (handle.metadata() or {}).get("backbone", "")
    wanted = set(module.state_dict())
    body = Checkpoint(folder)
    state = {name if name in wanted else backbone + name: body.read(name) for name in body.tensors}
    return filled(module, {**state, **head}, f"{folder}: task '{task}'")


def _kind(out: Path) -> str | None:
    """What the models of an output do, as its record says."""
    plan = read_json(out / RECORD).get("plan")
    kind = plan.get("kind") if isinstance(plan, dict) else None
    return kind


def empty(config: Mapping[str, Any], kind: str | None, where: Path) -> nn.Module:
    """A module of a task's architecture, its weights yet to be filled.

    Arguments:
        config: the `config.json` of the task's expert.
        kind: what the models do, if it is known; else the configuration tells.

    Raises:
        CheckpointError: the configuration tells no class of `transformers`.
    """
    import transformers

    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    if "model_type" not in config:
        raise CheckpointError(f"{where}: config.json of the expert ({name or 'no architecture'}) names no model_type.")
    foreign = foreign_code(config)
    if foreign:
        raise CheckpointError(f"{where}: {foreign}, and adarank never runs code of a checkpoint.")
    if kind is not None and kind not in FAMILIES:
        raise CheckpointError(f"{where}: models of the kind {kind!r}; known are {', '.join(FAMILIES)}. Merge again.")
    kind = kind or kind_of(config)
    if kind is None and not hasattr(transformers, name):
        raise CheckpointError(
            f"{where}: config.json of the expert names no class of transformers (architectures: {name or 'none'})."
        )
    auto: Any = FAMILIES[kind].auto_class() if kind else getattr(transformers, name)
    with (
        torch.random.fork_rng(),
        loading(where, f"no {name or auto.__name__} can be made", "Check config.json of the expert."),
    ):
        settings = transformers.AutoConfig.for_model(**config)
        module: nn.Module = auto.from_config(settings, trust_remote_code=False) if kind else auto(settings)
    return module


def filled(module: nn.Module, state: dict[str, Tensor], what: str) -> nn.Module:
    """A module of the same class and configuration with the tensors of `state`, in float32 and evaluation mode.

    Raises:
        CheckpointError: a tensor of the module is not in `state`.
    """
    kind: Any = type(module)
    # its loader knows the names that it gives tensors of some architectures
    with loading(Path(what), "its tensors do not fit its configuration", "Merge again."):
        made, loaded = kind.from_pretrained(
            None, config=module.config, state_dict=state, dtype=torch.float32, output_loading_info=True, **LOCALLY
        )
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise CheckpointError(f"{what} needs {len(missing)} tensor(s) that are not there, such as '{missing[0]}'.")
    network: nn.Module = made.eval()
    return network
