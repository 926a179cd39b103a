"""Loading whole images: the parts must agree, and reading verifies every chunk."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from builder.build import BuildOptions, build_image
from rafsfs.errors import FormatError, IntegrityError, RemoteError, UnsupportedError
from rafsfs.format.manifest import MEDIA_TYPE_MANIFEST
from rafsfs.image import Image, ImageReader, load_image
from rafsfs.registry.oci_layout import OciLayout


async def make(tmp_path: Path, tag: str, seed: int) -> OciLayout:
    source = tmp_path / f"source-{tag}"
    source.mkdir()
    (source / "file").write_bytes(random.Random(seed).randbytes(300_000))
    store = OciLayout(str(tmp_path / "layout"))
    await build_image(str(source), store, tag, BuildOptions(chunking="fixed", chunk_size=64 << 10, codec="raw"))
    return store


async def repoint(store: OciLayout, tag: str, **layers: int) -> None:
    """Store a manifest under `mixed` that takes single layers or the config from the image `tag`."""
    _, ours = await store.get_manifest("v1")
    _, theirs = await store.get_manifest(tag)
    manifest, other = json.loads(ours), json.loads(theirs)
    for index in layers.values():
        manifest["layers"][index] = other["layers"][index]
    await store.put_manifest(json.dumps(manifest).encode(), MEDIA_TYPE_MANIFEST, tag="mixed")


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ({"bootstrap": 0}, "not the one that the bootstrap names"),
        ({"chunk_map": 1}, "not the one that the bootstrap names"),
        ({"bootstrap": 0, "chunk_map": 1}, "which the manifest does not list"),
        ({"blob": 2}, "which the manifest does not list"),
    ],
)
async def test_parts_of_two_images_do_not_make_one(tmp_path: Path, layers: dict[str, int], says: str) -> None:
    store = await make(tmp_path, "v1", 1)
    await make(tmp_path, "v2", 2)
    await repoint(store, "v2", **layers)
    with pytest.raises(FormatError, match=says):
        await load_image(store, "mixed")


async def read(store: OciLayout, image: Image) -> bytes:
    nid = image.bootstrap.resolve(b"file")
    assert nid is not None
    return b"".join([bytes(part) async for part in ImageReader(store, image).read_file(nid)])


async def test_reading_gives_the_file(tmp_path: Path) -> None:
    store = await make(tmp_path, "v1", 1)
    assert await read(store, await load_image(store, "v1")) == random.Random(1).randbytes(300_000)


def blob_of(tmp_path: Path, image: Image) -> Path:
    return tmp_path / "layout" / "blobs" / "sha256" / image.manifest.blobs[0].digest.hex


async def test_a_corrupt_chunk_is_named_and_never_delivered(tmp_path: Path) -> None:
    store = await make(tmp_path, "v1", 1)
    image = await load_image(store, "v1")
    with blob_of(tmp_path, image).open("r+b") as file:
        file.seek(2 * 65536 + 5)
        file.write(b"\0\1\2\3")
    with pytest.raises(IntegrityError, match=f"chunk 2 of data space 0 in blob {image.manifest.blobs[0].digest}"):
        await read(store, image)
    assert await ImageReader(store, image).read_chunk(0, 1)


async def test_a_short_blob_is_an_error(tmp_path: Path) -> None:
    store = await make(tmp_path, "v1", 1)
    image = await load_image(store, "v1")
    with blob_of(tmp_path, image).open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(RemoteError):
        await read(store, image)


async def test_a_bootstrap_of_another_size_than_declared_is_refused(tmp_path: Path) -> None:
    store = await make(tmp_path, "v1", 1)
    _, data = await store.get_manifest("v1")
    for size in ("4096", "16384", str(1 << 29)):
        manifest = json.loads(data)
        manifest["layers"][0]["annotations"]["vnd.rafs.uncompressed-size"] = size
        await store.put_manifest(json.dumps(manifest).encode(), MEDIA_TYPE_MANIFEST, tag="lie")
        with pytest.raises(FormatError):
            await load_image(store, "lie")


async def test_a_newer_image_is_refused_as_such(tmp_path: Path) -> None:
    store = await make(tmp_path, "v1", 1)
    _, data = await store.get_manifest("v1")
    manifest = json.loads(data)
    config = json.dumps({"version": 2, "requires": [], "files": 0, "data_bytes": 0, "stored_bytes": 0}).encode()
    manifest["config"].update(digest=str(await store.put_blob(config)), size=len(config))
    await store.put_manifest(json.dumps(manifest).encode(), MEDIA_TYPE_MANIFEST, tag="newer")
    with pytest.raises(UnsupportedError, match="upgrade rafs"):
        await load_image(store, "newer")
