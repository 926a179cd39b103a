"""The composition root: from a reference and options to stores and images."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rafsfs.image import Image, load_image
from rafsfs.interfaces import ImageStore
from rafsfs.registry.reference import Reference, parse_reference
from rafsfs.registry.store import RegistryOptions, open_store


@asynccontextmanager
async def opened(text: str, options: RegistryOptions) -> AsyncIterator[tuple[Reference, ImageStore]]:
    """Yield the parsed reference and its store."""
    reference = parse_reference(text)
    async with open_store(reference, options) as store:
        yield reference, store


@asynccontextmanager
async def opened_image(text: str, options: RegistryOptions) -> AsyncIterator[tuple[Image, ImageStore]]:
    """Yield an image, its metadata fetched and checked, and its store."""
    async with opened(text, options) as (reference, store):
        yield await load_image(store, reference.reference), store
