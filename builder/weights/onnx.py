"""Where an ONNX model keeps its weights: inside the file, or in others that it names.

By hand, a walk over protobuf's wire format, not by the onnx library: that one reads the whole model into memory and brings
protobuf along; we need six fields of three messages. Source: onnx.proto3 of ONNX 1.19 (ModelProto.graph 7, GraphProto.initializer 5,
TensorProto: dims 1, data_type 2, name 8, raw_data 9, external_data 13). Weights kept as repeated
fields, not raw, are left to content-defined cutting.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from rafsfs.errors import FormatError
from rafsfs.weights.tensor import MAX_TENSORS, ReadAt, Tensor, TensorFile, checked
from rafsfs.weights.window import Window

_LIMIT: Final = 256 << 20
_MOST_FIELDS: Final = 2_000_000
"""Fields looked at in one model. One of 100,000 tensors has 1.6 million; a file made of fields of two bytes would take minutes."""
_STEP: Final = 4096
"""Bytes read at a time: between two tensors lies data that is jumped over."""
_DTYPES: Final = {
    1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16", 11: "F64", 12: "U32",
    13: "U64", 14: "C64", 15: "C128", 16: "BF16", 17: "F8_E4M3", 18: "F8_E4M3FNUZ", 19: "F8_E5M2", 20: "F8_E5M2FNUZ",
    21: "U4", 22: "I4", 23: "F4",
}  # fmt: skip


@dataclass(slots=True)
class OnnxWeights:
    """The tensors of a model by the file that they are in."""

    inside: list[Tensor] = field(default_factory=list)
    outside: dict[str, list[Tensor]] = field(default_factory=dict)
    """Name of the file, relative to the model's directory, to its tensors; a length of 0 stands for all that follows."""


def parse_onnx(read: ReadAt, size: int) -> OnnxWeights:
    """Return where the weights of an ONNX model are. Raises FormatError."""
    found = OnnxWeights()
    window = Window(read, size, _LIMIT, step=_STEP)
    count = 0
    for number, start, stop in _fields(window, 0, size):
        if number != 7:
            continue
        for inner, first, last in _fields(window, start, stop):
            if inner == 5:
                count += 1
                if count > MAX_TENSORS:
                    raise FormatError(f"more than {MAX_TENSORS} tensors")
                _initializer(window, first, last, found)
    return found


def external_file(tensors: list[Tensor], size: int) -> TensorFile:
    """Return the layout of a file that an ONNX model names. Raises FormatError if the tensors are not those of this file."""
    return checked("onnx", [t if t.length else _rest(t, size) for t in tensors], size)


def inside_file(weights: OnnxWeights, size: int) -> TensorFile:
    """Return the layout of the model itself. Raises FormatError if it has no weights inside."""
    return checked("onnx", weights.inside, size)


def _rest(tensor: Tensor, size: int) -> Tensor:
    return Tensor(tensor.name, tensor.dtype, tensor.shape, tensor.offset, max(0, size - tensor.offset))


def _initializer(window: Window, start: int, stop: int, found: OnnxWeights) -> None:
    dims: list[int] = []
    kind, name, raw = 0, "", (0, 0)
    external: dict[str, str] = {}
    for number, first, last in _fields(window, start, stop):
        if number == 1:  # packed, or one varint
            window.position = first
            while window.position < last:
                dims.append(_varint(window))
        elif number == 2:
            window.position = first
            kind = _varint(window)
        elif number == 8:
            name = _text(window, first, last)
        elif number == 9:
            raw = (first, last - first)
        elif number == 13:
            pair = {inner: _text(window, a, b) for inner, a, b in _fields(window, first, last) if inner in {1, 2}}
            external[pair.get(1, "")] = pair.get(2, "")
        if len(dims) > 64 or len(external) > 16:
            raise FormatError(f"tensor {name[:100]!r} has too many dimensions or entries")
    dtype = _DTYPES.get(kind, f"ONNX_{kind}")
    if external.get("location"):
        with suppress(ValueError):
            offset, length = int(external.get("offset", "0")), int(external.get("length", "0"))
            if 0 <= offset < 1 << 60 and 0 <= length < 1 << 60:
                tensor = Tensor(name, dtype, tuple(dims), offset, length)
                found.outside.setdefault(external["location"], []).append(tensor)
    elif raw[1]:
        found.inside.append(Tensor(name, dtype, tuple(dims), *raw))


def _fields(window: Window, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield (field number, first byte, byte after the last) of each field of a message, wherever the window has moved meanwhile."""
    position = start
    while position < stop:
        window.position = position
        window.count_one(_MOST_FIELDS)
        tag = _varint(window)
        kind = tag & 7
        if kind == 2:
            length = _varint(window)
            first = window.position
        else:
            first = window.position
            if kind == 0:
                _varint(window)
                length = window.position - first
            elif kind in {1, 5}:
                length = 8 if kind == 1 else 4
            else:
                raise FormatError(f"wire type {kind} at byte {position}, which protobuf does not have any more")
        if first + length > stop:
            raise FormatError(f"a field at byte {position} leaves its message")
        yield tag >> 3, first, first + length
        position = first + length


def _varint(window: Window) -> int:
    value = 0
    for shift in range(0, 70, 7):
        (byte,) = window.take(1)
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
    raise FormatError(f"varint of more than 10 bytes at {window.position}")


def _text(window: Window, first: int, last: int) -> str:
    if last - first > 1 << 16:
        raise FormatError(f"text of {last - first} bytes")
    window.position = first
    return window.take(last - first).decode("utf-8", "replace")
