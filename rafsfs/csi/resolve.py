"""What a reference means now: the digest of one image, through an index if there is one."""

from __future__ import annotations

import os
from typing import Final

from ..interfaces import ImageStore
from ..registry.manifests import INDEX_TYPES, of_platform, parse_index
from ..types import Digest

_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


def node_platform() -> str:
    """Return this machine's platform as image indexes write it."""
    machine = os.uname().machine
    return f"linux/{_ARCHITECTURES.get(machine, machine)}"


async def pin(store: ImageStore, reference: str, platform: str) -> Digest:
    """Return the digest of the image under a tag or digest, for a platform (empty: this node's) if that names an index.

    Raises RemoteError, FormatError for an index without the platform.
    """
    descriptor = await store.resolve(reference)
    if descriptor.media_type not in INDEX_TYPES:
        return descriptor.digest
    _, data = await store.get_manifest(descriptor.digest.text)
    return of_platform(parse_index(data), platform or node_platform()).digest
