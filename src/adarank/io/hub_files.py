"""Which files of a repository on the hub a merge uses: one set of weights, the small files beside them, and the card for
its licence. Never code."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from adarank.io.cards import CARD
from adarank.io.side_files import PATTERNS as BESIDE

ANY = ["*.safetensors", "*.bin", "*.json", "*.jinja", CARD, *BESIDE]  # where the hub does not list a repository's files
_WEIGHTS = (  # the first kind that is there is the one that is read
    ("model.safetensors", "model-*.safetensors"),
    ("*.safetensors",),
    ("pytorch_model.bin", "pytorch_model-*.bin"),
    ("*.bin", "*.pt", "*.pth"),
)
_ADAPTER = (("adapter_model.safetensors",), ("adapter_model.bin",))
_OF_TRAINERS = ("training_args.bin", "optimizer.*", "scheduler.*", "rng_state*", "scaler.*", "trainer_state.json")
_MODULE = re.compile(r"\d+_\w+/")  # of sentence encoders


def used_files(names: Iterable[str], folder: str = "", adapter: bool = False) -> list[str]:
    """Of the files that a repository lists, those that a merge of the model in `folder` uses.

    Arguments:
        adapter: what is there is used as an adapter: its weights go before a model's.

    Example:
        used_files(["config.json", "model.safetensors", "pytorch_model.bin"]) == ["config.json", "model.safetensors"]
    """
    prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    used = _of_one_folder([name for name in inside if "/" not in name], adapter)
    if "modules.json" in used:
        modules = sorted({place[0] for name in inside if (place := _MODULE.match(name))})
        used += [name for place in modules for name in used_files(inside, place)]
    return [prefix + name for name in used]


def _of_one_folder(names: list[str], adapter: bool = False) -> list[str]:
    names = [name for name in names if not _like(name, _OF_TRAINERS)]
    of_models = _ADAPTER if adapter else (_WEIGHTS[0], *_ADAPTER, *_WEIGHTS[1:])
    kinds = ([name for name in names if _like(name, patterns)] for patterns in of_models)
    weights = next((kind for kind in kinds if kind), [])
    ends = tuple({f".{name.rsplit('.', 1)[1]}.index.json" for name in weights if not name.startswith("adapter_model")})
    beside = [
        name for name in names if (name.endswith(".json") or _like(name, (CARD, *BESIDE))) and name not in weights
    ]
    return [*weights, *(name for name in beside if ".index." not in name or name.endswith(ends))]


def _like(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
