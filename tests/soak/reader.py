"""A reader that does not give up: `python -S reader.py SOURCE MOUNTED SEED WAY`; runs until it is killed.

WAY: `read` or `mmap` random ranges, dropping the pages now and then; `drop`: read and drop each time, so that every read asks whoever
serves the mount. Compares all with the source and opens the file anew now and then. An error is told and read over; a byte that
differs ends it with 1 and a line. Tells lines of JSON: of each operation that took longer than SLOW_S or failed, [start, seconds,
errno]; and now and then [now, reads so far]. Times are of the monotonic clock, which all processes share.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import sys
import time

LARGEST = 256 * 1024
SLOW_S = 0.02
TELL_S = 0.1


class Teller:
    """What is told, and how many reads there were."""

    def __init__(self) -> None:
        self.reads = 0
        self.told = 0.0

    def done(self, started: float, code: int = 0) -> None:
        now = time.monotonic()
        self.reads += not code
        if code or now - started > SLOW_S:
            self.tell([started, now - started, code])
        if not code and now - self.told > TELL_S:
            self.told = now
            self.tell([now, self.reads])

    def tell(self, what: list[float]) -> None:
        print(json.dumps(what), flush=True)


def main() -> None:
    source, mounted, seed, way = sys.argv[1:5]
    rng = random.Random(int(seed))
    one = os.open(source, os.O_RDONLY)
    size = os.fstat(one).st_size
    teller = Teller()
    while True:
        other = -1
        mapped = None
        started = time.monotonic()
        try:
            other = os.open(mounted, os.O_RDONLY)
            if way == "mmap":
                mapped = mmap.mmap(other, size, prot=mmap.PROT_READ)
            for _ in range(rng.randrange(5, 60)):
                length = min(LARGEST, 4096 << rng.randrange(7))
                at = rng.randrange(0, size - length) & -4096
                wanted = os.pread(one, length, at)
                started = time.monotonic()
                got = mapped[at : at + length] if mapped is not None else read(other, length, at)
                if got != wanted:
                    zeros = sum(not any(got[i : i + 4096]) for i in range(0, length, 4096))
                    sys.exit(f"wrong bytes in [{at}, {at + length}): {zeros} pages of zeros")
                teller.done(started)
                if mapped is None and (way == "drop" or rng.random() < 0.3):
                    started = time.monotonic()
                    os.posix_fadvise(other, 0, 0, os.POSIX_FADV_DONTNEED)
                if way == "drop":
                    time.sleep(0.002)  # on two cores, so that the others come to read as well
        except OSError as error:
            teller.done(started, error.errno or 1)
            time.sleep(0.02)
        finally:
            if mapped is not None:
                mapped.close()
            if other >= 0:
                drop_and_close(other)


def drop_and_close(fd: int) -> None:
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    except OSError:
        return  # a dead FUSE mount: `close` says so, too


def read(fd: int, length: int, at: int) -> bytes:
    parts = []
    while length:
        data = os.pread(fd, length, at)
        if not data:
            break
        parts.append(data)
        at += len(data)
        length -= len(data)
    return b"".join(parts)


if __name__ == "__main__":
    main()
