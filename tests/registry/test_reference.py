"""What users may write to name an image."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rafsfs.errors import UsageError
from rafsfs.registry.reference import Reference, is_repository, is_tag, parse_reference
from rafsfs.types import Digest

HEX = "ab" * 32
DIGEST = Digest(f"sha256:{HEX}")


@pytest.mark.parametrize(
    ("text", "registry", "repository", "tag", "digest"),
    [
        ("localhost:5000/x:v1", "localhost:5000", "x", "v1", None),
        ("localhost/x", "localhost", "x", None, None),
        (f"reg.io/a/b@sha256:{HEX}", "reg.io", "a/b", None, DIGEST),
        (f"reg.io:443/a/b:v1.0_x-y@sha256:{HEX}", "reg.io:443", "a/b", "v1.0_x-y", DIGEST),
        ("127.0.0.1:5000/team/a__b/c-d.e:Latest", "127.0.0.1:5000", "team/a__b/c-d.e", "Latest", None),
        ("[::1]:5000/x", "[::1]:5000", "x", None, None),
        ("REG.io/x", "reg.io", "x", None, None),
        ("docker.io/library/busybox", "docker.io", "library/busybox", None, None),
    ],
)
def test_registry_references(text: str, registry: str, repository: str, tag: str | None, digest: Digest | None) -> None:
    found = parse_reference(text)
    assert found == Reference("registry", registry, repository, tag, digest)
    assert parse_reference(str(found)) == found


@pytest.mark.parametrize(
    ("text", "path", "tag"),
    [
        ("oci:dir", "dir", None),
        ("oci:dir:v1", "dir", "v1"),
        ("oci:/data/models:v1", "/data/models", "v1"),
        ("oci:/data/a:b/c", "/data/a:b/c", None),
        ("oci:/data/a:b:v1", "/data/a:b", "v1"),
        ("oci:./a:b/c:v1", "./a:b/c", "v1"),
        ("oci:/data/with space:v1", "/data/with space", "v1"),
    ],
)
def test_layout_references(text: str, path: str, tag: str | None) -> None:
    found = parse_reference(text)
    assert (found.kind, found.path, found.tag, found.digest) == ("oci", path, tag, None)
    assert parse_reference(str(found)) == found


def test_layout_references_by_digest() -> None:
    found = parse_reference(f"oci:dir:v1@sha256:{HEX}")
    assert (found.path, found.tag, found.digest) == ("dir", "v1", DIGEST)


def test_what_is_asked_of_the_store() -> None:
    assert parse_reference("localhost/x").reference == "latest"
    assert parse_reference("localhost/x:v1").reference == "v1"
    assert parse_reference(f"localhost/x:v1@sha256:{HEX}").reference == DIGEST.text
    assert parse_reference("localhost/x:v1").with_digest(DIGEST).reference == DIGEST.text


def test_a_layout_is_made_absolute_for_another_process() -> None:
    assert parse_reference("oci:dir:v1").absolute().path == os.path.abspath("dir")
    assert parse_reference("localhost/x").absolute() == parse_reference("localhost/x")


def test_loopback_registries_are_known() -> None:
    for text in ("localhost/x", "localhost:5000/x", "127.0.0.1:5000/x", "[::1]:5000/x", "[::1]/x"):
        assert parse_reference(text).is_loopback, text
    for text in ("reg.io/x", "10.0.0.1:5000/x", "oci:localhost"):
        assert not parse_reference(text).is_loopback, text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("x", "does not begin with a registry host"),
        ("team/model:v1", "does not begin with a registry host"),
        ("model:v1", "does not begin with a registry host"),
        ("https://reg.io/x", "written as a URL"),
        ("docker://reg.io/x", "written as a URL"),
        ("reg.io/Upper", "repository name"),
        ("reg.io/", "repository name"),
        ("reg.io/a//b", "repository name"),
        ("reg.io/" + "a" * 300, "repository name"),
        ("reg.io/x:", "tag"),
        ("reg.io/x:-v", "tag"),
        ("reg.io/x:" + "v" * 129, "tag"),
        ("reg.io/x@sha256:short", "digest"),
        (f"reg.io/x@sha256:{HEX.upper()}", "digest"),
        ("reg.io:99999/x", "registry host"),
        ("reg..io/x", "registry host"),
        ("-reg.io/x", "registry host"),
        (" reg.io/x", "blanks"),
        ("reg.io/x\n", "blanks"),
        ("oci:", "names no directory"),
        ("oci::v1", "names no directory"),
        ("oci:dir:", "tag"),
        ("oci:dir:-v", "tag"),
    ],
)
def test_mistakes_are_explained_with_the_form(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        parse_reference(text)
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)


_PIECES = st.sampled_from(
    ["oci:", "localhost", "reg.io", ":5000", "/", "a", "B", ":", "@", f"@sha256:{HEX}", "..", "-", "v1"]
)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=60), st.lists(_PIECES, max_size=8).map("".join)))
def test_any_text_gives_a_reference_that_prints_as_itself_or_a_usage_error(text: str) -> None:
    try:
        found = parse_reference(text)
    except UsageError:
        return
    assert parse_reference(str(found)) == found
    if found.kind == "registry":
        assert is_repository(found.repository)
        assert found.tag is None or is_tag(found.tag)
