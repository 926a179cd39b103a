"""Views on disk: bootstraps of parts of images, CACHE/views/NAME.erofs, one per image and patterns, made when a mount asks for
them.

Decided here: names, and when they go. Rule: a view is written under a temporary name and renamed, so one that is there is
whole; it is made of a bootstrap that has been checked. Blocking calls; any number of threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..errors import CacheError, UsageError
from ..format.bootstrap import Bootstrap
from ..store.cache import Cache, CachedImage
from ..view import view_of, view_ranges

_MOST_PATTERNS = 64


@dataclass(frozen=True, slots=True)
class View:
    """A part of an image in use."""

    image: CachedImage
    """The image, with the view's bootstrap in place of its own."""
    spans: tuple[tuple[bytes, int, int], ...]
    """What its files hold: (space id, first byte, byte after the last), as the fetch pipeline takes it."""

    def sizes(self, cache: Cache) -> tuple[int, int]:
        """Return (bytes of its chunks that are here, bytes of its chunks)."""
        present = total = 0
        for space_id, first, stop in self.spans:
            space = cache.opened_space(space_id)
            if space is None:
                total += stop - first
                continue
            for chunk in space.table.covering(first, stop - first):
                length = space.table.extent(chunk)[1]
                total += length
                present += length if space.is_present(chunk) else 0
        return present, total


def check_patterns(include: Sequence[object], exclude: Sequence[object]) -> None:
    """Raise UsageError for what is no list of patterns."""
    for pattern in [*include, *exclude]:
        if not isinstance(pattern, str) or not pattern or "\0" in pattern or len(pattern) > 1024:
            raise UsageError(f"pattern {str(pattern)[:60]!r} cannot be used; expected a glob such as *.safetensors")
    if len(include) + len(exclude) > 2 * _MOST_PATTERNS:
        raise UsageError(f"{len(include) + len(exclude)} patterns, at most {2 * _MOST_PATTERNS}")


def open_view(cache_dir: str, image: CachedImage, include: Sequence[str], exclude: Sequence[str]) -> View:
    """Return a view of an image, made if it is not there. Raises UsageError if it shows no file, FormatError, CacheError."""
    seen = json.dumps([str(image.digest), sorted(include), sorted(exclude)]).encode()
    directory = os.path.join(cache_dir, "views")
    path = os.path.join(directory, f"{hashlib.sha256(seen).hexdigest()[:32]}.erofs")
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        data = view_of(image.bootstrap(), include, exclude)
        temporary = f"{path}.new-{os.urandom(6).hex()}"
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            with open(temporary, "xb") as file:
                file.write(data)
            os.rename(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise CacheError(f"{path}: {error.strerror}") from error
    bootstrap = Bootstrap(data)
    spans = tuple(
        (bootstrap.spaces[space].space_id, part.start, part.stop)
        for space, parts in sorted(view_ranges(bootstrap).items())
        for part in parts
    )
    return View(replace(image, view=path), spans)


def sweep_views(cache_dir: str, used: Iterable[str]) -> None:
    """Remove views that no mount names."""
    wanted = set(used)
    directory = os.path.join(cache_dir, "views")
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(directory):
            path = os.path.join(directory, name)
            if path not in wanted:
                with contextlib.suppress(OSError):
                    os.unlink(path)
