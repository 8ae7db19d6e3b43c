"""How many bits a channel an image file has: Pillow brings many deeper ones to 8 without a word, as it opens them."""

from __future__ import annotations

import re
import struct
from typing import Any

from PIL import Image

_HEADER = 2**16  # bytes of a file in which JPEG 2000 and AVIF say their depth
_BITS_PER_SAMPLE = 258  # TIFF 6.0, section 8
# Names that Pillow's decoders have for what they unpack: "RGB;16B" is 16 bits a channel, "BGR;16" 16 bits a pixel.
_DEEP = re.compile(r"(I|F)\b|\w+;(12|16[BLNRS]|32|64)|L;16$")


def bits_per_channel(image: Image.Image) -> int:
    """The most bits that a channel of an image has, 8 if that is all that is known of it. Reads its header alone.

    Arguments:
        image: as `Image.open` gives it, before its pixels are decoded; decoded ones have what their mode has.
    """
    known = [8, 16 if _DEEP.match(image.mode) else 8]
    if image.format == "TIFF":
        known += [int(bits) for bits in getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, ())]
    if image.format == "JPEG2000":
        known += _jpeg2000(_header(image))
    if image.format == "AVIF":
        known.append(_avif(_header(image)))
    known += [_of_tile(image.format, *tile[::3]) for tile in getattr(image, "tile", ()) or ()]
    return max(known)


def _of_tile(kind: str | None, decoder: str, given: Any) -> int:
    """Of one piece of a file that Pillow will decode with these arguments."""
    arguments = given if isinstance(given, tuple) else (given,)
    if any(isinstance(name, str) and _DEEP.match(name) for name in arguments):
        return 16
    if kind == "PPM":  # the largest value, of which 255 is 8 bits
        return max((int(most).bit_length() for most in arguments if isinstance(most, int)), default=8)
    half_floats = decoder == "bcn" and arguments[0] == 6  # DirectDraw surfaces of BC6H
    return 16 if decoder == "SGI16" or half_floats else 8


def _header(image: Image.Image) -> bytes:
    file = getattr(image, "fp", None)
    if file is None:
        return b""
    place = file.tell()
    file.seek(0)
    content: bytes = file.read(_HEADER)
    file.seek(place)
    return content


def _jpeg2000(content: bytes) -> list[int]:
    """Of the components of the codestream: its SIZ segment has three bytes for each (ISO/IEC 15444-1, A.5.1)."""
    start = content.find(b"\xff\x4f\xff\x51")
    if start < 0 or len(content) < start + 42:
        return []
    (count,) = struct.unpack_from(">H", content, start + 40)
    depths = content[start + 42 : start + 42 + 3 * count : 3]
    return [(depth & 0x7F) + 1 for depth in depths]


def _avif(content: bytes) -> int:
    """Its `av1C` box has one bit for more than 8 bits a channel (AV1-ISOBMFF, 2.3.3)."""
    boxes = (content[mark.end() :] for mark in re.finditer(b"av1C", content))
    return 10 if any(len(box) > 2 and box[2] & 0x40 for box in boxes) else 8
