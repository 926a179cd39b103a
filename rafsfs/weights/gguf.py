"""The header of a GGUF file: key-value pairs, then name, shape, type and offset of every tensor.

By hand, not by the gguf library: that one maps a path and builds every value of the vocabulary; we need offsets, from any
source of bytes, hostile ones included. Source: GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little-endian; block
sizes from ggml's type traits. Limits: 64 MiB of header; the largest vocabularies take 20.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

from ..errors import FormatError
from ..types import align_up
from .tensor import MAX_TENSORS, ReadAt, Tensor, TensorFile, checked
from .window import Window

MAX_HEADER: Final = 64 << 20
_MAX_PAIRS: Final = 65536
_ALIGNMENT: Final = 32

_TYPES: Final = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
"""Type number → name, elements per block, bytes per block."""

_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type number of a value → bytes."""


def looks_like_gguf(head: bytes) -> bool:
    """Tell from the first 4 bytes whether a file is one."""
    return head[:4] == b"GGUF"


def parse_gguf(read: ReadAt, size: int) -> TensorFile:
    """Return the tensors of a GGUF file of `size` bytes. Raises FormatError."""
    window = Window(read, size, MAX_HEADER)
    if window.take(4) != b"GGUF":
        raise FormatError("no GGUF magic")
    version = window.u32()
    if version not in {2, 3}:
        raise FormatError(f"GGUF version {version}, this program reads 2 and 3, little-endian")
    count, pairs = window.u64(), window.u64()
    if count > MAX_TENSORS or pairs > _MAX_PAIRS:
        raise FormatError(f"{count} tensors and {pairs} key-value pairs: over the limits")
    alignment = _ALIGNMENT
    for _ in range(pairs):
        key = _string(window)
        kind = window.u32()
        if key == b"general.alignment" and kind == 4:
            alignment = window.u32()
        else:
            _skip_value(window, kind, 0)
    if not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise FormatError(f"alignment {alignment} is not a power of two up to 1 MiB")
    infos = [_info(window) for _ in range(count)]
    start = align_up(window.position, alignment)
    stops = sorted({offset for *_, offset in infos} | {size - start})
    following = dict(pairwise(stops))
    return checked(
        "gguf", (_tensor(*info, start, following.get(info[3], info[3])) for info in infos), size
    )  # fmt: skip


def _info(window: Window) -> tuple[str, tuple[int, ...], int, int]:
    """Return name, shape (innermost first, as GGUF has it), type and offset from the start of the data."""
    name = _string(window).decode("utf-8", "replace")
    dimensions = window.u32()
    if dimensions > 8:
        raise FormatError(f"tensor {name[:100]!r} has {dimensions} dimensions")
    shape = tuple(window.u64() for _ in range(dimensions))
    return name, shape, window.u32(), window.u64()


def _tensor(name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, following: int) -> Tensor:
    if any(extent >= 1 << 48 for extent in shape) or offset >= 1 << 60:
        raise FormatError(f"tensor {name[:100]!r} has shape {shape} at {offset}")
    known = _TYPES.get(kind)
    if known is None:  # a type newer than this table: all up to the next tensor
        return Tensor(name, f"Q?{kind}", shape, start + offset, following - offset)
    dtype, block, stored = known
    elements = 1
    for extent in shape:
        elements *= extent
    if elements % block:
        raise FormatError(f"tensor {name[:100]!r} of {elements} elements, expected a multiple of {block} for {dtype}")
    return Tensor(name, dtype, shape, start + offset, elements // block * stored)


def _string(window: Window) -> bytes:
    length = window.u64()
    if length > MAX_HEADER:
        raise FormatError(f"string of {length} bytes")
    return window.take(length)


def _skip_value(window: Window, kind: int, depth: int) -> None:
    if kind == _STRING:
        window.skip(window.u64())
    elif kind == _ARRAY:
        inner, count = window.u32(), window.u64()
        width = _SCALARS.get(inner)
        if width is not None:
            window.skip(count * width)
        elif depth >= 4 or count > MAX_HEADER // 8:
            raise FormatError(f"array of {count} elements of type {inner}, {depth} deep")
        else:
            for _ in range(count):
                _skip_value(window, inner, depth + 1)
    elif kind in _SCALARS:
        window.skip(_SCALARS[kind])
    else:
        raise FormatError(f"value of type {kind}, which GGUF does not have")
