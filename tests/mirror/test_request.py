"""What a client of the mirror may ask for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rafsfs.errors import UsageError
from rafsfs.mirror.request import parse_range, parse_request

_DIGEST = "sha256:" + "a" * 64


def test_the_registry_is_the_one_that_the_client_names_else_the_default() -> None:
    found = parse_request("/v2/library/app/manifests/v1", "ns=Docker.io", "registry.example")
    assert found is not None
    assert (found.registry, found.repository, found.reference, found.is_blob) == (
        "docker.io",
        "library/app",
        "v1",
        False,
    )
    blob = parse_request(f"/v2/a/b/c/blobs/{_DIGEST}", "", "registry.example:5000")
    assert blob is not None
    assert (blob.registry, blob.is_blob, str(blob.digest)) == ("registry.example:5000", True, _DIGEST)
    assert parse_request("/v2/", "ns=x", "") is None


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/v2/app/manifests/v1", ""),
        ("/v2/app/manifests/v1", "ns=a b"),
        ("/v2/app/manifests/v1", "ns=http://a"),
        ("/v2/app/blobs/v1", "ns=r.example"),
        ("/v2/app/blobs/sha256:00", "ns=r.example"),
        ("/v2/app/blobs/uploads/", "ns=r.example"),
        ("/v2/../etc/manifests/v1", "ns=r.example"),
        ("/v2/App/manifests/v1", "ns=r.example"),
        ("/v2/app/tags/list", "ns=r.example"),
        ("/v1/app", "ns=r.example"),
        ("/v2/app/manifests/v1", "&".join(["a=b"] * 20)),
    ],
)
def test_everything_else_is_refused(path: str, query: str) -> None:
    with pytest.raises(UsageError):
        parse_request(path, query, "")


@given(st.text(max_size=80), st.text(max_size=40))
def test_any_path_is_a_request_or_refused(path: str, query: str) -> None:
    for whole in (path, f"/v2/{path}", f"/v2/app/manifests/{path}"):
        try:
            found = parse_request(whole, query, "registry.example")
        except UsageError:
            continue
        assert found is None or (".." not in found.repository and "/" not in found.reference)


@given(st.text(max_size=30), st.integers(0, 10_000))
def test_any_range_is_inside_or_none_or_refused(text: str, length: int) -> None:
    for whole in (text, f"bytes={text}"):
        try:
            found = parse_range(whole, length)
        except ValueError:
            continue
        assert found is None or (found[0] >= 0 and found[1] > 0 and sum(found) <= length)


@given(st.integers(0, 200), st.integers(0, 200), st.integers(1, 150))
def test_ranges_are_those_of_the_standard(first: int, last: int, length: int) -> None:
    data = bytes(range(150))[:length]
    try:
        found = parse_range(f"bytes={first}-{last}", length)
    except ValueError:
        assert first >= length
        return
    if found is None:
        assert last < first
    else:
        assert data[found[0] : sum(found)] == data[first : last + 1]


def test_suffixes_and_open_ends() -> None:
    assert parse_range("bytes=-5", 100) == (95, 5)
    assert parse_range("bytes=-500", 100) == (0, 100)
    assert parse_range("bytes=90-", 100) == (90, 10)
    assert parse_range("bytes=0-1,5-6", 100) is None
    assert parse_range(None, 100) is None
