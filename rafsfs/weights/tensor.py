"""A tensor in a file: name, dtype, shape and place. What every parser of weights returns.

Decided here: what makes a list of tensors believable, and which element width a dtype has. Rule: a parser gets bytes from anyone; it raises
FormatError for what is malformed or beyond its limits, reads a bounded number of bytes, and never trusts a length before comparing it
with the file's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from ..errors import FormatError
from ..format.codec import WIDTH_OPAQUE, WIDTH_UNKNOWN

ReadAt = Callable[[int, int], bytes]
"""Returns `length` bytes from `offset` of the file, or fewer at its end."""

MAX_TENSORS: Final = 1_000_000
_BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "C128": 128,
    "F4": 4, "I4": 4, "U4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_WIDTHS: Final = {8: 1, 16: 2, 32: 4, 64: 8, 128: 8}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file."""

    name: str
    dtype: str
    """As safetensors writes it (`BF16`), or the block type of GGUF (`Q4_K`)."""
    shape: tuple[int, ...]
    offset: int
    """In the file, bytes."""
    length: int
    """Bytes, more than 0."""

    @property
    def stop(self) -> int:
        """The byte after the last one."""
        return self.offset + self.length

    @property
    def width(self) -> int:
        """Element width for the encoder: 1 to 8 bytes, WIDTH_OPAQUE for quantised blocks, WIDTH_UNKNOWN to probe."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            return WIDTH_OPAQUE if self.dtype[:1] in {"Q", "I", "T", "M"} else WIDTH_UNKNOWN
        return _WIDTHS.get(bits, WIDTH_UNKNOWN)


@dataclass(frozen=True, slots=True)
class TensorFile:
    """What a file of weights holds, sorted by offset; the tensors neither overlap nor leave the file."""

    kind: str
    tensors: tuple[Tensor, ...]


def stored_bytes(dtype: str, shape: Sequence[int]) -> int | None:
    """Return the bytes that a tensor of ordinary elements takes, None for a dtype unknown here."""
    bits = _BITS.get(dtype)
    if bits is None:
        return None
    count = 1
    for extent in shape:
        count *= extent
    return (count * bits + 7) // 8


def checked(kind: str, tensors: Iterable[Tensor], size: int) -> TensorFile:
    """Return the tensors of a file of `size` bytes in order, empty ones left out. Raises FormatError if they cannot be there."""
    found = sorted((tensor for tensor in tensors if tensor.length), key=lambda tensor: tensor.offset)
    position = 0
    for tensor in found:
        if tensor.length < 0 or tensor.offset < position:
            raise FormatError(f"tensor {tensor.name[:100]!r} overlaps the one before it")
        position = tensor.stop
    if position > size:
        raise FormatError(f"tensors reach to byte {position} of a file of {size}")
    if not found:
        raise FormatError("no tensors")
    return TensorFile(kind, tuple(found))
