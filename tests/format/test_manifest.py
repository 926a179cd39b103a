"""Manifests: round trip, and a clear refusal of everything else."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rafsfs.errors import FormatError, UnsupportedError
from rafsfs.format.manifest import (
    MEDIA_TYPE_BLOB,
    MEDIA_TYPE_BOOTSTRAP,
    MEDIA_TYPE_CHUNK_MAP,
    MEDIA_TYPE_CONFIG,
    UNCOMPRESSED_SIZE,
    ImageConfig,
    encode_manifest,
    parse_config,
    parse_manifest,
)
from rafsfs.types import Descriptor, Digest


def descriptor(media_type: str, seed: bytes, **annotations: str) -> Descriptor:
    return Descriptor(media_type, Digest.of(seed), len(seed), {k.replace("_", "-"): v for k, v in annotations.items()})


def sample() -> bytes:
    return encode_manifest(
        config=descriptor(MEDIA_TYPE_CONFIG, b"config"),
        bootstrap=Descriptor(MEDIA_TYPE_BOOTSTRAP, Digest.of(b"boot"), 4, {UNCOMPRESSED_SIZE: "4096"}),
        chunk_map=descriptor(MEDIA_TYPE_CHUNK_MAP, b"map"),
        blobs=[descriptor(MEDIA_TYPE_BLOB, b"one"), descriptor(MEDIA_TYPE_BLOB, b"two")],
    )


def changed(**fields: Any) -> bytes:
    return json.dumps({**json.loads(sample()), **fields}).encode()


def test_round_trip() -> None:
    manifest = parse_manifest(sample())
    assert manifest.digest == Digest.of(sample())
    assert manifest.bootstrap_size == 4096
    assert [blob.digest for blob in manifest.blobs] == [Digest.of(b"one"), Digest.of(b"two")]
    assert sample() == sample()


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (b"{", FormatError, "not JSON"),
        (b"[]", FormatError, "not a JSON object"),
        (b"[" * 100_000, FormatError, "not JSON"),
        (json.dumps({"manifests": []}).encode(), FormatError, "an index of several manifests"),
        (
            json.dumps(
                {"config": {"mediaType": "application/vnd.docker.container.image.v1+json"}, "layers": []}
            ).encode(),
            FormatError,
            "an ordinary container image",
        ),
        (changed(artifactType="application/vnd.cncf.model"), FormatError, "application/vnd.cncf.model"),
        (changed(artifactType="application/vnd.rafs.image.v2"), UnsupportedError, "upgrade rafs"),
        (changed(layers=[]), FormatError, "no bootstrap"),
        (changed(layers=[{"mediaType": "x"}] * 2), FormatError, "descriptor"),
        (changed(layers=json.loads(sample())["layers"][::-1]), UnsupportedError, "layer 0"),
        (changed(annotations=[1]), FormatError, "annotations"),
        (b" " * (5 << 20), FormatError, "at most"),
    ],
)
def test_other_things_are_refused_in_words(data: bytes, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        parse_manifest(data)
    assert "\n" not in str(caught.value)
    assert type(caught.value) is error


@pytest.mark.parametrize("size", ["", "0", "-1", "1e3", "99999999999", "²"])
def test_a_bad_bootstrap_size_is_refused(size: str) -> None:
    layers = json.loads(sample())["layers"]
    layers[0]["annotations"][UNCOMPRESSED_SIZE] = size
    with pytest.raises(FormatError):
        parse_manifest(changed(layers=layers))


def test_config_round_trip() -> None:
    config = ImageConfig(3, 1000, 700)
    assert parse_config(config.encode()) == config


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"version": 2}, UnsupportedError),
        ({"requires": ["teleport"]}, UnsupportedError),
        ({"version": "1"}, FormatError),
        ({"version": True}, FormatError),
        ({"requires": "x"}, FormatError),
        ({"files": -1}, FormatError),
        ({"data_bytes": 1 << 70}, FormatError),
    ],
)
def test_configs_of_other_versions_or_kinds_are_refused(fields: dict[str, Any], error: type[Exception]) -> None:
    data = {**json.loads(ImageConfig(1, 2, 3).encode()), **fields}
    with pytest.raises(error):
        parse_config(json.dumps(data).encode())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(json.loads(sample()))), JSON)
def test_any_field_may_be_anything(field: str, value: Any) -> None:
    with contextlib.suppress(FormatError):
        parse_manifest(changed(**{field: value}))
