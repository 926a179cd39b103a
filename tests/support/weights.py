"""Files of weights made to order: safetensors and GGUF from named arrays, and the variants of a model that its users make.

Names follow the tasks: a header edit, a re-order, shards, another container, some tensors trained on, a fine-tune, one optimiser step.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .models import CASTS, read_header

_ALIGNMENT: Final = 32
_E4M3: Final = np.array(
    [(code & 7) / 512 if code < 8 else (1 + (code & 7) / 8) * 2.0 ** ((code >> 3) - 7) for code in range(127)],
    dtype=np.float32,
)
"""Values of the positive fp8 e4m3 numbers by code, 127 being no number."""
GGUF_TYPES: Final = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "I8": 24, "I64": 27, "BF16": 30}


@dataclass(frozen=True)
class Array:
    """A tensor's bytes with what they mean."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def load_arrays(path: Path) -> dict[str, Array]:
    """Return the tensors of a safetensors file in order of their place."""
    header, start = read_header(path)
    raw = path.read_bytes()
    names = sorted((n for n in header if n != "__metadata__"), key=lambda n: int(header[n]["data_offsets"][0]))
    return {
        name: Array(
            header[name]["dtype"],
            tuple(header[name]["shape"]),
            raw[start + header[name]["data_offsets"][0] : start + header[name]["data_offsets"][1]],
        )
        for name in names
    }


def save_safetensors(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays in their order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, array in arrays.items():
        stop = offset + len(array.data)
        header[name] = {"dtype": array.dtype, "shape": list(array.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            file.write(array.data)


def gguf_string(text: str) -> bytes:
    """Return a string as GGUF writes it."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


def save_gguf(
    path: Path, arrays: Mapping[str, Array], words: Sequence[str] = ("a", "b", "c"), version: int = 3
) -> None:
    """Write arrays in their order, after a small vocabulary."""
    pairs = [
        gguf_string("general.architecture") + struct.pack("<I", 8) + gguf_string("bert"),
        gguf_string("general.alignment") + struct.pack("<II", 4, _ALIGNMENT),
        gguf_string("tokenizer.ggml.tokens")
        + struct.pack("<IIQ", 9, 8, len(words))
        + b"".join(gguf_string(word) for word in words),
        gguf_string("tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, 4) + bytes(16),
        gguf_string("some.flag") + struct.pack("<IB", 7, 1),
    ]
    head = b"GGUF" + struct.pack("<IQQ", version, len(arrays), len(pairs)) + b"".join(pairs)
    offset = 0
    places = []
    for name, array in arrays.items():
        head += gguf_string(name) + struct.pack("<I", len(array.shape))
        head += b"".join(struct.pack("<Q", extent) for extent in reversed(array.shape))
        head += struct.pack("<IQ", GGUF_TYPES[array.dtype], offset)
        places.append(offset)
        offset += (len(array.data) + _ALIGNMENT - 1) & -_ALIGNMENT
    head += bytes(-len(head) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(head)
        for place, array in zip(places, arrays.values(), strict=True):
            file.seek(len(head) + place)
            file.write(array.data)


def save_onnx(model: Path, data: Path, arrays: Mapping[str, Array]) -> None:
    """Write an ONNX model of nothing but initializers, whose data lies in another file, each at a multiple of 4096."""
    initializers, offset = b"", 0
    with data.open("wb") as file:
        for name, array in arrays.items():
            place = {"location": data.name, "offset": str(offset), "length": str(len(array.data))}
            entries = [_field(13, _field(1, key.encode()) + _field(2, text.encode())) for key, text in place.items()]
            dims = b"".join(_varint(1 << 3) + _varint(extent) for extent in array.shape)
            kind = _varint(2 << 3) + _varint({"F32": 1, "I64": 7}[array.dtype])
            initializers += _field(5, dims + kind + _field(8, name.encode()) + b"".join(entries))
            file.seek(offset)
            file.write(array.data)
            offset += (len(array.data) + 4095) & -4096
    model.write_bytes(_varint(1 << 3) + _varint(10) + _field(7, initializers))


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def cast(array: Array, dtype: str) -> Array:
    """Return a float32 tensor in another dtype; others as they are."""
    if array.dtype != "F32" or dtype == "F32":
        return array
    return Array(dtype, array.shape, CASTS[dtype](np.frombuffer(array.data, dtype="<f4")).tobytes())


def quantised_rows(array: Array) -> Array:
    """Return a float32 matrix as int8 with a scale per row (the scales left out); others as they are."""
    if array.dtype != "F32" or len(array.shape) < 2:
        return array
    rows = np.frombuffer(array.data, dtype="<f4").reshape(array.shape[0], -1)
    scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-12) / 127
    return Array("I8", array.shape, np.rint(rows / scale).astype(np.int8).tobytes())


def fp8_rows(array: Array) -> Array:
    """Return a float32 matrix as fp8 (e4m3) with a scale per row (the scales left out); others as they are."""
    if array.dtype != "F32" or len(array.shape) < 2:
        return array
    rows = np.frombuffer(array.data, dtype="<f4").reshape(array.shape[0], -1)
    scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-12) / _E4M3[-1]
    codes = np.searchsorted((_E4M3[1:] + _E4M3[:-1]) / 2, np.abs(rows / scale).ravel()).astype(np.uint8)
    return Array("F8_E4M3", array.shape, (codes | (np.signbit(rows).ravel() << 7).astype(np.uint8)).tobytes())


def block_quantised(array: Array, kind: str) -> Array:
    """Return a float32 matrix in the block layout of GGUF's Q8_0 or Q4_0 (32 elements, one fp16 scale); others as they are."""
    if array.dtype != "F32" or len(array.shape) < 2 or array.shape[-1] % 32:
        return array
    blocks = np.frombuffer(array.data, dtype="<f4").reshape(-1, 32)
    top = 127 if kind == "Q8_0" else 7
    scale = np.maximum(np.abs(blocks).max(axis=1, keepdims=True), 1e-12) / top
    values = np.rint(blocks / scale).astype(np.int8)
    if kind == "Q4_0":
        nibbles = (values + 8).astype(np.uint8)
        values = (nibbles[:, :16] | (nibbles[:, 16:] << 4)).view(np.int8)
    scales = scale.astype(np.float16).view(np.int8).reshape(-1, 2)
    return Array(kind, array.shape, np.hstack([scales, values]).tobytes())


def trained(array: Array, std: float, rng: np.random.Generator) -> Array:
    """Return a float32 tensor after an update: every element moved by a Gaussian of standard deviation `std`."""
    if array.dtype != "F32":
        return array
    values: NDArray[np.float32] = np.frombuffer(array.data, dtype="<f4")
    return Array("F32", array.shape, (values + rng.normal(0, std, len(values)).astype(np.float32)).tobytes())


FINE_TUNE: Final = 4e-4
"""Standard deviation of what a fine-tune moves weights by, where the weights have 0.05."""
ONE_STEP: Final = 2e-5 * 0.229
"""One step of Adam at a learning rate of 2e-5: gradients of noise give m / sqrt(v) a deviation of sqrt((1 - b1) / (1 + b1)) = 0.229."""
