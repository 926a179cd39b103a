"""How a chunk's bytes are stored: `raw`, `zstd`, `split-zstd` or `xor-split-zstd`, chosen per chunk.

Decided here: the codec table, the choice (`auto`), and decoding into a buffer of the declared size. Rules: the same bytes
give the same stored bytes whatever the thread; a chunk that saves under 3 % is stored raw; decoding writes exactly the
declared size or raises, and hostile frames cannot make it allocate more than the chunk and a bounded window.

`split-zstd` is for elements of several bytes (planes.py). `xor-split-zstd` stores what a chunk differs in from another one of the same
length, its base: whoever decodes has the base's bytes. Specification: docs/format/codecs.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from blake3 import blake3

from ..errors import FormatError, UnsupportedError, UsageError
from .frame import compress, compress_literals, decompress_into
from .planes import SAVING, WIDTHS, decode_planes, encode_planes

CODEC_RAW: Final = 0
CODEC_ZSTD: Final = 1
CODEC_SPLIT_ZSTD: Final = 2
CODEC_XOR: Final = 3
_NAMES: Final = {CODEC_RAW: "raw", CODEC_ZSTD: "zstd", CODEC_SPLIT_ZSTD: "split-zstd", CODEC_XOR: "xor-split-zstd"}
KNOWN_CODECS: Final = tuple(_NAMES)
POLICIES: Final = ("auto", "raw", "zstd")

WIDTH_UNKNOWN: Final = 0
WIDTH_OPAQUE: Final = -1
"""Content known not to compress: quantised weights save 4-5 % as zstd and would cost their decoding on every read."""

DELTA_SHARE: Final = 0.8
"""A difference is stored if it takes at most this share of what the chunk alone would: a reader without the base fetches both."""

_SAMPLE: Final = 64 << 10
"""Bytes of a chunk that the `auto` probe encodes per candidate: 1-2 ms per 4 MiB chunk, and it chose the right
width for every fp32 and fp16 chunk of the reference model."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A chunk as stored."""

    codec: int
    param: int
    data: bytes | memoryview


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


def encode(data: memoryview, policy: str, width: int = WIDTH_UNKNOWN, room: memoryview | None = None) -> Encoded:
    """Encode one chunk of 1..MAX_CHUNK bytes under `policy` (`auto`, `raw` or `zstd`).

    `width` is the element size in bytes where the caller knows it (1, 2, 4, 8), WIDTH_UNKNOWN to probe, WIDTH_OPAQUE for content that
    does not compress. `room`, EXTRA_ROOM bytes (planes.py) longer than `data`, may be used for the result: fresh memory for each chunk
    costs a tenth of the time.
    """
    if policy not in POLICIES:
        raise UsageError(f"codec {policy!r} is unknown, expected one of {', '.join(POLICIES)}")
    raw = Encoded(CODEC_RAW, 0, data)
    if policy == "raw":
        return raw
    if policy == "zstd":
        return _if_smaller(CODEC_ZSTD, 0, compress(data), raw)
    chosen = width or _probe(data)
    if chosen == WIDTH_OPAQUE:
        return raw
    if chosen == 1:
        return _if_smaller(CODEC_ZSTD, 0, compress_literals(data), raw)
    if chosen > 1 and len(data) >= chosen * 64:
        planes = encode_planes(data, chosen, compress_literals, room)
        return raw if planes is None else Encoded(CODEC_SPLIT_ZSTD, chosen, planes)
    return _if_smaller(CODEC_ZSTD, 0, compress(data), raw)


def encode_delta(data: memoryview, base: memoryview, width: int, alone: Encoded) -> Encoded:
    """Return a chunk as its difference to `base` (the same length), or `alone` if that is not worth a reader's fetching the base."""
    import numpy as np  # noqa: PLC0415 - loaded only where weights are encoded or decoded

    if len(base) != len(data):
        raise ValueError(f"base of {len(base)} bytes for a chunk of {len(data)}")
    difference = np.bitwise_xor(np.frombuffer(data, dtype=np.uint8), np.frombuffer(base, dtype=np.uint8))
    planes = max(1, width)
    encoded = encode_planes(difference.data, planes, compress_literals)
    if encoded is None or len(encoded) > len(alone.data) * DELTA_SHARE:
        return alone
    return Encoded(CODEC_XOR, planes, encoded)


def decode(codec: int, param: int, stored: memoryview, out: memoryview, base: memoryview | None = None) -> None:
    """Decode `stored` into `out`, exactly len(out) bytes. Raises FormatError; `out` then holds rubbish.

    `base`: the bytes of the base chunk, for CODEC_XOR. The caller checks the digest of what comes out.
    """
    if codec == CODEC_RAW:
        if len(stored) != len(out):
            raise FormatError(f"raw chunk is {len(stored)} bytes, expected {len(out)}")
        out[:] = stored
    elif codec == CODEC_ZSTD:
        decompress_into(stored, out)
    elif codec == CODEC_SPLIT_ZSTD:
        if param not in WIDTHS[1:]:
            raise FormatError(f"split-zstd chunk of element width {param}, expected 2, 4 or 8")
        decode_planes(stored, out, param)
    elif codec == CODEC_XOR:
        _decode_delta(stored, out, param, base)
    else:
        raise UnsupportedError(f"codec {codec} is unknown to this program; upgrade rafs")


def _decode_delta(stored: memoryview, out: memoryview, width: int, base: memoryview | None) -> None:
    import numpy as np  # noqa: PLC0415 - loaded only where weights are encoded or decoded

    if width not in WIDTHS:
        raise FormatError(f"xor-split-zstd chunk of element width {width}, expected 1, 2, 4 or 8")
    if base is None or len(base) != len(out):
        got = "none" if base is None else f"one of {len(base)} bytes"
        raise FormatError(f"chunk of {len(out)} bytes needs a base of the same length, got {got}")
    decode_planes(stored, out, width)
    target = np.frombuffer(out, dtype=np.uint8)
    np.bitwise_xor(target, np.frombuffer(base, dtype=np.uint8), out=target)


def _if_smaller(codec: int, param: int, encoded: bytes, raw: Encoded) -> Encoded:
    return Encoded(codec, param, encoded) if len(encoded) <= len(raw.data) * SAVING else raw


def _probe(data: memoryview) -> int:
    """Return the element width whose planes encode a sample best, 0 for plain zstd, WIDTH_OPAQUE when nothing saves 3 %."""
    start = max(0, (len(data) - _SAMPLE) // 2) & -8
    sample = data[start : start + _SAMPLE]
    best, best_size = WIDTH_OPAQUE, len(sample) * SAVING
    general = len(compress(sample))
    if general <= best_size:
        best, best_size = 0, general * SAVING  # planes must beat plain zstd by 3 %: they forgo matches
    if len(sample) >= 512:
        for width in (2, 4, 8):
            planes = encode_planes(sample, width, compress_literals)
            if planes is not None and len(planes) < best_size:
                best, best_size = width, len(planes)
    if best == WIDTH_OPAQUE and len(data) > _SAMPLE and _head_differs(data, sample):
        return 0
    return best


def _head_differs(data: memoryview, sample: memoryview) -> bool:
    """Tell whether the first bytes compress where the middle does not: then the whole chunk gets its try."""
    head = data[: len(sample) // 4]
    return len(compress(head)) <= len(head) * 0.9
