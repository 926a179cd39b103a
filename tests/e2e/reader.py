"""A reader of a mount, run as a process of its own: compares every byte with the source, says how far it got.

`python reader.py SOURCE MOUNTED ORDER SEED`: ORDER is `sequential`, `random` or `mmap`. Prints one line per 8 MiB
compared and `done N` at the end; ends with 1 and one line at the first wrong byte or error.
"""

from __future__ import annotations

import mmap
import os
import random
import sys

STEP = 256 * 1024
SHOW = 8 << 20


def main() -> None:
    source, mounted, order, seed = os.fsencode(sys.argv[1]), os.fsencode(sys.argv[2]), sys.argv[3], sys.argv[4]
    one, other = os.open(source, os.O_RDONLY), os.open(mounted, os.O_RDONLY)
    size = os.fstat(one).st_size
    if os.fstat(other).st_size != size:
        sys.exit(f"size {os.fstat(other).st_size}, expected {size}")
    offsets = list(range(0, size, STEP))
    if order == "random":
        random.Random(int(seed)).shuffle(offsets)
    mapped = mmap.mmap(other, size, prot=mmap.PROT_READ) if order == "mmap" else None
    done = shown = 0
    for at in offsets:
        wanted = os.pread(one, STEP, at)
        try:
            got = mapped[at : at + STEP] if mapped is not None else read(other, len(wanted), at)
        except OSError as error:
            sys.exit(f"error {error.errno} at {at}")
        if got != wanted:
            sys.exit(f"wrong byte in [{at}, {at + STEP})")
        done += len(got)
        if done - shown >= SHOW:
            shown = done
            print(done, flush=True)
    print(f"done {done}", flush=True)


def read(fd: int, length: int, at: int) -> bytes:
    parts = []
    while length:
        part = os.pread(fd, length, at)
        if not part:
            break
        parts.append(part)
        at += len(part)
        length -= len(part)
    return b"".join(parts)


if __name__ == "__main__":
    main()
