"""How a chunk's bytes are stored: `raw`, `zstd` or `split-zstd`, chosen per chunk.

Decided here: the codec table, the choice (`auto`), and decoding into a buffer of the declared size. Rules: the same bytes
give the same stored bytes whatever the thread; a chunk that saves under 3 % is stored raw; decoding writes exactly the
declared size or raises, and hostile frames cannot make it allocate more than the chunk and a bounded window.

`split-zstd` puts byte i of every element into plane i. Weights have no repeats to match: all their redundancy is the
order-0 entropy of the exponent byte, so each plane is an ordinary zstd frame made with Huffman-friendly parameters, or raw.
Specification: docs/format/codecs.md.
"""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass
from typing import Final

import zstandard
from blake3 import blake3

from ..errors import FormatError, UnsupportedError, UsageError
from .space_table import MAX_CHUNK

CODEC_RAW: Final = 0
CODEC_ZSTD: Final = 1
CODEC_SPLIT_ZSTD: Final = 2
_NAMES: Final = {CODEC_RAW: "raw", CODEC_ZSTD: "zstd", CODEC_SPLIT_ZSTD: "split-zstd"}
KNOWN_CODECS: Final = tuple(_NAMES)
POLICIES: Final = ("auto", "raw", "zstd")

_SAVING: Final = 0.97
"""A plane or chunk whose encoding is larger than this share of it is stored raw: decoding must buy something."""

_SAMPLE: Final = 64 << 10
"""Bytes of a chunk that the `auto` probe encodes per candidate: 1-2 ms per 4 MiB chunk, and it chose the right
width for every fp32 and fp16 chunk of the reference model."""

_ZSTD_LEVEL: Final = 3
"""Ordinary files: 2.27 on tokenizer.json; higher levels cost 3-100 times the CPU for under 10 %."""

_WINDOW_MAX: Final = 1 << 24
"""Largest zstd window accepted: a chunk's bound. A frame that asks for more is hostile or foreign."""

_PLANE_SIZE = struct.Struct("<I")
_RAW_PLANE: Final = 1 << 31
"""High bit of a plane's size word: the plane is stored raw."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A chunk as stored."""

    codec: int
    param: int
    data: bytes | memoryview


class _Contexts(threading.local):
    """zstd contexts of one thread: they are neither cheap to make nor safe to share."""

    def __init__(self) -> None:
        self.general = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
        # Huffman-only in effect: tiny hash tables find no matches worth taking. Level 1 gives 2.73 on the exponent
        # plane of bf16 where this gives 2.96, at three times the speed. Negative levels would switch Huffman off.
        self.planes = zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters(
                window_log=17,
                hash_log=6,
                chain_log=6,
                search_log=1,
                min_match=7,
                target_length=0,
                strategy=zstandard.STRATEGY_FAST,
                write_content_size=True,
            )
        )
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_MAX)


_contexts = _Contexts()


def codec_name(codec: int) -> str:
    """Return the name of a codec number. Raises UnsupportedError."""
    try:
        return _NAMES[codec]
    except KeyError:
        raise UnsupportedError(f"codec {codec} is unknown to this program; upgrade rafs") from None


def codec_id(name: str) -> int:
    """Return the number of a codec name. Raises UsageError."""
    for number, known in _NAMES.items():
        if known == name:
            return number
    raise UsageError(f"codec {name!r} is unknown, expected one of {', '.join(_NAMES.values())}")


def chunk_digest(data: bytes | bytearray | memoryview) -> bytes:
    """Return the BLAKE3-256 digest of a chunk's uncompressed bytes."""
    return blake3(data).digest()


def encode(data: memoryview, policy: str, width: int = 0) -> Encoded:
    """Encode one chunk of 1..MAX_CHUNK bytes under `policy` (`auto`, `raw` or `zstd`).

    `width` is the element size in bytes where the caller knows it (1, 2, 4, 8), 0 to probe.
    """
    if policy == "raw":
        return Encoded(CODEC_RAW, 0, data)
    if policy == "auto":
        chosen = width or _probe(data)
        if chosen > 1 and len(data) >= chosen * 64:
            encoded = _encode_planes(data, chosen)
            if len(encoded) <= len(data) * _SAVING:
                return Encoded(CODEC_SPLIT_ZSTD, chosen, encoded)
            return Encoded(CODEC_RAW, 0, data)
        if chosen < 0:
            return Encoded(CODEC_RAW, 0, data)
    elif policy != "zstd":
        raise UsageError(f"codec {policy!r} is unknown, expected one of {', '.join(POLICIES)}")
    compressed = _contexts.general.compress(data)
    if len(compressed) <= len(data) * _SAVING:
        return Encoded(CODEC_ZSTD, 0, compressed)
    return Encoded(CODEC_RAW, 0, data)


def decode(codec: int, param: int, stored: memoryview, out: memoryview) -> None:
    """Decode `stored` into `out`, exactly len(out) bytes. Raises FormatError; `out` then holds rubbish."""
    if codec == CODEC_RAW:
        if len(stored) != len(out):
            raise FormatError(f"raw chunk is {len(stored)} bytes, expected {len(out)}")
        out[:] = stored
    elif codec == CODEC_ZSTD:
        _decode_frame(stored, out)
    elif codec == CODEC_SPLIT_ZSTD:
        _decode_planes(stored, out, param)
    else:
        raise UnsupportedError(f"codec {codec} is unknown to this program; upgrade rafs")


def _probe(data: memoryview) -> int:
    """Return the element width whose planes encode a sample best, 0 for plain zstd, -1 when nothing saves 3 %."""
    start = max(0, (len(data) - _SAMPLE) // 2) & -8
    sample = data[start : start + _SAMPLE]
    best, best_size = -1, len(sample) * _SAVING
    general = len(_contexts.general.compress(sample))
    if general <= best_size:
        best, best_size = (
            0,
            general * _SAVING,
        )  # planes must beat plain zstd by 3 %: they forgo matches
    if len(sample) >= 512:
        for width in (2, 4):
            size = len(_encode_planes(sample, width))
            if size < best_size:
                best, best_size = width, size
    if best == -1 and len(data) > _SAMPLE and _head_differs(data, sample):
        return 0
    return best


def _head_differs(data: memoryview, sample: memoryview) -> bool:
    """Tell whether the first bytes compress where the middle does not: then the whole chunk gets its try."""
    head = data[: len(sample) // 4]
    return len(_contexts.general.compress(head)) <= len(head) * 0.9


def _encode_planes(data: memoryview, width: int) -> bytes:
    import numpy as np  # noqa: PLC0415 - loaded only where weights are encoded or decoded

    array = np.frombuffer(data, dtype=np.uint8)
    sizes: list[bytes | memoryview] = []
    parts: list[bytes | memoryview] = []
    for index in range(width):
        plane = np.ascontiguousarray(array[index::width])
        part: bytes | memoryview = plane.data
        head = part[:_SAMPLE]
        if len(_contexts.planes.compress(head)) <= len(head) * _SAVING:
            compressed = _contexts.planes.compress(part)
            if len(compressed) <= len(part) * _SAVING:
                part = compressed
        sizes.append(_PLANE_SIZE.pack(len(part) | (0 if isinstance(part, bytes) else _RAW_PLANE)))
        parts.append(part)
    return b"".join(sizes + parts)


def _decode_planes(stored: memoryview, out: memoryview, width: int) -> None:
    import numpy as np  # noqa: PLC0415 - loaded only where weights are encoded or decoded

    if width not in (2, 4, 8):
        raise FormatError(f"split-zstd chunk of element width {width}, expected 2, 4 or 8")
    at = 4 * width
    if len(stored) < at:
        raise FormatError(f"split-zstd chunk of {len(stored)} bytes has no room for {width} planes")
    target = np.frombuffer(out, dtype=np.uint8)
    scratch = np.empty((len(out) + width - 1) // width, dtype=np.uint8)
    for index in range(width):
        (word,) = _PLANE_SIZE.unpack_from(stored, 4 * index)
        size = word & ~_RAW_PLANE
        part = stored[at : at + size]
        if len(part) != size:
            raise FormatError(f"plane {index} of a split-zstd chunk leaves it")
        at += size
        length = len(range(index, len(out), width))
        if word & _RAW_PLANE:
            if size != length:
                raise FormatError(f"raw plane {index} is {size} bytes, expected {length}")
            target[index::width] = np.frombuffer(part, dtype=np.uint8)
        else:
            plane = scratch[:length]
            _decode_frame(part, plane.data)
            target[index::width] = plane
    if at != len(stored):
        raise FormatError(f"split-zstd chunk has {len(stored) - at} bytes after its planes")


def _decode_frame(stored: memoryview, out: memoryview) -> None:
    """Decode exactly one zstd frame into exactly `out`."""
    if len(out) > MAX_CHUNK:
        raise FormatError(f"chunk of {len(out)} bytes, expected at most {MAX_CHUNK}")
    try:
        declared = zstandard.frame_content_size(stored)
        if declared not in (-1, len(out)):
            raise FormatError(f"zstd frame declares {declared} bytes, expected {len(out)}")
        with _contexts.decompressor.stream_reader(stored, read_size=len(stored) or 1) as reader:
            done = 0
            while done < len(out):
                got = reader.readinto(out[done:])
                if not got:
                    raise FormatError(f"zstd frame ends after {done} bytes, expected {len(out)}")
                done += got
            if reader.read(1):
                raise FormatError(f"zstd frame holds more than the {len(out)} bytes expected")
    except zstandard.ZstdError as error:
        raise FormatError(f"zstd frame is corrupt: {error}") from error
