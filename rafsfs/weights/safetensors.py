"""The header of a safetensors file: u64 length, then JSON that maps names to dtype, shape and offsets.

By hand, not by the safetensors library: that one opens paths only, while an image that is compared is read through ranges, and
it does not refuse a duplicate key. Source: safetensors format description, version 0.8. Limits: the format allows 100 MB of header, we take
32 MiB (150,000 tensors), for a hostile one costs 40 times its size in objects.
"""

from __future__ import annotations

import json
import struct
from typing import Any, Final

from ..errors import FormatError
from .tensor import MAX_TENSORS, ReadAt, Tensor, TensorFile, checked, stored_bytes

MAX_HEADER: Final = 32 << 20
_NOT_TENSORS: Final = "__metadata__"


def looks_like_safetensors(head: bytes, size: int) -> bool:
    """Tell from the first 9 bytes whether a file may be one."""
    return len(head) >= 9 and head[8:9] == b"{" and 2 <= struct.unpack_from("<Q", head)[0] <= size - 8


def parse_safetensors(read: ReadAt, size: int) -> TensorFile:
    """Return the tensors of a safetensors file of `size` bytes. Raises FormatError."""
    head = read(0, 8)
    if len(head) < 8:
        raise FormatError(f"{size} bytes are too few for a safetensors file")
    (length,) = struct.unpack("<Q", head)
    if length > min(MAX_HEADER, size - 8):
        raise FormatError(f"header of {length} bytes in a file of {size}, expected at most {min(MAX_HEADER, size - 8)}")
    try:
        header = json.loads(read(8, length), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"header is not JSON: {str(error)[:200]}") from error
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise FormatError(f"header is not an object of at most {MAX_TENSORS} tensors")
    start = 8 + length
    return checked(
        "safetensors",
        (_tensor(name, info, start) for name, info in header.items() if name != _NOT_TENSORS),
        size,
    )


def _tensor(name: str, info: object, start: int) -> Tensor:
    match info:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(first), int(stop)]}:
            if not all(type(extent) is int and 0 <= extent < 1 << 48 for extent in shape) or len(shape) > 64:
                raise FormatError(f"tensor {name[:100]!r} has shape {str(shape)[:100]}")
            if not 0 <= first <= stop < 1 << 60:
                raise FormatError(f"tensor {name[:100]!r} lies at [{first}, {stop})")
            expected = stored_bytes(dtype, shape)
            if expected is not None and expected != stop - first:
                raise FormatError(f"tensor {name[:100]!r} takes {stop - first} bytes, expected {expected}")
            return Tensor(name, dtype[:32], tuple(shape), start + first, stop - first)
    raise FormatError(f"tensor {name[:100]!r} has no dtype, shape and offsets")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found
