"""What makes two downloads the same file, and what it may be called, whatever the server or the user says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rafsfs.files.identity import (
    Validator,
    file_key,
    file_name,
    is_name,
    normalise,
    parse_headers,
    sample_extents,
    strong_validator,
    why_private,
)
from rafsfs.net.origin import parse_url

TAG = Validator("etag", '"1"')


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("HTTP://Models.Example:80/a/./b/../c%7e%2f", "http://models.example/a/c~%2F"),
        ("https://models.example", "https://models.example/"),
        ("https://models.example/../../x", "https://models.example/x"),
        ("https://models.example/x/..", "https://models.example/"),
        ("https://models.example:444/x?b=1&a=%61", "https://models.example:444/x?b=1&a=a"),
    ],
)
def test_one_file_has_one_url(url: str, expected: str) -> None:
    assert normalise(parse_url(url)) == expected
    assert normalise(parse_url(expected)) == expected


def test_parameters_that_do_not_matter_are_left_out() -> None:
    target = parse_url("https://h/x?a=1&sig=2&b=3")
    assert normalise(target, ["sig"]) == "https://h/x?a=1&b=3"
    assert normalise(target, ["*"]) == "https://h/x"
    assert normalise(target, ["A"]) == "https://h/x?a=1&sig=2&b=3"


@given(st.text(min_size=1, max_size=40).filter(str.isprintable))
def test_normalising_twice_is_normalising_once(path: str) -> None:
    try:
        target = parse_url("https://h/" + path)
    except ValueError:
        return
    once = normalise(target)
    assert normalise(parse_url(once)) == once


fields = st.tuples(st.text(max_size=8), st.text(max_size=8), st.integers(0, 1 << 50), st.binary(max_size=4))


@given(fields, fields)
def test_two_versions_never_have_one_key(one: tuple[str, str, int, bytes], other: tuple[str, str, int, bytes]) -> None:
    def key(url: str, tag: str, length: int, secret: bytes) -> bytes:
        return file_key(url, Validator("etag", tag), length, secret)

    assert (key(*one) == key(*other)) == (one == other)
    assert len(key(*one)) == 32


DATE = "Wed, 25 Nov 2026 12:00:00 GMT"


@pytest.mark.parametrize(
    ("etag", "modified", "date", "expected"),
    [
        ('"abc"', DATE, DATE, Validator("etag", '"abc"')),
        ('W/"abc"', "Wed, 25 Nov 2026 11:00:00 GMT", DATE, Validator("last-modified", "Wed, 25 Nov 2026 11:00:00 GMT")),
        ('W/"abc"', "Wed, 25 Nov 2026 11:59:30 GMT", DATE, None),
        (None, DATE, None, None),
        ("abc", None, DATE, None),
        ('"a"b"', None, None, None),
        (None, "nonsense", "Wed, 99 Nov", None),
    ],
)
def test_only_what_names_one_version_counts(
    etag: str | None, modified: str | None, date: str | None, expected: Validator | None
) -> None:
    assert strong_validator(etag, modified, date) == expected


@pytest.mark.parametrize(
    ("url", "credentials", "cache_control", "private"),
    [
        ("https://h/x", False, None, False),
        ("https://h/x?download=true", False, "public, max-age=60", False),
        ("https://h/x", True, None, True),
        ("https://h/x?X-Amz-Signature=1", False, None, True),
        ("https://h/x?access_token=1", False, None, True),
        ("https://h/x?sv=2&sig=1", False, None, True),
        ("https://h/x?%73ig=1", False, None, True),
        ("https://h/x", False, "max-age=1, Private", True),
        ("https://h/x", False, "no-store", True),
    ],
)
def test_what_is_private(url: str, credentials: bool, cache_control: str | None, private: bool) -> None:
    reason = why_private(parse_url(url), credentials=credentials, cache_control=cache_control)
    assert bool(reason) == private


@given(st.integers(1, 1 << 50))
def test_samples_lie_inside_the_file_and_reach_its_ends(length: int) -> None:
    samples = sample_extents(length)
    assert 1 <= len(samples) <= 4
    assert samples[0][0] == 0
    assert sum(samples[-1]) == length
    assert all(offset >= 0 and size >= 1 and offset + size <= length for offset, size in samples)


@given(st.text(max_size=300), st.one_of(st.none(), st.text(max_size=300)))
def test_whatever_comes_a_name_stays_in_its_directory(last: str, disposition: str | None) -> None:
    try:
        target = parse_url("https://h/dir/" + last.replace("#", ""))
    except ValueError:
        return
    name = file_name(target, disposition)
    assert not name or (is_name(name) and "/" not in name and name not in {".", ".."} and "\0" not in name)


@pytest.mark.parametrize(
    ("url", "disposition", "expected"),
    [
        ("https://h/a/model.bin?x=1", 'attachment; filename="other"', "model.bin"),
        ("https://h/a%20b", None, "a b"),
        ("https://h/", 'attachment; filename="../../etc/passwd"', "passwd"),
        ("https://h/", "attachment; filename*=utf-8''mod%C3%A9le.bin", "modéle.bin"),
        ("https://h/", 'attachment; filename=".."', ""),
        ("https://h/..%2f..%2fevil", None, ""),
        ("https://h/a%00b", None, ""),
        ("https://h/", None, ""),
        ("https://h/" + "x" * 256, None, ""),
    ],
)
def test_what_a_file_is_called(url: str, disposition: str | None, expected: str) -> None:
    assert file_name(parse_url(url), disposition) == expected


def test_headers_are_checked_and_errors_hold_no_secret() -> None:
    assert parse_headers(["Authorization:  Bearer x ", "X-A:"]) == {"Authorization": "Bearer x", "X-A": ""}
    for line in (
        "no colon secret",
        "A b: secret",
        "Host: secret",
        "X: se\ncret",
        "Range: bytes=0-secret",
        "X: s\x01ecret",
    ):
        with pytest.raises(ValueError, match="header") as caught:
            parse_headers([line])
        assert "secret" not in str(caught.value) or line.startswith("no colon")
