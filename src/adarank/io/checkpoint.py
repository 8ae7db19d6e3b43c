"""Checkpoints on disk, read lazily tensor by tensor. Nothing here ever runs code from a file.

A `Checkpoint` knows every tensor's name, shape, dtype and file from the headers alone; `read` maps one
tensor into memory. safetensors files (one or sharded) are mapped, so their bytes are not copied; legacy
`.bin`, `.pt` and `.pth` files are read by PyTorch's weights-only reader; tensors of folders that torch.distributed.checkpoint
wrote are put together of their parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from adarank.errors import CheckpointError, OutputError, RecipeError, itemise, reading
from adarank.io.distributed import METADATA, DistributedFile, is_distributed
from adarank.io.files import MappedFile, file_sha256, open_safetensors, read_json
from adarank.io.finite import all_finite
from adarank.io.hub import local_path
from adarank.io.low_rank import Factors
from adarank.io.pickled import LEGACY, check_members, load_pickled, shared_storage
from adarank.io.quantised import DEQUANTISE, FLOAT8, method_beside, method_in
from adarank.io.sentence import Module, modules_of
from adarank.io.side_files import side_files
from adarank.io.weight_files import weight_files, weight_map_of

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
}  # fmt: skip
_READ = {**DTYPES, **FLOAT8}
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
        """Number of entries."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Size in bytes, as stored."""
        return self.numel * self.dtype.itemsize


class Source(Protocol):
    """Named tensors that can be read one at a time: a checkpoint, or a state dict in memory."""

    @property
    def label(self) -> str:
        """What error sentences call it."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name -> shape, dtype and file of every tensor."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Name -> the name of the tensor that shares its storage."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration of the architecture, as far as it is known."""

    @property
    def quantisation(self) -> str | None:
        """The method by which the configuration says that weights are quantised."""

    @property
    def modules(self) -> Sequence[Module]:
        """What comes after the transformer in a sentence encoder's folder."""

    def read(self, name: str) -> Tensor:
        """The tensor as stored. It may be a view of a mapped file: never write to it."""

    def change(self, name: str, start: Source, stored: str) -> Factors | None:
        """What is added to tensor `stored` of `start`, as factors, where this is `start` with an adapter; else None."""

    def change_rank(self, name: str, start: Source, stored: str) -> int | None:
        """The most that the rank of `change` can be, from headers alone; None where that is None."""


class _Whole:
    """What is no adapter, so that nothing is known of how it came from another model."""

    def change(self, name: str, start: Source, stored: str) -> Factors | None:
        """None: it is no adapter."""
        return None

    def change_rank(self, name: str, start: Source, stored: str) -> int | None:
        """None: it is no adapter."""
        return None


class MemorySource(_Whole):
    """A state dict as a `Source`."""

    def __init__(self, state: Mapping[str, Tensor], label: str) -> None:
        self.label = label
        self._state = dict(state)
        self.tensors = {n: TensorInfo(n, tuple(t.shape), t.dtype, label) for n, t in self._state.items()}
        self.aliases = shared_storage(self._state)
        self.config: Mapping[str, Any] = {}
        self.quantisation: str | None = None
        self.modules: Sequence[Module] = ()
        self.in_place = True

    def read(self, name: str) -> Tensor:
        """The tensor of this name."""
        return self._state[name].detach()


class Checkpoint(_Whole):
    """A checkpoint on disk as a `Source`.

    Arguments:
        path: a folder in Hugging Face layout, one of torch.distributed.checkpoint, or one weights file.

    Attributes:
        tensors: name -> `TensorInfo` of every stored tensor. Those of a sentence encoder's further modules have their
            folder before their name: `2_Dense/linear.weight`.
        aliases: name -> the name it shares storage with, for tied weights of legacy files.
        config: the folder's `config.json`, or an empty dict.
        in_place: what is read lies in a mapped file or in memory, so that holding it costs nothing.

    Raises:
        CheckpointError: no weights, a damaged file, a missing shard, or a pickle that needs to run code.
    """

    in_place: bool = True
    _unused: Mapping[str, str] = MappingProxyType({})

    def __init__(self, path: str | Path, label: str | None = None) -> None:
        self.path = local_path(path)
        self.label = label or str(path)
        self.folder = self.path if self.path.is_dir() else self.path.parent
        with reading(CheckpointError, self.path):
            self.files = weight_files(self.path)
        self.tensors: dict[str, TensorInfo] = {}
        self.aliases: dict[str, str] = {}
        self._handles: dict[str, Any] = {}
        self._inside: dict[str, str] = {}  # name -> name in its file, where that is another
        self._sha256: dict[str, str] = {}
        self._unchecked: set[str] = set()  # archives whose tensors' bytes have not been compared with their CRC-32
        self.in_place = not (self.path.is_dir() and is_distributed(self.path))
        if self.in_place:
            for file in self.files:
                self._open(file)
        else:
            self._open_distributed()
        self._check_index()
        self.config: dict[str, Any] = read_json(self.folder / "config.json") if self.path.is_dir() else {}
        self.modules: tuple[Module, ...] = modules_of(self.folder, read_json) if self.path.is_dir() else ()
        for module in self.modules:
            for file in module.weights:
                self._open(file, f"{module.path}/")
                self.files.append(file)

    def read(self, name: str) -> Tensor:
        """The tensor of this name, read from its file."""
        info = self.tensors[name]
        self._check_bytes(info.file)
        handle, inside = self._handles[info.file], self._inside.get(name, name)
        tensor: Tensor = handle[inside] if isinstance(handle, dict) else handle.get_tensor(inside)
        return tensor

    def check_bytes(self) -> None:
        """Compare the bytes of the tensors with the checksums that the files have of them; `read` does so by itself.

        Raises:
            CheckpointError: a file is damaged.
        """
        for file in list(self._unchecked):
            self._check_bytes(file)

    def _check_bytes(self, file: str) -> None:
        if file in self._unchecked:
            check_members(Path(file), tensors=True)
            self._unchecked.discard(file)

    @property
    def quantisation(self) -> str | None:
        """The method by which the folder's configuration says that weights are quantised."""
        return method_in(self.config) or (method_beside(self.folder) if self.path.is_dir() else None)

    @property
    def processor_folder(self) -> Path:
        """The folder whose tokenizer or image processor goes with the weights."""
        return self.folder

    @property
    def in_one_folder(self) -> bool:
        """Whether `folder` holds all of it, so that the loaders of `transformers` find it there."""
        return self.in_place

    @property
    def making_bytes(self) -> int:
        """Memory that tensors take to be made which are in no file."""
        return 0

    @property
    def unused(self) -> Mapping[str, str]:
        """What is in the files and not among the tensors -> why."""
        return self._unused

    def sha256(self) -> dict[str, str]:
        """File name -> SHA-256, for every weights file and the configuration. Many adapters may share a model: read once."""
        config = self.folder / "config.json"
        files = [*self.files, *([config] if self.path.is_dir() and config.exists() else [])]
        if not self._sha256:
            self._sha256 = {file.relative_to(self.folder).as_posix(): file_sha256(file) for file in files}
        return dict(self._sha256)

    def side_files(self) -> list[Path]:
        """What a loadable copy of the folder needs beside weights; of a single file there is nothing."""
        return side_files(self.path) if self.path.is_dir() else []

    def _open(self, file: Path, prefix: str = "") -> None:
        if file.suffix in LEGACY:
            self._open_legacy(file, prefix)
        else:
            self._open_safetensors(file, prefix)

    def _open_safetensors(self, file: Path, prefix: str) -> None:
        handle = open_safetensors(file)
        for name in handle.keys():  # noqa: SIM118 (no iterator)
            view = handle.get_slice(name)
            if view.get_dtype() not in _READ:
                raise CheckpointError(_unread(file, name, view.get_dtype()))
            self._add(prefix, TensorInfo(name, tuple(view.get_shape()), _READ[view.get_dtype()], str(file)))
        self._handles[str(file)] = MappedFile(file, handle)

    def _open_legacy(self, file: Path, prefix: str) -> None:
        state = load_pickled(file)
        for name, tensor in state.items():
            _check_plain(tensor, name, file)
            self._add(prefix, TensorInfo(name, tuple(tensor.shape), tensor.dtype, str(file)))
        self.aliases.update({prefix + name: prefix + first for name, first in shared_storage(state).items()})
        self._handles[str(file)] = state
        self._unchecked.add(str(file))

    def _open_distributed(self) -> None:
        stored = DistributedFile(self.path)
        self.files, self._unused = stored.files, stored.unused
        name_of_all = str(self.path / METADATA)
        for name, tensor in stored.tensors.items():
            if tensor.dtype not in _READ.values():
                raise CheckpointError(_unread(self.path, name, str(tensor.dtype).removeprefix("torch.")))
            self._add("", TensorInfo(name, tensor.shape, tensor.dtype, name_of_all))
        self._handles[name_of_all] = stored

    def _add(self, prefix: str, info: TensorInfo) -> None:
        if prefix:
            self._inside[prefix + info.name] = info.name
            info = replace(info, name=prefix + info.name)
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
        wanted = weight_map_of(index)
        lost = [f"{n}: not in {f}" for n, f in wanted.items() if n not in self.tensors]
        if lost:
            raise CheckpointError(itemise(f"{index}: {len(lost)} tensor(s) missing from the shards.", lost,
                                          "Download the shards again.", 20))  # fmt: skip


def check_any(source: Source) -> None:
    """Refuse a model without a single number: what would be merged is nothing, and no mistake is likelier.

    Raises:
        CheckpointError: there are no tensors, or all are empty.
    """
    if not any(info.numel for info in source.tensors.values()):
        what = "all its tensors are empty" if source.tensors else "it holds no tensors"
        raise CheckpointError(f"{source.label}: {what}, so there is nothing to merge. Save the model's state again.")


def _unread(file: Path, name: str, dtype: str) -> str:
    """The sentence about a tensor whose dtype is none that is read."""
    remedy = "Save it in another dtype." if "complex" in dtype or dtype.startswith("C") else DEQUANTISE
    return f"{file}: tensor '{name}' has dtype {dtype}, and adarank reads {', '.join(DTYPES)}. {remedy}"


def _check_plain(tensor: Tensor, name: str, file: Path) -> None:
    """Refuse what a pickle may hold beside ordinary tensors: sparse, nested, quantised and empty-handed (meta) ones."""
    if tensor.dtype not in _READ.values():
        raise CheckpointError(_unread(file, name, str(tensor.dtype).removeprefix("torch.")))
    if tensor.is_nested or tensor.is_sparse or tensor.is_meta or tensor.layout != torch.strided:
        raise CheckpointError(
            f"{file}: tensor '{name}' holds no ordinary numbers, and adarank reads dense tensors of {', '.join(DTYPES)}. Save the model again in one of these."
        )


def check_finite(tensor: Tensor, name: str, file: str) -> Tensor:
    """`tensor`, or a `CheckpointError` that counts its NaN and infinite entries."""
    if all_finite(tensor):
        return tensor
    bad = int(tensor.numel() - torch.isfinite(tensor.float() if tensor.dtype in FLOAT8.values() else tensor).sum())
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
    converted = tensor.to(dtype)
    if converted.dtype != tensor.dtype and not all_finite(converted):
        raise OutputError(f"'{name}' has values that {NAMES[dtype]} cannot hold. {remedy}")
    return converted
