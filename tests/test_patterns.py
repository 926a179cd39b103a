"""Patterns patterns."""

from __future__ import annotations

import pytest

from rafsfs.patterns import Patterns


@pytest.mark.parametrize(
    ("pattern", "path", "is_dir", "matches"),
    [
        ("*.tmp", b"a/b.tmp", False, True),
        ("*.tmp", b"a/b.tmpx", False, False),
        ("/a/*", b"a/b", False, True),
        ("a/*", b"x/a/b", False, False),
        ("a/*", b"a/b/c", False, False),
        ("a/**", b"a/b/c", False, True),
        ("**/c", b"a/b/c", False, True),
        ("**/c", b"c", False, True),
        ("cache/", b"x/cache", True, True),
        ("cache/", b"x/cache", False, False),
        ("b?d", b"bad", False, True),
        ("b?d", b"b/d", False, False),
        ("a.c", b"abc", False, False),
        ("*", b"\xff\n", False, True),
    ],
)
def test_pattern(pattern: str, path: bytes, is_dir: bool, matches: bool) -> None:
    assert Patterns([pattern]).matches(path, is_dir=is_dir) is matches
