"""Which paths of an image a pattern means."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rafsfs.errors import UsageError
from rafsfs.files.select import compile_pattern


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("a", "a", True),
        ("a", "a/b/c", True),
        ("a", "ab", False),
        ("*.bin", "x.bin", True),
        ("*.bin", "d/x.bin", False),
        ("**/*.bin", "x.bin", True),
        ("**/*.bin", "d/e/x.bin", True),
        ("d/**", "d/e/x", True),
        ("d/?", "d/xy", False),
        ("[ab].txt", "b.txt", True),
        ("[!ab].txt", "c.txt", True),
        ("[!ab].txt", "a.txt", False),
        ("/a/", "a", True),
        ("a.b", "axb", False),
    ],
)
def test_a_pattern_means(pattern: str, path: str, matches: bool) -> None:
    assert bool(compile_pattern(pattern).match(path.encode())) == matches


@pytest.mark.parametrize("pattern", ["", "/", "..", "a/../b", "a//b", "."])
def test_what_is_no_path_is_refused(pattern: str) -> None:
    with pytest.raises(UsageError):
        compile_pattern(pattern)


@given(st.text(max_size=30))
def test_any_text_gives_a_pattern_or_an_error_of_ours(text: str) -> None:
    try:
        compile_pattern(text).match(b"some/path")
    except UsageError:
        pass
    except UnicodeEncodeError:
        assert any("\ud800" <= c <= "\udfff" for c in text)
