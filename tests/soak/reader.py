"""A reader that does not give up: `python -S reader.py SOURCE MOUNTED SEED WAY`, WAY `read` or `mmap`; runs until it is killed.

Compares random ranges with the source, drops the pages it has read, opens the file anew now and then. An error is counted and read over;
a byte that differs ends it with 1 and a line. Prints a line of JSON each half second.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import sys
import time

LARGEST = 512 * 1024


def main() -> None:
    source, mounted, seed, way = sys.argv[1:5]
    rng = random.Random(int(seed))
    one = os.open(source, os.O_RDONLY)
    size = os.fstat(one).st_size
    reads = errors = 0
    longest = 0.0
    shown = time.monotonic()
    while True:
        other = -1
        mapped = None
        try:
            other = os.open(mounted, os.O_RDONLY)
            if way == "mmap":
                mapped = mmap.mmap(other, size, prot=mmap.PROT_READ)
            for _ in range(rng.randrange(5, 60)):
                length = min(LARGEST, 4096 << rng.randrange(8))
                at = rng.randrange(0, size - length) & -4096
                wanted = os.pread(one, length, at)
                started = time.monotonic()
                got = mapped[at : at + length] if mapped is not None else read(other, length, at)
                longest = max(longest, time.monotonic() - started)
                if got != wanted:
                    zeros = sum(not any(got[i : i + 4096]) for i in range(0, length, 4096))
                    sys.exit(f"wrong bytes in [{at}, {at + length}): {zeros} pages of zeros")
                reads += 1
                if rng.random() < 0.3 and mapped is None:
                    os.posix_fadvise(other, 0, 0, os.POSIX_FADV_DONTNEED)
                if time.monotonic() - shown > 0.5:
                    shown = time.monotonic()
                    print(json.dumps({"reads": reads, "errors": errors, "longest_s": longest}), flush=True)
        except OSError:
            errors += 1
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
