"""Around the loaders of `transformers`: quiet, offline, without code of a checkpoint, their errors as sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adarank.errors import AdaRankError, CheckpointError
from adarank.io.hub import offline

# Arguments of every loader of `transformers`: no code of a checkpoint runs, no prompt is shown, nothing is downloaded.
LOCALLY: Mapping[str, Any] = {"trust_remote_code": False, "local_files_only": True}


@contextmanager
def loading(folder: Path, failure: str, remedy: str) -> Iterator[None]:
    """Around a loader of `transformers`: it is quiet, asks nobody, and what it raises becomes a sentence.

    Arguments:
        failure: what the sentence says of the folder, such as `no usable tokenizer`.

    Raises:
        CheckpointError: the loader gave up.
    """
    try:
        with quiet_transformers():
            yield
    except AdaRankError:
        raise
    except Exception as error:  # of damaged files its loaders, and the parsers below them, raise every class there is
        raise CheckpointError(f"{folder}: {failure} ({_why(error)}). {remedy}") from error


def _why(error: Exception) -> str:
    """Why a loader gave up, in a line."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, auto_map, which adarank never runs"
    text = " ".join(str(error).split())[:200]
    return text if type(error) in (OSError, ValueError, RuntimeError) and text else f"{type(error).__name__}: {text}"


def loaded_names(module: nn.Module, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Name in a checkpoint -> name in the module that `transformers` loads it into.

    Its loader renames tensors of some architectures. To learn how, it is given a checkpoint in which every tensor
    is filled with a number of its own; where these numbers come out is where the tensors went.
    """
    return loader_report(module, shapes)[0]


def loader_report(
    module: nn.Module, shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, str], list[str], list[str]]:
    """What the loader of `transformers` would do with a checkpoint of these tensors: as `loaded_names`, and what it lacks.

    Returns:
        Name in the checkpoint -> name in the module; names of the module's tensors that the checkpoint does not give;
        names that the loader has no place for, as it calls them.
    """
    first = 1000  # no constant that fresh weights are filled with
    numbered = dict(enumerate(shapes, first))
    probe = {name: torch.tensor(float(i)).expand(tuple(shapes[name])) for i, name in numbered.items()}
    keys: dict[str, str] = {}
    folder = Path(getattr(module.config, "name_or_path", "") or type(module).__name__)
    with loading(folder, "no usable configuration", "Check config.json."), torch.random.fork_rng():
        loader: Any = type(module)
        tried, report = loader.from_pretrained(
            None, config=module.config, state_dict=probe, dtype=torch.float32, output_loading_info=True, **LOCALLY
        )
    for key, tensor in tried.state_dict().items():
        number = float(tensor.flatten()[0]) if tensor.is_floating_point() and tensor.numel() else 0.0
        name = numbered.get(int(number)) if math.isfinite(number) else None
        if name and tuple(tensor.shape) == tuple(shapes[name]) and bool((tensor == number).all()):
            keys[name] = key
    return keys, sorted(report["missing_keys"]), sorted(report["unexpected_keys"])


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no notes on missing heads from its loader, and no question to the hub."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with offline():
            yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
