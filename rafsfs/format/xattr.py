"""EROFS inline extended attributes: a 12-byte header, then entries padded to 4 bytes; erofs_fs.h, Linux 6.6.

Decided here: which names can be stored (user, trusted, security, POSIX ACLs) and the limits. Shared xattrs are not
used.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from ..errors import FormatError, UnsupportedError
from ..types import align_up

_HEADER: Final = bytes(12)
_ENTRY = struct.Struct("<BBH")

_PREFIXES: Final = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}
MAX_NAME: Final = 255
"""Bytes of a full name, the limit of the system calls."""
MAX_VALUE: Final = 65535
MAX_AREA: Final = 12 + 4 * 65534
"""i_xattr_icount is 16 bits."""


def can_store(name: bytes) -> bool:
    """Tell whether an xattr of this full name can be stored."""
    return _split(name) is not None


def _split(name: bytes) -> tuple[int, bytes] | None:
    for index, prefix in _PREFIXES.items():
        if prefix.endswith(b"."):
            if name.startswith(prefix) and len(name) > len(prefix):
                return index, name[len(prefix) :]
        elif name == prefix:
            return index, b""
    return None


def pack_xattrs(xattrs: Mapping[bytes, bytes]) -> bytes:
    """Return the xattr area, sorted by name; empty for none. Raises FormatError for what EROFS cannot hold."""
    if not xattrs:
        return b""
    out = bytearray(_HEADER)
    for name in sorted(xattrs):
        value = xattrs[name]
        split = _split(name)
        if split is None or len(name) > MAX_NAME or len(value) > MAX_VALUE or b"\0" in name:
            raise FormatError(
                f"xattr {name[:64]!r} of {len(value)} bytes cannot be stored: EROFS takes user, trusted, security "
                f"and POSIX ACLs, names to {MAX_NAME} and values to {MAX_VALUE} bytes"
            )
        index, suffix = split
        out += _ENTRY.pack(len(suffix), index, len(value)) + suffix + value
        out += bytes(align_up(len(out), 4) - len(out))
    if len(out) > MAX_AREA:
        raise FormatError(f"xattrs take {len(out)} bytes together, EROFS holds {MAX_AREA} per inode")
    return bytes(out)


def unpack_xattrs(area: memoryview) -> dict[bytes, bytes]:
    """Return full names and values of an xattr area. Raises FormatError."""
    found: dict[bytes, bytes] = {}
    if len(area) < len(_HEADER):
        return found
    if area[4]:
        raise UnsupportedError(f"{area[4]} shared xattrs, which RAFS images do not use")
    at = len(_HEADER)
    while at + _ENTRY.size <= len(area):
        name_length, index, value_length = _ENTRY.unpack_from(area, at)
        start = at + _ENTRY.size
        middle, end = start + name_length, start + name_length + value_length
        prefix = _PREFIXES.get(index)
        if prefix is None or end > len(area) or (prefix.endswith(b".") != (name_length > 0)):
            raise FormatError(f"xattr entry at {at} has name index {index} and ends at {end} of {len(area)}")
        name = prefix + bytes(area[start:middle])
        if b"\0" in name or name in found or len(name) > MAX_NAME:
            raise FormatError(f"xattr name {name[:64]!r} of {len(name)} bytes holds a NUL, is too long or comes twice")
        found[name] = bytes(area[middle:end])
        at = align_up(end, 4)
    return found
