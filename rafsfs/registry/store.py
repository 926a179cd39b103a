"""Opening the store that a reference names.

Decided here: which implementation serves which kind of reference. Rule: nothing above this module asks which one it got.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from ..interfaces import ImageStore
from .options import RegistryOptions
from .reference import Reference

__all__ = ["RegistryOptions", "make_store", "open_store"]


def make_store(reference: Reference, options: RegistryOptions | None = None) -> ImageStore:
    """Return the store of a reference; the caller closes it with `aclose`. Raises UsageError for unusable options."""
    options = options or RegistryOptions()
    if reference.kind == "oci":
        from .oci_layout import OciLayout  # noqa: PLC0415 - a layout does not pay for importing the HTTP stack

        return OciLayout(reference.path, lock_timeout_s=options.timeout_s)
    from .client import RegistryStore  # noqa: PLC0415

    return RegistryStore(reference, options)


@asynccontextmanager
async def open_store(reference: Reference, options: RegistryOptions | None = None) -> AsyncIterator[ImageStore]:
    """Open the repository or layout directory of `reference`; close its connections at the end.

    Nothing is asked of the store yet: that it is missing or refuses shows at first use.
    """
    store = make_store(reference, options)
    try:
        yield store
    finally:
        # Also after a cancellation connections are closed, but not for longer than a farewell takes.
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 2):
            await store.aclose()
