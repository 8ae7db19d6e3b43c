"""Checkpoints on disk, read lazily tensor by tensor. Nothing here ever runs code from a file.

A `Checkpoint` knows every tensor's name, shape, dtype and file from the headers alone; `read` maps one
tensor into memory. safetensors files (one or sharded) are mapped, so their bytes are not copied; legacy
`.bin`, `.pt` and `.pth` files are read by PyTorch's weights-only reader.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adarank.errors import CheckpointError, OutputError, RecipeError, itemise

LEGACY = (".bin", ".pt", ".pth")
# What PyTorch's weights-only reader raises on bytes that are no pickle of its own.
DAMAGED = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Source(Protocol):
    """Named tensors that can be read one at a time: a checkpoint, or a state dict in memory."""

    @property
    def label(self) -> str: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def aliases(self) -> Mapping[str, str]: ...

    def read(self, name: str) -> Tensor:
        """The tensor as stored. It may be a view of a mapped file: never write to it."""
        ...


class MemorySource:
    """A state dict as a `Source`."""

    def __init__(self, state: Mapping[str, Tensor], label: str) -> None:
        self.label = label
        self._state = dict(state)
        self.tensors = {n: TensorInfo(n, tuple(t.shape), t.dtype, label) for n, t in self._state.items()}
        self.aliases = _shared_storage(self._state)

    def read(self, name: str) -> Tensor:
        return self._state[name].detach()


class Checkpoint:
    """A checkpoint on disk as a `Source`.

    Arguments:
        path: a folder in Hugging Face layout, or one weights file.

    Attributes:
        tensors: name -> `TensorInfo` of every stored tensor.
        aliases: name -> the name it shares storage with, for tied weights of legacy files.
        config: the folder's `config.json`, or an empty dict.

    Raises:
        CheckpointError: no weights, a damaged file, a missing shard, or a pickle that needs to run code.
    """

    def __init__(self, path: str | Path, label: str | None = None) -> None:
        self.path = Path(path)
        self.label = label or str(path)
        self.folder = self.path if self.path.is_dir() else self.path.parent
        self.files = _weight_files(self.path)
        self.tensors: dict[str, TensorInfo] = {}
        self.aliases: dict[str, str] = {}
        self._handles: dict[str, Any] = {}
        for file in self.files:
            self._open(file)
        self._check_index()
        self.config: dict[str, Any] = _read_json(self.folder / "config.json") if self.path.is_dir() else {}

    def read(self, name: str) -> Tensor:
        info = self.tensors[name]
        handle = self._handles[info.file]
        tensor: Tensor = handle[name] if isinstance(handle, dict) else handle.get_tensor(name)
        return tensor

    @property
    def companions(self) -> Path:
        """The folder whose tokenizer or image processor goes with the weights."""
        return self.folder

    @property
    def making_bytes(self) -> int:
        """Memory that tensors take to be made which are in no file."""
        return 0

    @property
    def unused(self) -> Mapping[str, str]:
        """What is in the files and not among the tensors -> why."""
        return {}

    def sha256(self) -> dict[str, str]:
        """File name -> SHA-256, for every weights file and the configuration."""
        config = self.folder / "config.json"
        files = [*self.files, *([config] if self.path.is_dir() and config.exists() else [])]
        return {file.name: file_sha256(file) for file in files}

    def side_files(self) -> list[Path]:
        """Configuration, tokenizer and processor files: what a loadable copy of the folder needs beside weights."""
        if not self.path.is_dir():
            return []
        return sorted(f for f in self.folder.iterdir() if f.is_file() and f.suffix in (".json", ".txt", ".model", ".jinja")
                      and not f.name.endswith(".index.json") and f.name != "adarank.json")  # fmt: skip

    def _open(self, file: Path) -> None:
        if file.suffix in LEGACY:
            self._open_legacy(file)
        else:
            self._open_safetensors(file)

    def _open_safetensors(self, file: Path) -> None:
        try:
            handle = safe_open(str(file), framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: not a whole safetensors file ({error}). Copy or download it again."
            ) from None
        for name in handle.keys():  # noqa: SIM118 (no iterator)
            view = handle.get_slice(name)
            if view.get_dtype() not in DTYPES:
                raise CheckpointError(
                    f"{file}: tensor '{name}' has dtype {view.get_dtype()}, and adarank reads {', '.join(DTYPES)}. De-quantise the checkpoint first."
                )
            self._add(TensorInfo(name, tuple(view.get_shape()), DTYPES[view.get_dtype()], str(file)))
        self._handles[str(file)] = handle

    def _open_legacy(self, file: Path) -> None:
        state = _load_legacy(file)
        for name, tensor in state.items():
            self._add(TensorInfo(name, tuple(tensor.shape), tensor.dtype, str(file)))
        self.aliases.update(_shared_storage(state))
        self._handles[str(file)] = state

    def _add(self, info: TensorInfo) -> None:
        if info.name in self.tensors:
            raise CheckpointError(
                f"{info.file}: tensor '{info.name}' is also in {self.tensors[info.name].file}. Remove the stale file."
            )
        self.tensors[info.name] = info

    def _check_index(self) -> None:
        """Every tensor that a shard index promises must be in the shard that it names."""
        index = next(iter(sorted(self.folder.glob("*.index.json"))), None) if self.path.is_dir() else None
        if index is None or len(self.files) == 0 or index.name.rsplit(".", 3)[1] not in self.files[0].name:
            return
        wanted = _read_json(index).get("weight_map", {})
        lost = [f"{n}: not in {f}" for n, f in wanted.items() if n not in self.tensors]
        if lost:
            raise CheckpointError(itemise(f"{index}: {len(lost)} tensor(s) missing from the shards.", lost,
                                          "Download the shards again.", 20))  # fmt: skip


def _shared_storage(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> the earlier name whose memory it shares entirely: the tied weights of a state dict."""
    places: dict[tuple[Any, ...], str] = {}
    aliases = {}
    for name, tensor in state.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        first = places.setdefault(place, name)
        if first != name and tensor.numel():
            aliases[name] = first
    return aliases


def _weight_files(path: Path) -> list[Path]:
    """The weights files of a checkpoint, safetensors before legacy formats."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint. Give a folder in Hugging Face layout or a weights file.")
    if path.is_file():
        if path.suffix not in (*LEGACY, ".safetensors"):
            raise CheckpointError(f"{path}: not a weights file. Give .safetensors, .bin, .pt or .pth, or the folder.")
        return [path]
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        if (path / f"{stem}.{suffix}.index.json").exists():
            return _shards(path / f"{stem}.{suffix}.index.json")
        if (path / f"{stem}.{suffix}").exists():
            return [path / f"{stem}.{suffix}"]
    if (path / "adapter_config.json").exists():
        raise CheckpointError(
            f"{path}: an adapter (adapter_config.json) without the model that it changes. Merge it into its model first, with peft's merge_and_unload, and give the folder that save_pretrained writes then."
        )
    found = sorted(f for f in path.iterdir() if f.suffix in (".safetensors", *LEGACY) and f.name != "training_args.bin")
    if len(found) == 1:
        return found
    if not found:
        raise CheckpointError(
            f"{path}: no weights. Needed: model.safetensors, its sharded form with model.safetensors.index.json, or pytorch_model.bin."
        )
    names = ", ".join(f.name for f in found)
    raise CheckpointError(
        f"{path}: several weights files and no index ({names}). Give one of the files instead of the folder."
    )


def _shards(index: Path) -> list[Path]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index}: no 'weight_map' in the shard index. Download it again.")
    shards = [index.parent / name for name in sorted(set(weight_map.values()))]
    lost = [str(shard) for shard in shards if not shard.exists()]
    if lost:
        raise CheckpointError(
            itemise(f"{index}: {len(lost)} of {len(shards)} shard(s) missing:", lost, "Download them.")
        )
    return shards


def _load_legacy(file: Path) -> dict[str, Tensor]:
    """A pickled state dict, read without running any code from it."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0][:160]
        raise CheckpointError(
            f"{file}: this pickle needs to run code to load, which adarank never does ({reason}). If you trust its origin, "
            f"convert it once in an isolated environment: torch.load('{file.name}', weights_only=False), then "
            "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')."
        ) from None
    except DAMAGED as error:
        raise CheckpointError(
            f"{file}: damaged weights file ({str(error)[:160]}). Copy or download it again."
        ) from None
    for wrapper in ("state_dict", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{file}: not a state dict of tensors. Save model.state_dict() with safetensors.")
    return {str(name): tensor for name, tensor in state.items()}


def _is_zip(file: Path) -> bool:
    with file.open("rb") as handle:
        return handle.read(4) == b"PK\x03\x04"


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({error}). Copy or download it again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a JSON object was needed, got a {type(content).__name__}.")
    return content


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        for block in iter(lambda: handle.read(1 << 22), b""):
            digest.update(block)
    return digest.hexdigest()


def check_finite(tensor: Tensor, name: str, file: str) -> Tensor:
    """`tensor`, or a `CheckpointError` that counts its NaN and infinite entries."""
    if not tensor.is_floating_point() or tensor.sum(dtype=torch.float32).isfinite():
        return tensor  # one pass, no copy; a sum that overflows is looked at again below
    bad = int(tensor.numel() - torch.isfinite(tensor).sum())
    if bad == 0:
        return tensor
    raise CheckpointError(
        f"{file}: tensor '{name}' has {bad} NaN or infinite value(s) of {tensor.numel()}. "
        "A merge would spread them to every task: use an earlier checkpoint of this model."
    )


def check_result(tensor: Tensor, name: str, by: str) -> Tensor:
    """A merged tensor, or an error that names what made it: values are finite, and variances not negative.

    Raises:
        CheckpointError: NaN or infinite values.
        RecipeError: negative running variances: a root of them would be NaN, and so every logit.
    """
    if name.endswith("running_var") and bool((tensor < 0).any()):
        raise RecipeError(
            f"{name}: {by} has negative variances. Lower λ, or keep the base's by select: keep: ['*.running_*']."
        )
    return check_finite(tensor, name, by)


def cast(tensor: Tensor, dtype: torch.dtype, name: str, remedy: str) -> Tensor:
    """`tensor` as another dtype. A float16 ends at 65,504: what is beyond it would become infinite without a word.

    Raises:
        OutputError: the dtype cannot hold a value; ends with the remedy.
    """
    found = tensor.to(dtype)
    if found.dtype != tensor.dtype and found.is_floating_point() and not torch.isfinite(found).all():
        raise OutputError(f"'{name}' has values that {NAMES[dtype]} cannot hold. {remedy}")
    return found
