"""EROFS superblock (128 bytes at offset 1024) and device slots (128 bytes each), erofs_fs.h of Linux 6.6.

Decided here: what we write into them and which feature bits we accept. Field names are the kernel's.
Rule: an unknown incompatible bit is refused by name or number, never guessed at.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from ..errors import FormatError, UnsupportedError
from ..types import BLOCK_SIZE

SUPER_OFFSET: Final = 1024
SUPER_SIZE: Final = 128
SLOT_SIZE: Final = 128
MAGIC: Final = 0xE0F5E1E2
BLKSZBITS: Final = 12

INCOMPAT_CHUNKED_FILE: Final = 0x4
INCOMPAT_DEVICE_TABLE: Final = 0x8
_INCOMPAT_KNOWN: Final = INCOMPAT_CHUNKED_FILE | INCOMPAT_DEVICE_TABLE
_INCOMPAT_NAMES: Final = {
    0x1: "LZ4_0PADDING",
    0x2: "COMPR_CFGS/BIG_PCLUSTER",
    0x10: "ZTAILPACKING/COMPR_HEAD2",
    0x20: "FRAGMENTS/DEDUPE",
    0x40: "XATTR_PREFIXES",
    0x80: "48BIT",
    0x100: "METABOX",
}

_SUPER = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQ24x")
_SLOT = struct.Struct("<64sII56x")
assert _SUPER.size == SUPER_SIZE
assert _SLOT.size == SLOT_SIZE

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class DeviceSlot:
    """One extra device: a data space."""

    tag: bytes
    """64 ASCII hex digits: the id of the data space."""
    blocks: int
    """Size in 4 KiB blocks."""


@dataclass(frozen=True, slots=True)
class Superblock:
    """What a reader needs of the superblock."""

    root_nid: int
    inos: int
    """Number of inodes."""
    blocks: int
    meta_blkaddr: int
    """First block of the metadata area: the inode of nid n is at meta_blkaddr * 4096 + n * 32."""
    extra_devices: int
    devt_slotoff: int
    """Offset of the first device slot = value * 128."""

    def pack(self) -> bytes:
        """Return the 128 bytes at offset 1024."""
        incompat = _INCOMPAT_KNOWN if self.extra_devices else INCOMPAT_CHUNKED_FILE
        return _SUPER.pack(
            MAGIC,
            0,  # checksum: unused, the digest of the whole bootstrap is stronger
            0,  # feature_compat
            BLKSZBITS,
            0,  # sb_extslots
            self.root_nid,
            self.inos,
            0,  # epoch: only compact inodes use it
            0,  # fixed_nsec
            self.blocks,
            self.meta_blkaddr,
            0,  # xattr_blkaddr: no shared xattrs
            bytes(16),
            b"rafs".ljust(16, b"\0"),
            incompat,
            0,  # available_compr_algs
            self.extra_devices,
            self.devt_slotoff,
            0,  # dirblkbits
            0,  # xattr_prefix_count
            0,  # xattr_prefix_start
            0,  # packed_nid
        )

    @classmethod
    def unpack_from(cls, buffer: Buffer) -> Superblock:
        """Read and check the superblock of a bootstrap. Raises FormatError, UnsupportedError."""
        if len(buffer) < SUPER_OFFSET + SUPER_SIZE:
            raise FormatError(f"bootstrap is {len(buffer)} bytes, too short for an EROFS superblock")
        fields = _SUPER.unpack_from(buffer, SUPER_OFFSET)
        magic, _, _, blkszbits, extslots, root_nid, inos = fields[:7]
        blocks, meta_blkaddr, incompat = fields[9], fields[10], fields[14]
        extra_devices, devt_slotoff, dirblkbits = fields[16:19]
        if magic != MAGIC:
            raise FormatError(f"bootstrap has magic {magic:#x}, expected {MAGIC:#x} (EROFS)")
        unknown = incompat & ~_INCOMPAT_KNOWN
        if unknown:
            names = [name for bit, name in _INCOMPAT_NAMES.items() if unknown & bit] or [hex(unknown)]
            raise UnsupportedError(f"bootstrap needs EROFS features {', '.join(names)} that this program does not read")
        if blkszbits != BLKSZBITS or dirblkbits or extslots:
            raise UnsupportedError(
                f"bootstrap has block bits {blkszbits}, directory block bits {dirblkbits}, {extslots} extra slots; "
                f"expected {BLKSZBITS}, 0, 0"
            )
        return cls(root_nid, inos, blocks, meta_blkaddr, extra_devices, devt_slotoff)

    def read_slots(self, buffer: Buffer) -> tuple[DeviceSlot, ...]:
        """Return the device slots. Raises FormatError if they leave the bootstrap."""
        start = self.devt_slotoff * SLOT_SIZE
        if self.extra_devices and (
            start < SUPER_OFFSET + SUPER_SIZE or start + SLOT_SIZE * self.extra_devices > len(buffer)
        ):
            raise FormatError(f"{self.extra_devices} device slots at {start} leave a bootstrap of {len(buffer)} bytes")
        slots = []
        for index in range(self.extra_devices):
            tag, blocks, _ = _SLOT.unpack_from(buffer, start + index * SLOT_SIZE)
            slots.append(DeviceSlot(tag, blocks))
        return tuple(slots)


def pack_slot(slot: DeviceSlot) -> bytes:
    """Return the 128 bytes of a device slot. mapped_blkaddr stays 0: each device is its own file."""
    return _SLOT.pack(slot.tag, slot.blocks, 0)


def device_slot(space_id: bytes, size: int) -> DeviceSlot:
    """Return the slot of a data space of `size` bytes."""
    return DeviceSlot(space_id.hex().encode(), (size + BLOCK_SIZE - 1) // BLOCK_SIZE)
