"""Which paths a list of globs means: of `rafs build --exclude`, of views. Pure.

A pattern without a slash is held against the last part of a path, one with a slash against the whole path from the root on. `*`
and `?` do not cross a slash, `**` does; a trailing slash means directories only. What is said of a directory goes for all below
it; whoever asks sees to that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


class Patterns:
    """Compiled patterns."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._rules = [_compile(pattern) for pattern in patterns]

    def matches(self, path: bytes, *, is_dir: bool) -> bool:
        """Tell whether the file or directory at `path` (relative, no leading slash) matches any of them."""
        name = path.rpartition(b"/")[2]
        return any(
            rule.fullmatch(path if whole else name) is not None
            for rule, whole, dirs in self._rules
            if is_dir or not dirs
        )


def _compile(pattern: str) -> tuple[re.Pattern[bytes], bool, bool]:
    dirs_only = pattern.endswith("/")
    text = pattern.rstrip("/")
    whole = "/" in text
    text = text.lstrip("/")
    out = b""
    at = 0
    while at < len(text):
        if text.startswith("**/", at):
            out += b"(?:.*/)?"
            at += 3
        elif text.startswith("**", at):
            out += b".*"
            at += 2
        elif text[at] == "*":
            out += b"[^/]*"
            at += 1
        elif text[at] == "?":
            out += b"[^/]"
            at += 1
        else:
            out += re.escape(text[at].encode("utf-8", "surrogateescape"))
            at += 1
    return re.compile(out, re.DOTALL), whole, dirs_only
