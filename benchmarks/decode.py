"""How fast are chunks decoded and encoded, per codec, by one thread and by two?

Input: the published weights and their casts in 1 MiB chunks, 45 MB of each. Decoding is into a buffer that was there before, as the fetch
pipeline does it, digest check left out. Baseline: copying the same bytes in one thread, which is what codec raw costs. Two threads: each
decodes half of the chunks; the ratio that counts is two threads against one. Units: MB of decoded bytes per second.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from rafsfs.format.codec import Encoded, codec_name, decode, encode, encode_delta
from rafsfs.format.planes import EXTRA_ROOM
from tests.support.models import published_model
from tests.support.weights import FINE_TUNE, ONE_STEP, Array, cast, load_arrays, quantised_rows, trained

from .measure import Row, interleave, median, timed
from .setting import Setting

CHUNK = 1 << 20
_TOTAL = 45 << 20
_PASSES = 3
Work = Callable[[Sequence[int]], None]


def _chunks(data: bytes) -> list[bytes]:
    return [data[at : at + CHUNK] for at in range(0, min(len(data), _TOTAL) - CHUNK + 1, CHUNK)]


def _joined(arrays: dict[str, Array], change: Callable[[Array], Array]) -> bytes:
    return b"".join(changed.data for changed in map(change, arrays.values()) if changed.dtype != "I64")


def _cases() -> Iterator[tuple[str, list[bytes], int, str, list[bytes] | None]]:
    """Yield (name, chunks, element width, policy, chunks of the base)."""
    arrays = load_arrays(published_model() / "model.safetensors")
    half = _chunks(_joined(arrays, lambda array: cast(array, "BF16")))
    yield "F32", _chunks(_joined(arrays, lambda array: array)), 4, "auto", None
    yield "BF16", half, 2, "auto", None
    yield "F16", _chunks(_joined(arrays, lambda array: cast(array, "F16"))), 2, "auto", None
    yield "int8", _chunks(_joined(arrays, quantised_rows)), 1, "auto", None
    yield "BF16, codec zstd", half, 0, "zstd", None
    for name, moved_by in (("fine-tune", FINE_TUNE), ("one step", ONE_STEP)):
        rng = np.random.default_rng(1)
        after = _joined(arrays, lambda array, by=moved_by, rng=rng: cast(trained(array, by, rng), "BF16"))  # type: ignore[misc]
        yield f"BF16 {name} to its base", _chunks(after), 2, "auto", half


def _in_threads(work: Work, count: int, threads: int) -> float:
    """Return the seconds that `work` takes over all chunks, divided among threads."""
    running = [threading.Thread(target=work, args=(range(first, count, threads),)) for first in range(threads)]
    started = time.perf_counter()
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return time.perf_counter() - started


def _encode(chunks: list[bytes], width: int, policy: str, bases: list[bytes] | None, numbers: Sequence[int]) -> None:
    room = memoryview(bytearray(CHUNK + EXTRA_ROOM))
    for number in numbers:
        _encoded(chunks[number], width, policy, bases[number] if bases else None, room)


def _encoded(data: bytes, width: int, policy: str, base: bytes | None, room: memoryview | None) -> Encoded:
    alone = encode(memoryview(data), policy, width, room)
    return alone if base is None else encode_delta(memoryview(data), memoryview(base), width, alone)


def _decode(stored: list[Encoded], bases: list[bytes] | None, numbers: Sequence[int]) -> None:
    out = memoryview(bytearray(CHUNK))
    for _ in range(_PASSES):
        for number in numbers:
            one = stored[number]
            decode(one.codec, one.param, memoryview(one.data), out, memoryview(bases[number]) if bases else None)


def _copy(chunks: list[bytes]) -> None:
    out = memoryview(bytearray(CHUNK))
    for _ in range(_PASSES):
        for data in chunks:
            out[:] = data


def run(setting: Setting) -> list[Row]:
    """Measure."""
    rows = []
    for name, chunks, width, policy, bases in _cases():
        stored = [
            Encoded(one.codec, one.param, bytes(one.data))
            for one in (
                _encoded(data, width, policy, bases[n] if bases else None, None) for n, data in enumerate(chunks)
            )
        ]
        out = memoryview(bytearray(CHUNK))
        for number, one in enumerate(stored):
            decode(one.codec, one.param, memoryview(one.data), out, memoryview(bases[number]) if bases else None)
            assert out == chunks[number], "what is measured must be right"
        share = sum(len(one.data) for one in stored) / (CHUNK * len(chunks))
        count = len(chunks)
        decoding, encoding = partial(_decode, stored, bases), partial(_encode, chunks, width, policy, bases)
        seconds = interleave(
            {
                "d1": partial(_in_threads, decoding, count, 1),
                "d2": partial(_in_threads, decoding, count, 2),
                "e1": partial(_in_threads, encoding, count, 1),
                "e2": partial(_in_threads, encoding, count, 2),
                "copy": partial(timed, partial(_copy, chunks)),
            },
            setting.rounds,
        )
        size = CHUNK * count / 1e6
        one, two, copied = (size * _PASSES / median(seconds[key]) for key in ("d1", "d2", "copy"))
        codecs = "+".join(sorted({codec_name(part.codec) for part in stored}))
        rows.append(
            Row(
                f"decode {name} ({codecs}, {share:.2f} of raw)",
                f"{two:.0f} MB/s, two threads",
                f"{one:.0f} MB/s, one thread; copying {copied:.0f}",
                two / one,
                ">= 1.6",
                two / one >= 1.6,
                f"encode {size / median(seconds['e1']):.0f} and {size / median(seconds['e2']):.0f} MB/s",
            )
        )
    return rows
