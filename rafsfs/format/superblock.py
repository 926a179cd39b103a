"""EROFS superblock (128 bytes at offset 1024) and device slots (128 bytes each); erofs_fs.h, Linux 6.6.

Decided here: what we write into them and which feature bits we accept. Field names are the kernel's.
Rule: an unknown incompatible bit is refused by name or number, never guessed at.
"""

from __future__ import annotations

import re
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
MAX_BLOCK: Final = 0xFFFFFFFF
"""Block addresses are 32 bits; this one means "hole", so an address space ends below it, at 16 TiB - 4 KiB."""
MAX_DEVICES: Final = 0xFFFF

INCOMPAT_CHUNKED_FILE: Final = 0x4
INCOMPAT_DEVICE_TABLE: Final = 0x8
_INCOMPAT_KNOWN: Final = INCOMPAT_CHUNKED_FILE | INCOMPAT_DEVICE_TABLE
_INCOMPAT_NAMES: Final = {
    0x1: "LZ4_0PADDING",
    0x2: "COMPR_CFGS",
    0x10: "ZTAILPACKING",
    0x20: "FRAGMENTS",
    0x40: "XATTR_PREFIXES",
    0x80: "48BIT",
    0x100: "METABOX",
}

_SUPER = struct.Struct("<IIIBBHQqIIII16s16sIHHHBBIQ24x")
_SLOT = struct.Struct("<64sII56x")
assert _SUPER.size == SUPER_SIZE
assert _SLOT.size == SLOT_SIZE

_TAG = re.compile(rb"\A[0-9a-f]{64}\Z")

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class DeviceSlot:
    """One extra device: a data space."""

    tag: bytes
    """64 ASCII hex digits: the id of the data space."""
    blocks: int
    """Size in 4 KiB blocks."""

    @property
    def space_id(self) -> bytes:
        """The 32 bytes that the tag spells. Raises FormatError if it spells none."""
        if not _TAG.match(self.tag):
            raise FormatError(f"device tag {self.tag!r} is not the 64 lower-case hex digits of a data space id")
        return bytes.fromhex(self.tag.decode("ascii"))


@dataclass(frozen=True, slots=True)
class Superblock:
    """What a reader needs of the superblock."""

    root_nid: int
    inos: int
    """Number of inodes."""
    blocks: int
    """Size of the bootstrap in 4 KiB blocks; nothing at or past blocks * 4096 belongs to it."""
    meta_blkaddr: int
    """First block of the metadata area: the inode of nid n is at meta_blkaddr * 4096 + n * 32."""
    extra_devices: int
    devt_slotoff: int
    """Offset of the first device slot = value * 128."""
    epoch_ns: int = 0
    """Time from which compact inodes count theirs; we write 0 and no compact inodes."""

    def pack(self) -> bytes:
        """Return the 128 bytes at offset 1024."""
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
            _INCOMPAT_KNOWN,
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
        magic, _, _, blkszbits, extslots, root_nid, inos, epoch, fixed_nsec = fields[:9]
        blocks, meta_blkaddr, incompat = fields[9], fields[10], fields[14]
        extra_devices, devt_slotoff, dirblkbits = fields[16:19]
        if magic != MAGIC:
            raise FormatError(f"bootstrap has magic {magic:#x}, expected {MAGIC:#x} (EROFS)")
        if unknown := incompat & ~_INCOMPAT_KNOWN:
            raise UnsupportedError(
                f"bootstrap needs EROFS features {_name_features(unknown)} that this program does not read"
            )
        if blkszbits != BLKSZBITS or dirblkbits or extslots:
            raise UnsupportedError(
                f"bootstrap has block bits {blkszbits}, directory block bits {dirblkbits}, {extslots} extra slots; "
                f"expected {BLKSZBITS}, 0, 0"
            )
        if blocks * BLOCK_SIZE > len(buffer):
            raise FormatError(f"bootstrap is {len(buffer)} bytes, its superblock says {blocks * BLOCK_SIZE}: cut off")
        if not meta_blkaddr < blocks:
            raise FormatError(f"bootstrap of {blocks} blocks has its inodes at block {meta_blkaddr}")
        if fixed_nsec >= 1_000_000_000:
            raise FormatError(f"superblock has {fixed_nsec} nanoseconds")
        if not incompat & INCOMPAT_DEVICE_TABLE:
            extra_devices = 0
        epoch_ns = epoch * 1_000_000_000 + fixed_nsec
        return cls(root_nid, inos, blocks, meta_blkaddr, extra_devices, devt_slotoff, epoch_ns)

    def read_slots(self, buffer: Buffer) -> tuple[DeviceSlot, ...]:
        """Return the device slots. Raises FormatError if they leave the bootstrap or run into the superblock."""
        start = self.devt_slotoff * SLOT_SIZE
        end = start + SLOT_SIZE * self.extra_devices
        if not self.extra_devices:
            return ()
        if start < SUPER_OFFSET + SUPER_SIZE or end > self.blocks * BLOCK_SIZE:
            raise FormatError(f"{self.extra_devices} device slots at {start} leave a bootstrap of {self.blocks} blocks")
        return tuple(DeviceSlot(tag, blocks) for tag, blocks, _ in _SLOT.iter_unpack(buffer[start:end]))


def _name_features(bits: int) -> str:
    """Return the names of feature bits, and in hex those that have none."""
    names = [name for bit, name in _INCOMPAT_NAMES.items() if bits & bit]
    if nameless := bits & ~sum(_INCOMPAT_NAMES):
        names.append(hex(nameless))
    return ", ".join(names)


def pack_slot(slot: DeviceSlot, uniaddr: int) -> bytes:
    """Return the 128 bytes of a device slot.

    `uniaddr` is the block at which the device stands if all are strung together behind the bootstrap in one file. It is
    never 0: a bootstrap mounted by itself, without its devices, must give EIO for file data and not bytes of itself.
    """
    return _SLOT.pack(slot.tag, slot.blocks, min(uniaddr, MAX_BLOCK))


def device_slot(space_id: bytes, size: int) -> DeviceSlot:
    """Return the slot of a data space of `size` bytes. Raises FormatError for what a slot cannot say."""
    blocks = (size + BLOCK_SIZE - 1) // BLOCK_SIZE
    if len(space_id) != 32 or size < 0 or blocks > MAX_BLOCK:
        raise FormatError(
            f"data space {space_id.hex()[:64]} of {size} bytes: an id has 32 bytes and EROFS addresses 2^32 - 1 blocks"
        )
    return DeviceSlot(space_id.hex().encode(), blocks)
