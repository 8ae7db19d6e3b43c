"""Folders of LoRA adapters as `peft` writes them: which of their tensors is what. Only safetensors and JSON are read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from adarank.errors import CheckpointError, itemise
from adarank.io.adapter_config import CONFIG, AdapterConfig, read_adapter_config
from adarank.io.checkpoint import Checkpoint, check_finite

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."  # what peft puts before the names of the model that it wraps
_PART = re.compile(r"^(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(?:\.(?!bias$)[^.]+)?(?:\.weight)?$")
_TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class Layer:
    """The low-rank part of one layer, as an adapter's file has it.

    Attributes:
        name: of the layer in the model.
        depth: how many wrappers of other parameters of the same layer are around it.
        keys: part (`A`, `B`, `magnitude_vector`; of an embedding `embedding_A`, `embedding_B`) -> name in the file.
    """

    name: str
    depth: int
    keys: Mapping[str, str]

    @property
    def embedding(self) -> bool:
        """Whether it is of an embedding table."""
        return "embedding_A" in self.keys

    def key(self, part: str) -> str:
        """The name in the file of A or B."""
        return self.keys[f"embedding_{part}" if self.embedding else part]


class Adapter:
    """A folder of an adapter, its headers read.

    Arguments:
        folder: with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

    Attributes:
        config: how its tensors are meant.
        layers: the low-rank parts.
        whole: name in the model -> name in the file, of tensors that take the place of the model's: modules_to_save,
            trained biases, resized tables.
        tokens: name of an embedding in the model -> name in the file of its trained rows.
        unused: name in the file -> why it is not used.

    Raises:
        CheckpointError: it is no LoRA that is read, or its file is damaged or holds something else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: AdapterConfig = read_adapter_config(folder)
        file = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
        if file is None:
            raise CheckpointError(
                f"{folder}: an adapter without weights ({' or '.join(WEIGHTS)}). Copy or download it again."
            )
        self.file, self.weights = file, Checkpoint(file)
        self.whole: dict[str, str] = {}
        self.tokens: dict[str, str] = {}
        self.unused: dict[str, str] = {}
        parts: dict[str, dict[str, str]] = {}
        unknown = []
        for key in self.weights.tensors:
            name = key.removeprefix(PREFIX)
            part = _PART.match(name)
            if part:
                parts.setdefault(part[1], {})[part[2]] = key
            elif name.endswith(_TOKENS):
                self.tokens[_plain(name.removesuffix(_TOKENS))] = key
            elif ".original_module." in name:
                self.unused[key] = "the model's own, beside what was trained"
            elif "lora_" in name or "token_adapter" in name:
                unknown.append(key)
            elif _plain(name) not in self.whole or ".modules_to_save." not in name:  # a bias may be there as both
                self.whole[_plain(name)] = key
        self.layers = tuple(Layer(_plain(name), name.count(".base_layer"), keys) for name, keys in parts.items())
        self._check(unknown)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor in the file."""
        return self.weights.tensors[key].shape

    def read(self, key: str) -> Tensor:
        """A tensor of the file, as stored; a `CheckpointError` if it is not finite."""
        return check_finite(self.weights.read(key), key, str(self.file))

    def _check(self, unknown: Sequence[str]) -> None:
        problems = [f"{key}: not known here" for key in unknown]
        factors = (key for layer in self.layers for part, key in layer.keys.items() if part != "magnitude_vector")
        shards = [key for key in factors if len(self.shape(key)) < 2 or 0 in self.shape(key)]
        problems += [
            f"{key}: {self.shape(key)}, a part of a matrix: gather shards before save_pretrained" for key in shards
        ]
        for layer in self.layers:
            wanted = ({"embedding_A", "embedding_B"} if layer.embedding else {"A", "B"}) | (
                {"magnitude_vector"} if self.config.decomposed else set()
            )
            if set(layer.keys) != wanted:
                problems.append(
                    f"{layer.name}: {', '.join(sorted(layer.keys))} where {', '.join(sorted(wanted))} are needed"
                )
        if problems:
            raise CheckpointError(
                itemise(
                    f"{self.file}: tensors that are no LoRA's:",
                    problems,
                    "Copy the adapter again, or merge it first with peft's merge_and_unload.",
                )
            )


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    models = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return path.is_dir() and (path / CONFIG).exists() and not any((path / name).exists() for name in models)


def _plain(name: str) -> str:
    """A name without the parts that peft's wrappers put into it."""
    return name.replace(".base_layer", "").replace(".modules_to_save", "")
