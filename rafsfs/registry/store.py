"""Opening the store that a reference names: a registry repository or an OCI layout."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ..interfaces import ImageStore
from .client import RegistryStore
from .oci_layout import OciLayout
from .reference import Reference
from .remote import RegistryOptions

__all__ = ["RegistryOptions", "make_store", "open_store"]


def make_store(reference: Reference, options: RegistryOptions) -> ImageStore:
    """Return the store of a reference; the caller closes it with `aclose`."""
    if reference.kind == "oci":
        return OciLayout(reference.path)
    return RegistryStore(reference, options)


@asynccontextmanager
async def open_store(reference: Reference, options: RegistryOptions) -> AsyncIterator[ImageStore]:
    """Yield the store of a reference and close it at the end."""
    store = make_store(reference, options)
    try:
        yield store
    finally:
        await store.aclose()
