"""Parsers of weights: what real libraries and we write is read alike; anything else is our own error."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from builder.weights import onnx
from builder.weights.detect import WeightFinder, missing_shards
from builder.weights.onnx import OnnxWeights, external_file, parse_onnx
from rafsfs.errors import FormatError
from rafsfs.format.codec import WIDTH_OPAQUE
from rafsfs.weights.gguf import parse_gguf
from rafsfs.weights.safetensors import parse_safetensors
from rafsfs.weights.tensor import ReadAt, TensorFile
from tests.support.models import published_model
from tests.support.weights import Array, block_quantised, load_arrays, save_gguf, save_safetensors


def reading(data: bytes) -> ReadAt:
    return lambda offset, length: data[offset : offset + length]


def safetensors(header: object, body: int = 100) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(body)


def entry(first: int, stop: int, **other: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [stop - first], "data_offsets": [first, stop], **other}


def test_the_published_model_is_read_as_its_own_library_reads_it() -> None:
    path = published_model() / "model.safetensors"
    data = path.read_bytes()
    found = parse_safetensors(reading(data), len(data))
    assert [t.stop for t in found.tensors[:-1]] == [t.offset for t in found.tensors[1:]]
    assert found.tensors[-1].stop == len(data)
    with safe_open(str(path), framework="numpy") as opened:
        assert {tensor.name for tensor in found.tensors} == set(opened.keys())
        for tensor in found.tensors:
            expected = opened.get_tensor(tensor.name)
            assert tensor.shape == expected.shape
            assert data[tensor.offset : tensor.stop] == expected.tobytes()
            assert tensor.width == expected.dtype.itemsize


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x05",
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 50) + b"{}",
        safetensors(b"{not json"),
        safetensors(b"[" * 100_000),
        safetensors([1, 2]),
        safetensors({}),
        safetensors({"a": entry(0, 10), "b": entry(5, 15)}),
        safetensors({"a": entry(0, 101)}),
        safetensors({"a": entry(10, 5)}),
        safetensors({"a": entry(-5, 5)}),
        safetensors({"a": entry(0, 10, shape=[11])}),
        safetensors({"a": entry(0, 10, shape=[1 << 62, 1 << 62])}),
        safetensors({"a": entry(0, 10, shape="ten")}),
        safetensors({"a": entry(0, 10, shape=[True])}),
        safetensors({"a": entry(0, 10, dtype=7)}),
        safetensors({"a": {"dtype": "U8"}}),
        safetensors({"a": 1}),
        safetensors(b'{"a":' + json.dumps(entry(0, 5)).encode() + b',"a":' + json.dumps(entry(5, 9)).encode() + b"}"),
    ],
)
def test_safetensors_that_lie_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        parse_safetensors(reading(data), len(data))


def test_gguf_says_where_the_tensors_are(tmp_path: Path) -> None:
    arrays = {
        "a": Array("F32", (3, 5), np.arange(15, dtype="<f4").tobytes()),
        "b": Array("I8", (7,), bytes(range(7))),
        "q": block_quantised(Array("F32", (4, 64), np.arange(256, dtype="<f4").tobytes()), "Q4_0"),
        "z": Array("BF16", (10,), bytes(range(20))),
    }
    for version in (2, 3):
        save_gguf(tmp_path / "x.gguf", arrays, words=[f"word {i}" for i in range(5000)], version=version)
        data = (tmp_path / "x.gguf").read_bytes()
        found = parse_gguf(reading(data), len(data))
        assert {t.name: data[t.offset : t.stop] for t in found.tensors} == {n: a.data for n, a in arrays.items()}
        assert {t.name: t.width for t in found.tensors} == {"a": 4, "b": 1, "q": WIDTH_OPAQUE, "z": 2}


def gguf(tensors: int = 0, pairs: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + rest


NAME = struct.pack("<Q", 1) + b"k"


@pytest.mark.parametrize(
    "data",
    [
        b"GGUF",
        gguf(version=1),
        gguf(version=3 << 24),
        gguf(),
        gguf(tensors=1 << 60),
        gguf(pairs=1 << 60),
        gguf(pairs=1, rest=struct.pack("<Q", 1 << 60)),
        gguf(pairs=1, rest=NAME + struct.pack("<I", 99)),
        gguf(pairs=1, rest=NAME + struct.pack("<IIQ", 9, 0, 1 << 60)),
        gguf(pairs=1, rest=NAME + struct.pack("<IIQ", 9, 8, 1 << 60)),
        gguf(pairs=1, rest=NAME + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 10),
        gguf(tensors=1, rest=NAME + struct.pack("<I", 9)),
        gguf(tensors=1, rest=NAME + struct.pack("<IQIQ", 1, 8, 0, 1 << 61)),
        gguf(tensors=1, rest=NAME + struct.pack("<IQIQ", 1, 1 << 60, 0, 0)),
        gguf(tensors=1, rest=NAME + struct.pack("<IQIQ", 1, 8, 0, 4096)),
        gguf(tensors=1, rest=NAME + struct.pack("<IQIQ", 1, 33, 2, 0) + bytes(100)),
        gguf(tensors=2, rest=(NAME + struct.pack("<IQIQ", 1, 8, 0, 0)) * 2 + bytes(100)),
        gguf(pairs=1, tensors=0, rest=struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 3)),
    ],
)
def test_gguf_that_lies_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        parse_gguf(reading(data), len(data))


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def message(*fields: tuple[int, bytes | int]) -> bytes:
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def onnx_model(*initializers: bytes) -> bytes:
    graph = message((1, b"a node" * 3), *((5, one) for one in initializers), (2, b"graph"))
    return message((1, 9), (2, b"producer"), (7, graph), (8, b"opset"))


def outside(name: str, offset: int, length: int, location: str = "weights.bin") -> bytes:
    pairs = [("location", location), ("offset", str(offset)), ("length", str(length))]
    entries = [(13, message((1, key.encode()), (2, value.encode()))) for key, value in pairs]
    return message((1, varint(length // 4)), (2, 1), (8, name.encode()), *entries, (14, 1))


def test_onnx_says_which_weights_are_inside_and_which_outside() -> None:
    inside = message((1, 4), (1, 2), (2, 10), (8, b"inner"), (9, bytes(range(16))))
    data = onnx_model(inside, outside("first", 0, 400), outside("second", 400, 100))
    found = parse_onnx(reading(data), len(data))
    (tensor,) = found.inside
    assert (tensor.name, tensor.dtype, tensor.shape) == ("inner", "F16", (4, 2))
    assert data[tensor.offset : tensor.stop] == bytes(range(16))
    layout = external_file(found.outside["weights.bin"], 500)
    assert [(t.name, t.offset, t.length, t.width) for t in layout.tensors] == [
        ("first", 0, 400, 4),
        ("second", 400, 100, 4),
    ]
    with pytest.raises(FormatError):
        external_file(found.outside["weights.bin"], 499)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 30,
        b"\x3a\x7f",
        varint(7 << 3 | 2) + varint(1 << 62),
        varint(7 << 3 | 3),
        message((7, message((5, varint(13 << 3 | 2) + varint(99))))),
        message((7, message((5, message((8, bytes(1 << 17))))))),
    ],
)
def test_onnx_that_lies_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        parse_onnx(reading(data), len(data))


def test_an_onnx_file_of_countless_fields_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs a microsecond or two, and 256 MiB of them are looked at otherwise: minutes."""
    monkeypatch.setattr(onnx, "_MOST_FIELDS", 1000)
    inside = message((7, b"\x08\x00" * 1001))
    for data in (b"\x08\x00" * 1001, inside):
        with pytest.raises(FormatError, match="more than 1000 parts"):
            parse_onnx(reading(data), len(data))
    parse_onnx(reading(b"\x08\x00" * 1000), 2000)


def sample(kind: str, tmp_path: Path) -> bytes:
    arrays = {f"layer.{i}": Array("F32", (8, 4), random.Random(i).randbytes(128)) for i in range(4)}
    if kind == "onnx":
        return onnx_model(message((1, 4), (2, 1), (8, b"x"), (9, bytes(16))), outside("y", 0, 8))
    path = tmp_path / "sample"
    (save_gguf if kind == "gguf" else save_safetensors)(path, arrays)
    return path.read_bytes()


PARSERS: dict[str, Callable[[ReadAt, int], TensorFile | OnnxWeights]] = {
    "safetensors": parse_safetensors,
    "gguf": parse_gguf,
    "onnx": parse_onnx,
}


@pytest.mark.parametrize("kind", list(PARSERS))
def test_damaged_headers_give_tensors_inside_the_file_or_our_error(
    kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    good = sample(kind, tmp_path_factory.mktemp("sample"))
    rng = random.Random(7)
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        size = rng.choice([len(data), rng.randrange(len(data) + 1)])
        try:
            found = PARSERS[kind](reading(bytes(data[:size])), size)
        except FormatError:
            continue
        if isinstance(found, TensorFile):
            position = 0
            for tensor in found.tensors:
                assert position <= tensor.offset < tensor.stop <= size
                position = tensor.stop


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400), st.sampled_from(list(PARSERS)))
def test_any_bytes_give_our_error_or_tensors(data: bytes, kind: str) -> None:
    with contextlib.suppress(FormatError):
        PARSERS[kind](reading(data), len(data))


@pytest.mark.logs_warnings
def test_a_file_that_promises_weights_and_has_none_is_ordinary_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    finder = WeightFinder()
    data = bytes(100_000)
    with caplog.at_level(logging.WARNING):
        assert finder.look("m/broken.safetensors", reading(data), len(data)) is None
        assert finder.look("m/broken.gguf", reading(b"GGUF" + data), len(data) + 4) is None
    assert [record.getMessage().split(" is ")[0] for record in caplog.records] == [
        "m/broken.safetensors",
        "m/broken.gguf",
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert finder.look("ordinary.bin", reading(data), len(data)) is None
    assert not caplog.records


def test_weights_are_known_by_their_content_whatever_the_name(tmp_path: Path) -> None:
    data = (published_model() / "model.safetensors").read_bytes()
    found = WeightFinder().look("blobs/4f1c", reading(data), len(data))
    assert found is not None
    assert len(found.tensors) == len(load_arrays(published_model() / "model.safetensors"))


def test_files_that_an_onnx_model_names_are_weights() -> None:
    finder = WeightFinder()
    data = onnx_model(outside("first", 0, 40_000), outside("second", 40_000, 60_000, "./weights.bin"))
    finder.add_model("deep/model.onnx", reading(data), len(data))
    weights = bytes(100_000)
    found = finder.look("deep/weights.bin", reading(weights), len(weights))
    assert found is not None
    assert [tensor.name for tensor in found.tensors] == ["first", "second"]
    assert finder.look("weights.bin", reading(weights), len(weights)) is None


def test_an_index_names_the_shards_that_are_missing() -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": 3}}).encode()
    assert missing_shards("m/x.safetensors.index.json", index, ["m/model-1.safetensors"]) == ["model-2.safetensors"]
    for bad in (b"", b"[]", b'{"weight_map": 3}', b"{}", b"[" * 100_000):
        assert missing_shards("m/x.safetensors.index.json", bad, []) == []
