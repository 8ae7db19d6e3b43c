"""A module of a task's architecture: made from its configuration, filled with a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adarank.alignment.layers import DEPTHS
from adarank.errors import CheckpointError
from adarank.models import FAMILIES, foreign_code, kind_of
from adarank.models.loading import LOCALLY, loader_report, loading


def empty(config: Mapping[str, Any], kind: str | None, where: Path, tensors: int | None = None) -> nn.Module:
    """A module of a task's architecture, its weights yet to be filled.

    Arguments:
        config: the `config.json` of the task's expert.
        kind: what the models do, if it is known; else the configuration tells.
        tensors: how many are there to fill it with, if that is known.

    Raises:
        CheckpointError: the configuration tells no class of `transformers`, or of more layers than there are tensors.
    """
    import transformers

    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    if "model_type" not in config:
        raise CheckpointError(f"{where}: config.json of the expert ({name or 'no architecture'}) names no model_type.")
    layers = max((config[key] for key in DEPTHS if isinstance(config.get(key), int)), default=0)
    if tensors is not None and layers > tensors:  # else thousands of layers would be made first
        raise CheckpointError(
            f"{where}: config.json of the expert tells of {layers} layers, but there are {tensors} tensors. Merge again."
        )
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
    _refuse_missing(sorted(loaded["missing_keys"]), what)
    network: nn.Module = made.eval()
    return network


def used_names(module: nn.Module, shapes: Mapping[str, Sequence[int]], what: str) -> set[str]:
    """Those of a checkpoint's tensors that a module has a place for, as the loader of `transformers` tells.

    Raises:
        CheckpointError: a tensor of the module is not among them.
    """
    loaded, missing, surplus = loader_report(module, shapes)
    _refuse_missing(missing, what)

    def unused(name: str) -> bool:  # what the loader joins with others is in neither list
        return name not in loaded and any(name == other or name.endswith(f".{other}") for other in surplus)

    return {name for name in shapes if not unused(name)}


def _refuse_missing(missing: Sequence[str], what: str) -> None:
    if missing:
        raise CheckpointError(f"{what} needs {len(missing)} tensor(s) that are not there, such as '{missing[0]}'.")
