"""zstd frames (RFC 8878) as chunks use them: two ways to make one, one careful way to read one.

Decided here: compression parameters, and what a reader accepts: exactly one frame, of exactly the length expected, with a window of at
most 16 MiB. Rule: nothing a frame says is believed before it is checked, so a hostile one costs the expected length and one window.
The contexts belong to their thread: they are neither cheap to make nor safe to share.
"""

from __future__ import annotations

import threading
from typing import Final

import zstandard

from ..errors import FormatError
from .space_table import MAX_CHUNK

_LEVEL: Final = 3
"""Ordinary files: 2.27 on tokenizer.json; higher levels cost 3-100 times the CPU for under 10 %."""
_WINDOW_MAX: Final = 1 << 24
"""Largest zstd window accepted: a chunk's bound. A frame that asks for more is hostile or foreign."""


class _Contexts(threading.local):
    def __init__(self) -> None:
        self.general = zstandard.ZstdCompressor(level=_LEVEL)
        # Huffman-only in effect: tiny hash tables find no matches worth taking. Level 1 gives 2.73 on the exponent
        # plane of bf16 where this gives 2.96, at three times the speed. Negative levels would switch Huffman off.
        # Long runs of zeros, in the difference of two checkpoints, are matches that it does take.
        self.literals = zstandard.ZstdCompressor(
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


def compress(data: bytes | memoryview) -> bytes:
    """Return a frame for content of any kind."""
    return _contexts.general.compress(data)


def compress_literals(data: bytes | memoryview) -> bytes:
    """Return a frame for bytes without repeats, whose only redundancy is their frequency."""
    return _contexts.literals.compress(data)


def decompress_into(stored: memoryview, out: memoryview) -> None:
    """Decode exactly one frame into exactly `out`, at most MAX_CHUNK bytes. Raises FormatError; `out` then holds rubbish."""
    if len(out) > MAX_CHUNK:
        raise FormatError(f"chunk of {len(out)} bytes, expected at most {MAX_CHUNK}")
    try:
        declared = zstandard.frame_content_size(stored)
        if declared not in (-1, len(out)):
            raise FormatError(f"zstd frame declares {declared} bytes, expected {len(out)}")
        # One call into fresh memory (`decompress`) is no faster than this.
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
