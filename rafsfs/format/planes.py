"""Byte planes: byte i of every element together, each plane stored as a zstd frame or as it is.

Weights have no repeats to match: all their redundancy is the order-0 entropy of the exponent byte, which shows once it stands
apart. Decided here: the layout of planes in a stored chunk and when a plane is worth encoding. Memory: encoding copies the chunk,
decoding one plane. Specification: docs/format/codecs.md.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from ..errors import FormatError
from .frame import decompress_into

WIDTHS: Final = (1, 2, 4, 8)
SAVING: Final = 0.97
"""A plane or chunk whose encoding is larger than this share of it is stored raw: decoding must buy something."""
EXTRA_ROOM: Final = 4 * WIDTHS[-1]
"""Bytes that planes take beyond those of the data at most: a word for each."""

_SIZE = struct.Struct("<I")
_RAW: Final = 1 << 31
"""High bit of a plane's size word: the plane is stored raw."""


def encode_planes(
    data: memoryview, width: int, compress: Callable[[memoryview], bytes], room: memoryview | None = None
) -> memoryview | None:
    """Return `data` split into `width` planes, each as `compress` gives it or raw where that saves under 3 %; None if all of them together
    do not save 3 %. The result is a part of `room`, at least EXTRA_ROOM bytes longer than `data`, if one is given.
    """
    import numpy as np  # noqa: PLC0415 - loaded only where weights are encoded or decoded

    array = np.frombuffer(data, dtype=np.uint8)
    out = room if room is not None else memoryview(bytearray(len(data) + EXTRA_ROOM))
    target = np.frombuffer(out, dtype=np.uint8)
    at = 4 * width
    for index in range(width):
        # Gathered where it stays if it stays raw. numpy copies let other threads run, assignments to memoryviews do not.
        plane = target[at : at + len(range(index, len(data), width))]
        np.copyto(plane, array[index::width])
        # Not tried on a sample first: zstd itself gives up on noise in a tenth of the time that it takes for the rest.
        compressed = compress(plane.data)
        word = len(plane) | _RAW
        if len(compressed) <= len(plane) * SAVING:
            word = len(compressed)
            np.copyto(plane[:word], np.frombuffer(compressed, dtype=np.uint8))
        _SIZE.pack_into(out, 4 * index, word)
        at += word & ~_RAW
    return out[:at] if at <= len(data) * SAVING else None


def decode_planes(stored: memoryview, out: memoryview, width: int) -> None:
    """Put planes together again in `out`. Raises FormatError; `out` then holds rubbish."""
    import numpy as np  # noqa: PLC0415 - loaded only where weights are encoded or decoded

    at = 4 * width
    if len(stored) < at:
        raise FormatError(f"split chunk of {len(stored)} bytes has no room for {width} planes")
    target = np.frombuffer(out, dtype=np.uint8)
    scratch = np.empty((len(out) + width - 1) // width, dtype=np.uint8)
    for index in range(width):
        (word,) = _SIZE.unpack_from(stored, 4 * index)
        size = word & ~_RAW
        part = stored[at : at + size]
        if len(part) != size:
            raise FormatError(f"plane {index} of a split chunk leaves it")
        at += size
        length = len(range(index, len(out), width))
        if word & _RAW:
            if size != length:
                raise FormatError(f"raw plane {index} is {size} bytes, expected {length}")
            target[index::width] = np.frombuffer(part, dtype=np.uint8)
        else:
            plane = scratch[:length]
            decompress_into(part, plane.data)
            target[index::width] = plane
    if at != len(stored):
        raise FormatError(f"split chunk has {len(stored) - at} bytes after its planes")
