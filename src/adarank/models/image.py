"""Image classifiers: any architecture of `AutoModelForImageClassification`, with its own processor's settings."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from adarank.data.read import Table
from adarank.data.spec import TaskSpec
from adarank.data.task import Batch
from adarank.errors import CheckpointError, DataError, reading
from adarank.io.files import read_json
from adarank.io.hub import local_path
from adarank.models.depth import bits_per_channel
from adarank.models.family import Family
from adarank.models.loading import LOCALLY, loading

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_LEAST = 2**13  # pixels that a small image counts as: batches of more than 128 are slower on a CPU, not faster


class ImageExamples:
    """Images, brought to the model's input when a batch is formed.

    As many as fit into `kept_bytes` are processed once and kept. Of the others at least the header is
    read at once, so that what is no image is found before anything is spent.
    """

    def __init__(self, task: str, processor: Any, mode: str, images: Sequence[Any], kept_bytes: int) -> None:
        self._task, self._processor, self._mode, self._images = task, processor, mode, images
        first = self._processed(0)
        count = min(len(images), max(1, kept_bytes // max(1, first.nbytes)))
        self._kept = torch.empty((count, *first.shape))
        self._kept[0] = first
        for row in range(1, count):
            self._kept[row] = self._processed(row)
        for row in range(count, len(images)):
            with _named(self._where(row), images[row]):
                _opened(images[row]).close()
        self.lengths: Sequence[int] = [max(_LEAST, first.shape[-1] * first.shape[-2])] * len(images)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The inputs of these rows, as the model takes them."""
        if all(row < len(self._kept) for row in rows):
            return {"pixel_values": self._kept[list(rows)]}
        images = [self._kept[row] if row < len(self._kept) else self._processed(row) for row in rows]
        return {"pixel_values": torch.stack(images)}

    def content(self) -> bytes:
        """Bytes that identify the inputs, for the task's fingerprint."""
        return repr((self._mode, self._processor.to_dict(), [image_key(image) for image in self._images])).encode()

    def _where(self, row: int) -> str:
        return f"task '{self._task}', row {row + 1}"

    def _processed(self, row: int) -> Tensor:
        """(channels, height, width) float32: an image as the model takes it."""
        with _named(self._where(row), self._images[row]):
            array = _decoded(self._images[row], self._mode)
        try:
            # an array with its channels said to be last: left to guess, or given a PIL image, some versions of
            # the processors take the height of a small image for its channels
            made = self._processor(images=[array], return_tensors="pt", input_data_format="channels_last")
            pixels: Tensor = made["pixel_values"][0].to(torch.float32)
        except (
            ValueError,
            TypeError,
            RuntimeError,
            ArithmeticError,
            LookupError,
            AttributeError,
            MemoryError,
        ) as error:
            raise DataError(
                f"{self._where(row)}: the model's image processor refuses the image ({_short(error)}). Check preprocessor_config.json."
            ) from None
        if row > 0 and pixels.shape != self._kept.shape[1:]:
            raise DataError(
                f"{self._where(row)}: the model's image processor makes {tuple(pixels.shape)} of this image and {tuple(self._kept.shape[1:])} of the first. "
                "Have all images brought to one size by do_resize, size and crop_size in preprocessor_config.json."
            )
        return pixels


class ImageClassifiers(Family):
    """The family of `AutoModelForImageClassification`.

    Attributes:
        kept_bytes: processed images that a task keeps in memory; the rest are processed anew for each batch.
    """

    kind = "image-classification"
    architectures: tuple[str, ...] = ("ForImageClassification",)
    keep_embeddings = False
    paths = True
    token_budget = cpu_token_budget = 2**20  # pixels: about 20 images of 224×224
    kept_bytes = 128 * 2**20
    # ViT and Swin as they are stored; as some versions name them, DINOv2 and CLIP; CLIP of open_clip; ConvNeXt
    mlps: tuple[tuple[str, str], ...] = (
        ("intermediate.dense", "output.dense"),
        ("mlp.fc1", "mlp.fc2"),
        ("mlp.c_fc", "mlp.c_proj"),
        ("pwconv1", "pwconv2"),
    )
    expanded: tuple[str, ...] = ("cls_token", "distillation_token", "position_embeddings")

    def auto_class(self) -> Any:
        """The class of `transformers` that loads these models."""
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification

    def check_folder(self, folder: Path) -> None:
        """Raise a `CheckpointError` if there is no configuration of an image processor."""
        if not any((folder / name).exists() for name in PROCESSOR_FILES):
            raise CheckpointError(
                f"{folder}: no usable image processor (it has none of {', '.join(PROCESSOR_FILES)}). Copy preprocessor_config.json beside the weights."
            )

    def columns(self, spec: TaskSpec) -> list[str]:
        """The columns of the data that hold inputs."""
        return [spec.columns.image]

    def key(self, value: Any) -> Hashable:
        """What makes two inputs the same one."""
        return image_key(value)

    def encode(self, table: Table, spec: TaskSpec, folder: Path) -> tuple[ImageExamples, list[str]]:
        """The inputs of a table as the model takes them, and notes about them."""
        images = table[spec.columns.image]
        if len(images) == 0:
            raise DataError(f"task '{spec.name}': no inputs.")
        mode = "L" if read_json(folder / "config.json").get("num_channels") == 1 else "RGB"
        return ImageExamples(spec.name or "", _processor(folder), mode, images, self.kept_bytes), []

    def logits(self, module: nn.Module, batch: Batch) -> Tensor:
        """(inputs, classes) float32: what the network gives for a batch."""
        try:
            out: Tensor = module(**batch).logits
        except (
            ValueError,
            RuntimeError,
        ) as error:  # how these models refuse images of another size or number of channels
            if isinstance(error, RuntimeError) and "size" not in str(error):
                raise  # of the machine, and not of the images
            shape = tuple(batch["pixel_values"].shape[1:])
            raise DataError(
                f"{type(module).__name__}: refuses images of shape {shape} ({_short(error)}). Check preprocessor_config.json beside the expert's weights."
            ) from None
        return out.float()


def image_key(value: Any) -> Hashable:
    """What makes two images the same input: their file's bytes, or their pixels."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        value = _file(value).read_bytes()
    if isinstance(value, Image.Image):
        value = np.asarray(value if value.mode in ("L", "RGB") else value.convert("RGBA"))
    if isinstance(value, (list, np.ndarray)):
        try:
            array = _pixels(value)
            value = repr(array.shape).encode() + array.tobytes()
        except ValueError:  # refused with its row's number when it is opened
            value = repr(value)
    return hashlib.sha256(value if isinstance(value, bytes) else repr(value).encode()).hexdigest()


def _file(path: str) -> Path:
    """The file of an image; a `DataError` if there is none, or something that would never end, such as a device."""
    file = local_path(path, kind=DataError)
    if not file.is_file():
        raise DataError(
            f"{path}: no readable image ({'not a file' if file.exists() else 'No such file or directory'}). Check the path."
        )
    with reading(DataError, file), file.open("rb"):
        return file


def _processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    with loading(folder, "no usable image processor", "Copy preprocessor_config.json beside the weights."):
        return AutoImageProcessor.from_pretrained(str(folder), **LOCALLY)


@contextmanager
def _named(where: str, value: Any) -> Iterator[None]:
    """Turns what reading an image raises into a sentence that names it."""
    try:
        yield
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
        # SyntaxError: a broken PNG. What Pillow says of an unknown format holds no more than an object's address.
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else _short(error)
        path = value.get("path") if isinstance(value, Mapping) else value
        shown = f"{path}: " if isinstance(path, str) else ""
        raise DataError(
            f"{where}: {shown}no readable image ({reason}). Give whole images of 8 bits a channel."
        ) from None


def _opened(value: Any) -> Image.Image:
    """An image of any of the forms that data comes in: a path, encoded bytes, a PIL image, an array of pixels.

    Of a file no more than its header is read.
    """
    if isinstance(value, Mapping):  # how `datasets` stores images in Parquet files
        value = value["bytes"] if value.get("bytes") else value.get("path")
    if value is None:
        raise ValueError("the cell is empty")
    if isinstance(value, (str, bytes)):
        image: Image.Image = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
    else:
        image = value if isinstance(value, Image.Image) else Image.fromarray(_pixels(value))
    if (bits := bits_per_channel(image)) > 8:
        raise ValueError(
            f"its pixels have {bits} bits a channel, read as mode {image.mode}, where 8-bit ones are needed"
        )
    return image


def _decoded(value: Any, mode: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(height, width, channels) uint8, turned as the camera says."""
    with _opened(value) as image:
        array = np.asarray(ImageOps.exif_transpose(image).convert(mode))
    return array if array.ndim == 3 else array[:, :, None]


def _short(error: Exception) -> str:
    return str(error).split("\n")[0][:200]


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
