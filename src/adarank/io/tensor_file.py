"""One safetensors file, written tensor by tensor: its header first, each tensor's bytes as it comes, hashed as they lie there."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from adarank.errors import OutputError
from adarank.io.checkpoint import NAMES, cast
from adarank.io.progress import advance

_READ_BYTES = 1 << 22

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Tensor name -> (shape, dtype), in the order in which the tensors will be written."""


@dataclass(frozen=True)
class Streamed:
    """A tensor that is computed as it is written, so that it is never whole in memory.

    Attributes:
        parts: gives its entries in order as vectors, of whatever lengths. Each is let go before the next is made.
    """

    shape: tuple[int, ...]
    parts: Callable[[], Iterator[Tensor]]

    def whole(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """The tensor, cast to a dtype (by default that of its entries) part by part; the errors of `checkpoint.cast`."""
        tensor, start = torch.empty(0), 0
        for part in self.parts():
            part = part if dtype is None else cast(part, dtype, name, "")
            tensor = tensor if start else part.new_empty(self.shape)
            tensor.view(-1)[start : start + len(part)] = part
            start += len(part)
        return tensor


class TensorFile:
    """One safetensors file, written tensor by tensor: the header first, then each tensor's bytes as it comes.

    Arguments:
        layout: name -> (shape, dtype) of every tensor, in the order in which they will be written.
        hashed: compute the file's SHA-256 beside writing.

    Raises:
        OutputError: the tensors do not follow the layout (a bug, not a user's mistake), or the layout's dtype cannot
            hold a value.
    """

    def __init__(
        self, path: Path, layout: Layout, metadata: Mapping[str, str] | None = None, hashed: bool = False
    ) -> None:
        self._path, self._layout = path, layout
        self._expected = iter(layout)
        self._handle = path.open("wb")
        write_header(self._handle, layout, metadata)
        self._hash = _FollowingHash(path) if hashed else None
        self._unflushed = 0

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self._handle.close()
            missing = next(self._expected, None)
            if kind is None and missing is not None:
                raise OutputError(f"{self._path.name}: tensor '{missing}' was never written.")
            if kind is None and self._hash:
                self._hash.ended()
        finally:
            if self._hash:
                self._hash.stop()

    @property
    def sha256(self) -> str | None:
        """Of the whole file, once it is closed; None if it was not hashed, or could not be read."""
        return self._hash.digest if self._hash else None

    def write(self, name: str, tensor: Tensor | Streamed) -> None:
        """The next tensor: cast to the layout's dtype, moved to the CPU and written."""
        wanted = next(self._expected, "nothing")
        shape, dtype = self._layout.get(wanted, ((), torch.float32))
        if name != wanted or tuple(tensor.shape) != shape:
            raise OutputError(
                f"{self._path.name}: expected tensor '{wanted}' {shape}, got '{name}' {tuple(tensor.shape)}."
            )
        for part in tensor.parts() if isinstance(tensor, Streamed) else [tensor]:
            self._write_part(cast(part, dtype, name, "Give another out_dtype, such as bfloat16.").cpu())

    def _write_part(self, part: Tensor) -> None:
        write_tensor(self._handle, part)
        self._unflushed += part.nbytes
        if self._hash and self._unflushed >= _READ_BYTES:
            self._handle.flush()
            self._hash.written(self._handle.tell())
            self._unflushed = 0
        advance(part.nbytes)


class _FollowingHash:
    """The SHA-256 of a file, by a thread that reads behind the writer: what it reads is still in the system's cache.

    It holds no tensor, so that the memory of what is written is free as soon as it is written.

    Attributes:
        digest: once `ended` has returned, if the file could be read.
    """

    def __init__(self, path: Path) -> None:
        self.digest: str | None = None
        self._path = path
        self._changed = threading.Condition()
        self._end, self._read, self._whole, self._stopped = 0, 0, False, False
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def written(self, end: int) -> None:
        """The file holds its first `end` bytes now."""
        self._tell(end=end)

    def ended(self) -> None:
        """The file is whole: wait for its hash."""
        self._tell(end=self._path.stat().st_size, whole=True)
        self._thread.join()

    def stop(self) -> None:
        """End the thread, if it has not ended."""
        self._tell(stopped=True)

    def _tell(self, end: int | None = None, whole: bool = False, stopped: bool = False) -> None:
        with self._changed:
            self._end = self._end if end is None else end
            self._whole, self._stopped = self._whole or whole, self._stopped or stopped
            self._changed.notify()

    def _follow(self) -> None:
        digest = hashlib.sha256()
        with suppress(OSError), self._path.open("rb") as handle:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or self._whole or self._end > self._read)
                    end, whole = self._end, self._whole
                    if self._stopped:
                        return
                while self._read < end:
                    block = handle.read(min(_READ_BYTES, end - self._read))
                    if not block:
                        return
                    digest.update(block)
                    self._read += len(block)
                if whole and self._read == end:
                    self.digest = digest.hexdigest()
                    return


def layout_bytes(layout: Layout) -> int:
    """Bytes of all tensors of a layout, headers not among them."""
    return sum(spec_bytes(spec) for spec in layout.values())


def spec_bytes(spec: tuple[tuple[int, ...], torch.dtype]) -> int:
    """Bytes of one tensor of a shape and a dtype."""
    return torch.Size(spec[0]).numel() * spec[1].itemsize


def write_header(handle: IO[bytes], layout: Layout, metadata: Mapping[str, str] | None = None) -> None:
    """The safetensors header: its length in 8 little-endian bytes, then JSON padded to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, spec in layout.items():
        end = offset + spec_bytes(spec)
        header[name] = {"dtype": NAMES[spec[1]], "shape": list(spec[0]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    handle.write(len(text).to_bytes(8, "little"))
    handle.write(text)


def write_tensor(handle: IO[bytes], tensor: Tensor) -> None:
    """The bytes of a tensor on the CPU."""
    if tensor.numel():
        handle.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
