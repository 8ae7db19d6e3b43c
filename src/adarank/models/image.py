"""Image classifiers: any architecture of `AutoModelForImageClassification`, with its own processor's settings."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from adarank.data.read import Table
from adarank.data.spec import TaskSpec
from adarank.data.task import Batch
from adarank.errors import CheckpointError, DataError
from adarank.models.base import load_quietly

_KEPT_BYTES = 128 * 2**20  # processed images that a task keeps in memory; the rest are processed anew for each batch
_CHUNK = 256


class ImageExamples:
    """Images, brought to the model's input when a batch is formed.

    As many as fit into a fixed amount of memory are processed once and kept.
    """

    def __init__(self, task: str, processor: Any, mode: str, images: Sequence[Any]) -> None:
        self._task, self._processor, self._mode, self._images = task, processor, mode, images
        self._kept = self._process(range(min(_CHUNK, len(images))))
        room = _KEPT_BYTES // max(1, self._kept[0].nbytes)
        if room > len(self._kept) < len(images):
            rest = range(len(self._kept), min(room, len(images)))
            parts = [self._process(rest[start : start + _CHUNK]) for start in range(0, len(rest), _CHUNK)]
            self._kept = torch.cat([self._kept, *parts])
        self.lengths: Sequence[int] = [self._kept.shape[-1] * self._kept.shape[-2]] * len(images)

    def batch(self, rows: Sequence[int]) -> Batch:
        if all(row < len(self._kept) for row in rows):
            return {"pixel_values": self._kept[list(rows)]}
        parts = [self._kept[row : row + 1] if row < len(self._kept) else self._process([row]) for row in rows]
        return {"pixel_values": torch.cat(parts)}

    def content(self) -> bytes:
        return repr((self._mode, self._processor.to_dict(), [image_key(image) for image in self._images])).encode()

    def _process(self, rows: Sequence[int]) -> Tensor:
        opened = [_open(self._images[row], self._mode, f"task '{self._task}', row {row + 1}") for row in rows]
        try:
            # channels are last in every PIL image; left to guess, a processor errs on very small ones
            pixels = self._processor(images=opened, return_tensors="pt", input_data_format="channels_last")
        except (ValueError, TypeError) as error:
            raise DataError(
                f"task '{self._task}': the model's image processor refuses the images ({error}). Check preprocessor_config.json."
            ) from None
        found: Tensor = pixels["pixel_values"].to(torch.float32)
        return found


class ImageClassifiers:
    """The family of `AutoModelForImageClassification`."""

    kind = "image-classification"
    keep_embeddings = False
    token_budget = 2**20  # pixels: about 20 images of 224×224

    def load(self, folder: Path) -> nn.Module:
        from transformers import AutoModelForImageClassification

        return load_quietly(AutoModelForImageClassification, folder)

    def columns(self, spec: TaskSpec) -> list[str]:
        return [spec.columns.image]

    def key(self, value: Any) -> Hashable:
        return image_key(value)

    def encode(self, table: Table, spec: TaskSpec, folder: Path) -> tuple[ImageExamples, list[str]]:
        images = table[spec.columns.image]
        if len(images) == 0:
            raise DataError(f"task '{spec.name}': no inputs.")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        mode = "L" if config.get("num_channels") == 1 else "RGB"
        return ImageExamples(spec.name or folder.name, _processor(folder), mode, images), []

    def logits(self, module: nn.Module, batch: Batch) -> Tensor:
        out: Tensor = module(**batch).logits
        return out.float()


def image_key(value: Any) -> Hashable:
    """What makes two images the same input: their file's bytes, or their pixels."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        try:
            value = Path(value).read_bytes()
        except OSError as error:
            raise DataError(f"{value}: no readable image ({error.strerror}). Check the path.") from None
    if isinstance(value, Image.Image):
        value = np.asarray(value)
    if isinstance(value, (list, np.ndarray)):
        value = np.asarray(value)
        return hashlib.sha256(repr((value.shape, str(value.dtype))).encode() + value.tobytes()).hexdigest()
    return hashlib.sha256(value if isinstance(value, bytes) else repr(value).encode()).hexdigest()


def _processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{folder}: no usable image processor ({str(error).splitlines()[0]}). Copy preprocessor_config.json beside the weights."
        ) from None


def _open(value: Any, mode: str, where: str) -> Image.Image:
    """An image of any of the forms that data comes in: a path, encoded bytes, a PIL image, an array of pixels."""
    try:
        if isinstance(value, Mapping):  # how `datasets` stores images in Parquet files
            value = io.BytesIO(value["bytes"]) if value.get("bytes") else value.get("path")
        if isinstance(value, bytes):
            value = io.BytesIO(value)
        if isinstance(value, (str, io.BytesIO)):
            with Image.open(value) as file:
                value = ImageOps.exif_transpose(file)
        image = value if isinstance(value, Image.Image) else Image.fromarray(_pixels(value))
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"its pixels are of mode {image.mode}, where 8-bit ones are needed")
        return image.convert(mode)
    except (OSError, ValueError, TypeError, SyntaxError) as error:  # SyntaxError: a broken PNG
        shown = f"{value}: " if isinstance(value, str) else ""
        raise DataError(f"{where}: {shown}no readable image ({error}). Give 8-bit images.") from None


def _pixels(value: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(height, width) or (height, width, 3 or 4) uint8 from an array; channels may come first."""
    array = np.asarray(value)
    if (
        array.dtype != np.uint8
        and isinstance(value, list)
        and array.dtype.kind in "iu"
        and 0 <= array.min() <= array.max() <= 255
    ):
        array = array.astype(np.uint8)  # a nested list, as Parquet gives it, has no type of its own
    if array.dtype != np.uint8:
        raise ValueError(f"pixels are {array.dtype}, where uint8 from 0 to 255 is needed")
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise ValueError(f"the array's shape is {array.shape}, where (height, width) or (height, width, 3) is needed")
    return np.ascontiguousarray(array)
