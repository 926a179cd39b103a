"""Groups: the unit of leases and announcements. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

GROUP_BYTES: Final = 4 << 20
"""Bytes of address space per group: a few requests to a registry per second and link at 100 MB/s, and few enough groups for a scheduler:
32,000 for a model of 130 GB."""


def group_count(size: int) -> int:
    """Return how many groups a data space of `size` bytes has."""
    return (size + GROUP_BYTES - 1) // GROUP_BYTES


def group_of(offset: int) -> int:
    """Return the group of a chunk that starts at `offset` of its data space."""
    return offset // GROUP_BYTES


def pack_bits(numbers: Iterable[int], count: int) -> bytes:
    """Return a bitmap of `count` bits, the lowest bit of each byte first."""
    bits = bytearray((count + 7) // 8)
    for number in numbers:
        bits[number >> 3] |= 1 << (number & 7)
    return bytes(bits)


def unpack_bits(bits: bytes, count: int) -> list[int]:
    """Return the numbers below `count` whose bits are set; bits beyond, and a bitmap that is too short, are taken as zeros."""
    found = []
    for position, byte in enumerate(bits[: (count + 7) // 8]):
        while byte:
            low = byte & -byte
            number = 8 * position + low.bit_length() - 1
            if number < count:
                found.append(number)
            byte ^= low
    return found
