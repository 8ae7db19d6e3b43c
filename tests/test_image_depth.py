"""Images of more than 8 bits a channel are refused in every format, and those of 8 are not. Files by hand or by Pillow."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from adarank.data.spec import DataSettings, TaskSpec
from adarank.errors import DataError
from adarank.models import FAMILIES
from adarank.models.depth import bits_per_channel
from adarank.workflow.load_tasks import TaskReader
from image_zoo import processor

SIDE = 16


def png(bits: int, colour: int, channels: int) -> bytes:
    """PNG specification, 5.3 and 11.2.2."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = b"\0" + bytes(SIDE * channels * bits // 8)
    header = struct.pack(">IIBBBBB", SIDE, SIDE, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * SIDE)) + chunk(b"IEND", b"")  # fmt: skip


def netpbm(kind: str, most: int, channels: int) -> bytes:
    count = SIDE * SIDE * channels
    body = b"0 " * count if kind == "P3" else bytes(count * (2 if most > 255 else 1))
    return f"{kind} {SIDE} {SIDE} {most}\n".encode() + body


def tiff(bits: int, channels: int, photometric: int = 2, planar: int = 1, kind: int = 1) -> bytes:
    """TIFF 6.0: one strip, little-endian. `kind` is of the samples: 1 unsigned, 2 signed, 3 floats."""
    content = bytes(SIDE * SIDE * channels * bits // 8)
    after = 8 + 2 + 12 * 11 + 4
    listed = [(256, 1, SIDE), (257, 1, SIDE), (258, channels, after if channels > 2 else bits), (259, 1, 1),
              (262, 1, photometric), (273, 1, after + 2 * channels), (277, 1, channels), (278, 1, SIDE),
              (279, 1, len(content)), (284, 1, planar), (339, 1, kind)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, *values) for tag, *values in listed)
    return b"II*\0" + struct.pack("<IH", 8, len(listed)) + entries + bytes(4) + struct.pack("<H", bits) * channels + content  # fmt: skip


def by_pillow(kind: str, mode: str, **settings: int) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (SIDE, SIDE)).save(file, kind, **settings)
    return file.getvalue()


def patched(content: bytes, mark: bytes, place: int, step: int, count: int, value: int) -> bytes:
    """Bytes at places after a mark, put to another value: what an encoder of deeper images writes there."""
    raw, start = bytearray(content), content.index(mark) + place
    for number in range(count):
        raw[start + number * step] = value
    return bytes(raw)


def jpeg2000(mode: str, channels: int, depth: int) -> bytes:
    return patched(by_pillow("JPEG2000", mode), b"\xff\x4f\xff\x51", 42, 3, channels, depth - 1)


DEEP = {
    "png grey": partial(png, 16, 0, 1), "png rgb": partial(png, 16, 2, 3),
    "png grey with alpha": partial(png, 16, 4, 2), "png rgba": partial(png, 16, 6, 4),
    "ppm 65535": partial(netpbm, "P6", 65535, 3), "ppm 1023": partial(netpbm, "P6", 1023, 3),
    "ppm in words": partial(netpbm, "P3", 4095, 3), "pgm": partial(netpbm, "P5", 65535, 1),
    "tiff rgb": partial(tiff, 16, 3), "tiff rgba": partial(tiff, 16, 4), "tiff cmyk": partial(tiff, 16, 4, 5),
    "tiff in planes": partial(tiff, 16, 3, 2, 2), "tiff grey": partial(tiff, 16, 1, 1),
    "tiff signed": partial(tiff, 16, 1, 1, 1, 2), "tiff float": partial(tiff, 32, 1, 1, 1, 3),
    "sgi grey": partial(by_pillow, "SGI", "L", bpc=2), "sgi rgb": partial(by_pillow, "SGI", "RGB", bpc=2),
    "jpeg2000 rgb 16": partial(jpeg2000, "RGB", 3, 16), "jpeg2000 rgb 12": partial(jpeg2000, "RGB", 3, 12),
    "jpeg2000 rgba 10": partial(jpeg2000, "RGBA", 4, 10),
}  # fmt: skip
PLAIN = {
    "png grey": partial(png, 8, 0, 1), "png rgb": partial(png, 8, 2, 3), "png rgba": partial(png, 8, 6, 4),
    "ppm 255": partial(netpbm, "P6", 255, 3), "ppm 100": partial(netpbm, "P6", 100, 3), "pgm": partial(netpbm, "P5", 255, 1),
    "tiff rgb": partial(tiff, 8, 3), "tiff grey": partial(tiff, 8, 1, 1), "tiff in planes": partial(tiff, 8, 3, 2, 2),
    "sgi": partial(by_pillow, "SGI", "RGB"), "jpeg2000": partial(jpeg2000, "RGB", 3, 8),
    **{kind: partial(by_pillow, kind, "RGB") for kind in ("BMP", "GIF", "WEBP", "TGA", "JPEG", "PCX")},
    "palette": partial(by_pillow, "PNG", "P"), "one bit": partial(by_pillow, "PNG", "1"), "cmyk": partial(by_pillow, "JPEG", "CMYK"),
}  # fmt: skip


def load(folder: Path, content: bytes) -> None:
    """A task's two images, the second with this content. Pillow tells formats by content, whatever the name says."""
    (folder / "data" / "cat").mkdir(parents=True)
    for number, image in enumerate((png(8, 2, 3), content)):
        (folder / "data" / "cat" / f"{number}.png").write_bytes(image)
    processor().save_pretrained(folder)
    (folder / "config.json").write_text('{"num_channels": 3}')
    reader = TaskReader(FAMILIES["image-classification"], DataSettings(), folder)
    reader.load(
        "pets", TaskSpec(data="data"), folder, {"label2id": {"cat": 0, "dog": 1}, "id2label": {"0": "cat", "1": "dog"}}
    )


@pytest.mark.parametrize("make", DEEP.values(), ids=DEEP)
def test_an_image_of_more_than_8_bits_is_refused(tmp_path: Path, make: Callable[[], bytes]) -> None:
    with pytest.raises(DataError, match=r"task 'pets', row 2: .*1\.png: no readable image \(its pixels have [0-9]+ bits a channel"):  # fmt: skip
        load(tmp_path, make())


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_an_image_of_8_bits_is_taken(tmp_path: Path, make: Callable[[], bytes]) -> None:
    load(tmp_path, make())


def test_looking_at_the_depth_leaves_the_pixels_as_they_are() -> None:
    values = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    for kind in ("PNG", "JPEG2000", "TIFF"):
        file = io.BytesIO()
        Image.fromarray(values).save(file, kind)
        with Image.open(file) as opened:
            assert bits_per_channel(opened) == 8
            assert np.array_equal(np.asarray(opened), values)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_an_avif_of_10_bits_is_told_by_its_configuration() -> None:
    """Pillow writes none: the flag is set behind the back of an image that is open already."""
    content = by_pillow("AVIF", "RGB")
    with Image.open(io.BytesIO(content)) as opened:
        assert bits_per_channel(opened) == 8
        flags = content[content.index(b"av1C") + 6] | 0x40
        opened.fp = io.BytesIO(patched(content, b"av1C", 6, 1, 1, flags))
        assert bits_per_channel(opened) == 10
