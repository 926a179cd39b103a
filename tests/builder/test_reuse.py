"""Building on earlier images: what is taken over, what is stored as a difference, and what happens when the earlier one is not usable."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from builder import reuse
from builder.base_image import BaseImage
from builder.build import BuildOptions, BuildResult, build_image
from builder.census import Census
from builder.compare import Comparison, compare_images
from builder.dictionary import ChunkDictionary
from builder.earlier_image import EarlierImage
from builder.image_weights import ImageWeights, weights_of
from builder.reuse import DICTIONARY, Earlier
from rafsfs.format.chunk_map import MAX_DELTA_DEPTH
from rafsfs.format.codec import CODEC_XOR
from rafsfs.image import Image, ImageReader, load_image
from rafsfs.registry.oci_layout import OciLayout
from tests.support.series import moved, save, small_model
from tests.support.weights import Array, save_safetensors

from .test_build import files_of

pytestmark = pytest.mark.io

SMALL = BuildOptions(chunk_size=64 << 10, space_bound=1 << 30)


class Shop:
    """A layout with images, and how they came to be."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = OciLayout(str(path))

    async def build(
        self,
        source: Path,
        tag: str,
        *,
        on: tuple[str, ...] = (),
        base: str = "",
        dictionary: ChunkDictionary | None = None,
        options: BuildOptions = SMALL,
    ) -> BuildResult:
        images = tuple([await self.earlier(name) for name in on])
        found = await BaseImage.open(await self.earlier(base)) if base else None
        if found is not None:
            images += (found.earlier,)
        earlier = Earlier(images, dictionary)
        return await build_image(str(source), self.store, tag, options, earlier=earlier, base=found)

    async def earlier(self, tag: str) -> EarlierImage:
        return EarlierImage(tag, await load_image(self.store, tag), self.store)

    async def read(self, tag: str) -> dict[str, bytes]:
        image = await load_image(self.store, tag)
        reader = ImageReader(self.store, image)
        return {
            os.fsdecode(path): b"".join([bytes(part) async for part in reader.read_file(inode.nid)])
            for path, inode in image.bootstrap.walk()
            if inode.mode & 0o170000 == 0o100000
        }

    async def compare(self, first: str, second: str) -> Comparison:
        sides = [await self._side(tag) for tag in (first, second)]
        return await compare_images(sides[0], sides[1])

    async def _side(self, tag: str) -> tuple[Image, ImageReader, list[ImageWeights]]:
        image = await load_image(self.store, tag)
        reader = ImageReader(self.store, image)
        return image, reader, [found async for found in weights_of(image, reader)]

    def blob(self, image: Image, number: int) -> Path:
        return self.path / "blobs" / "sha256" / image.chunk_map.blobs[number].digest.hex


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path / "layout")


async def test_chunks_of_an_earlier_image_are_not_stored_again(shop: Shop, tmp_path: Path) -> None:
    arrays = small_model(1)
    await shop.build(save(tmp_path / "one", arrays), "v1")
    more = dict(reversed(arrays.items())) | {"new.weight": small_model(9, 1)["layer.0.weight"]}
    source = save(tmp_path / "two", more)
    (source / "config.json").write_text("{}")
    built = await shop.build(source, "v2", on=("v1",))
    new = len(more["new.weight"].data) // 2
    assert built.reused_from == {"v1": sum(len(a.data) // 2 for a in arrays.values())}
    assert 0.5 * new < built.stored_bytes < new + 4096
    assert await shop.read("v2") == files_of(source)
    image = await load_image(shop.store, "v2")
    origins = Census(image).by_origin()
    assert origins["v1"].data_bytes == built.reused_from["v1"]
    assert {blob.annotations.get("vnd.rafs.from", "") for blob in image.manifest.blobs} == {"", "v1"}


async def test_an_image_on_an_image_on_an_image_names_where_blobs_came_from(shop: Shop, tmp_path: Path) -> None:
    arrays = small_model(1, 2)
    await shop.build(save(tmp_path / "one", arrays), "v1")
    arrays |= {"second": small_model(2, 1)["layer.0.weight"]}
    await shop.build(save(tmp_path / "two", arrays), "v2", on=("v1",))
    arrays |= {"third": small_model(3, 1)["layer.0.weight"]}
    source = save(tmp_path / "three", arrays)
    await shop.build(source, "v3", on=("v2",))
    origins = Census(await load_image(shop.store, "v3")).by_origin()
    assert set(origins) == {"", "v1", "v2"}
    assert await shop.read("v3") == files_of(source)


async def test_the_same_again_is_the_same_manifest(shop: Shop, tmp_path: Path) -> None:
    source = save(tmp_path / "one", small_model(1))
    first = await shop.build(source, "v1")
    again = await shop.build(source, "v1", on=("v1",))
    assert (again.digest, again.sent_bytes, again.new_chunks) == (first.digest, 0, 0)


@pytest.mark.logs_warnings
async def test_a_blob_that_is_gone_is_stored_again(shop: Shop, tmp_path: Path) -> None:
    source = save(tmp_path / "one", small_model(1))
    await shop.build(source, "v1")
    image = await load_image(shop.store, "v1")
    for number in range(len(image.chunk_map.blobs)):
        shop.blob(image, number).unlink()
    built = await shop.build(source, "v2", on=("v1",))
    assert built.reused_from in ({}, {"v1": 0})
    assert built.sent_bytes == built.stored_bytes > 0
    assert await shop.read("v2") == files_of(source)


@pytest.mark.logs_warnings
async def test_another_registry_gives_nothing(shop: Shop, tmp_path: Path) -> None:
    source = save(tmp_path / "one", small_model(1))
    await shop.build(source, "v1")
    other = Shop(tmp_path / "other")
    earlier = await shop.earlier("v1")
    built = await build_image(str(source), other.store, "v1", SMALL, earlier=Earlier((earlier,)))
    assert built.sent_bytes == built.stored_bytes > 0
    assert await other.read("v1") == files_of(source)


async def test_the_dictionary_knows_what_was_built_here(shop: Shop, tmp_path: Path) -> None:
    dictionary = ChunkDictionary.open(str(tmp_path / "dictionary"))
    assert dictionary is not None
    source = save(tmp_path / "one", small_model(1))
    await shop.build(source, "v1", dictionary=dictionary)
    again = await shop.build(source, "v2", dictionary=dictionary)
    assert again.sent_bytes == 0
    assert again.reused_from == {DICTIONARY: again.data_bytes}
    assert await shop.read("v2") == files_of(source)
    elsewhere = await build_image(
        str(source), OciLayout(str(tmp_path / "elsewhere")), "v1", SMALL, earlier=Earlier((), dictionary)
    )
    assert elsewhere.sent_bytes == elsewhere.stored_bytes > 0, "what is not there, and cannot be mounted, is sent"


async def test_an_image_lists_a_bounded_number_of_blobs(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays: dict[str, Array] = {}
    for number in range(4):
        arrays[f"layer.{number}"] = small_model(number, 1)["layer.0.weight"]
        await shop.build(save(tmp_path / f"{number}", arrays), f"v{number}", on=(f"v{number - 1}",) if number else ())
    monkeypatch.setattr(reuse, "MOST_BLOBS", 2)
    source = save(tmp_path / "last", arrays)
    built = await shop.build(source, "last", on=("v3",))
    image = await load_image(shop.store, "last")
    assert len(image.chunk_map.blobs) == 2 + 1
    assert 0 < built.new_chunks < built.new_chunks + built.reused_chunks
    assert await shop.read("last") == files_of(source)


async def test_differences_only_where_they_pay(shop: Shop, tmp_path: Path) -> None:
    arrays = small_model(1)
    await shop.build(save(tmp_path / "one", arrays), "v1")
    after = moved(arrays, 2)
    after["layer.0.weight"] = arrays["layer.0.weight"]
    after["layer.1.weight"] = small_model(7, 1)["layer.0.weight"]
    source = save(tmp_path / "two", after)
    built = await shop.build(source, "v2", base="v1")
    size = len(arrays["layer.0.weight"].data) // 2
    header = built.data_bytes - 4 * size
    assert built.reused_from == {"v1": size + header}, "what did not change is taken over"
    assert built.delta_bytes == 2 * size, "what was trained anew is stored alone"
    assert built.delta_stored_bytes < 0.8 * built.alone_bytes
    assert built.base_bytes > 0
    image = await load_image(shop.store, "v2")
    assert image.config.requires == ("delta",)
    assert Census(image).base_bytes == built.base_bytes
    assert Census(image).deltas().data_bytes == built.delta_bytes
    assert await shop.read("v2") == files_of(source)


async def test_tensors_of_another_shape_dtype_or_name_have_no_base(shop: Shop, tmp_path: Path) -> None:
    arrays = small_model(1, 3)
    one = tmp_path / "one"
    one.mkdir()
    save_safetensors(one / "model.safetensors", arrays)
    await shop.build(one, "v1")
    two = tmp_path / "two"
    two.mkdir()
    after = moved(arrays, 2)
    first, second, third = (after[name] for name in arrays)
    changed = {
        "layer.0.weight": replace(first, shape=first.shape[::-1]),
        "layer.1.weight": replace(second, dtype="I32"),
        "renamed": third,
    }
    save_safetensors(two / "model.safetensors", changed)
    built = await shop.build(two, "v2", base="v1")
    assert built.delta_chunks == 0
    assert (await load_image(shop.store, "v2")).config.requires == ()
    assert await shop.read("v2") == files_of(two)


async def test_a_series_begins_anew_at_the_greatest_depth(shop: Shop, tmp_path: Path) -> None:
    arrays = small_model(1, 2)
    for step in range(MAX_DELTA_DEPTH + 3):
        source = save(tmp_path / f"{step}", arrays)
        built = await shop.build(source, f"v{step}", base=f"v{step - 1}" if step else "")
        earlier = await shop.earlier(f"v{step}")
        depth = max(earlier.depth((0, n)) for n in range(earlier.image.chunk_map.spaces[0].count))
        assert depth == step % (MAX_DELTA_DEPTH + 1)
        assert bool(built.delta_chunks) == bool(depth)
        assert await shop.read(f"v{step}") == files_of(source)
        arrays = moved(arrays, step)


async def test_a_difference_is_taken_over_with_its_base(shop: Shop, tmp_path: Path) -> None:
    arrays = small_model(1)
    await shop.build(save(tmp_path / "one", arrays), "v1")
    after = moved(arrays, 2)
    await shop.build(save(tmp_path / "two", after), "v2", base="v1")
    after |= {"extra": small_model(5, 1)["layer.0.weight"]}
    source = save(tmp_path / "three", after)
    built = await shop.build(source, "v3", on=("v2",))
    assert built.delta_chunks == 0, "nothing is encoded as a difference here"
    image = await load_image(shop.store, "v3")
    assert image.config.requires == ("delta",), "but what was taken over is"
    codecs = image.chunk_map.storage()["codec"]
    assert (codecs[: image.chunk_map.chunk_count] == CODEC_XOR).any()
    assert await shop.read("v3") == files_of(source)


@pytest.mark.logs_warnings
async def test_a_base_whose_blob_is_gone_is_not_used(shop: Shop, tmp_path: Path) -> None:
    arrays = small_model(1)
    await shop.build(save(tmp_path / "one", arrays), "v1")
    image = await load_image(shop.store, "v1")
    base = await BaseImage.open(await shop.earlier("v1"))  # the headers were read while it was there
    for number in range(len(image.chunk_map.blobs)):
        shop.blob(image, number).unlink()
    source = save(tmp_path / "two", moved(arrays, 2))
    built = await build_image(str(source), shop.store, "v2", SMALL, earlier=Earlier((base.earlier,)), base=base)
    assert built.delta_chunks == 0
    assert await shop.read("v2") == files_of(source)


async def test_an_earlier_image_that_lies_makes_no_wrong_byte(shop: Shop, tmp_path: Path) -> None:
    """Its map says that other content is at a place: a build on it cannot know, its reader does."""
    arrays = small_model(1, 1)
    await shop.build(save(tmp_path / "one", arrays), "v1")
    image = await load_image(shop.store, "v1")
    blob = shop.blob(image, 0)
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    await shop.build(save(tmp_path / "two", arrays), "v2", on=("v1",))
    with pytest.raises(Exception, match="digest"):
        await shop.read("v2")


async def test_a_comparison_tells_files_tensors_and_the_way_to_go(shop: Shop, tmp_path: Path) -> None:
    arrays = small_model(1)
    one = save(tmp_path / "one", arrays)
    for name, text in (("same", "x" * 9000), ("gone", "y" * 9000), ("text", "z" * 9000), ("mode", "m")):
        (one / name).write_text(text)
        os.utime(one / name, (1, 1))
    await shop.build(one, "v1")
    after = dict(arrays)
    after["layer.2.weight"] = moved({"w": arrays["layer.2.weight"]}, 3)["w"]
    del after["layer.3.weight"]
    after["layer.4.weight"] = small_model(8, 1)["layer.0.weight"]
    two = save(tmp_path / "two", after)
    for name, text in (("same", "x" * 9000), ("new", "y" * 9000), ("text", "t" * 9000), ("mode", "m")):
        (two / name).write_text(text)
        os.utime(two / name, (1, 1))
    os.chmod(two / "mode", 0o600)
    built = await shop.build(two, "v2", on=("v1",))
    found = await shop.compare("v1", "v2")
    kinds = {change.path: change.kind for change in found.files if change.path not in {"", "."}}
    assert kinds == {
        "gone": "removed",
        "new": "added",
        "text": "changed",
        "mode": "metadata",
        "model.safetensors": "changed",
    }
    assert {change.name: change.kind for change in found.tensors} == {
        "layer.2.weight": "changed",
        "layer.3.weight": "removed",
        "layer.4.weight": "added",
    }
    assert found.equal_tensors == 2
    assert found.fetch.stored_bytes == built.stored_bytes
    nothing = await shop.compare("v2", "v2")
    assert (nothing.files, nothing.tensors, nothing.fetch.stored_bytes) == ([], [], 0)


async def test_a_comparison_counts_bases(shop: Shop, tmp_path: Path) -> None:
    arrays = small_model(1)
    await shop.build(save(tmp_path / "one", arrays), "v1")
    (tmp_path / "empty").mkdir()
    await shop.build(tmp_path / "empty", "none")
    built = await shop.build(save(tmp_path / "two", moved(arrays, 2)), "v2", base="v1")
    assert (await shop.compare("v1", "v2")).fetch.stored_bytes == built.stored_bytes
    fetch = (await shop.compare("none", "v2")).fetch
    assert 0 <= fetch.stored_bytes - built.stored_bytes - built.base_bytes < 1000, "the header is that of the base, too"
